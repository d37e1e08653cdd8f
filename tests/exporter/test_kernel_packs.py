"""Kernels for a model: what its sites need, compiled, inside the model, which runs as before."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from longspan.exporter import EnvironmentLacks, ExportFailed, InvalidRequest, SourceRequest, export
from longspan.exporter.bundle import Bundle
from longspan.exporter.errors import BundleCorrupted
from longspan.exporter.graph_io import save_model
from longspan.exporter.kernel_costs import PEAKS, Execution, bound, cost_of_recipe
from longspan.exporter.kernel_packs import add_kernels, compile_pack, embed, embedded_pack, targets_of
from longspan.exporter.kernel_reports import kernel_reports, open_pack, resident_blocks
from longspan.exporter.kernel_sites import Wanted, graph_sites
from longspan.plugins.gpu.pack import Pack, pack_id
from longspan.plugins.gpu.pack_build import PTX, Target, recipe_for
from longspan.plugins.gpu.variants import ARCHITECTURES, KernelSite, Recipe

from ..plugins.packs import kernel, pack, path, recipe

SITE = KernelSite("SlidingWindowAttention", "float32", 16, 16, 4, 4, ("Q", "K", "V", "attn_mask"), lists_per_head=False)


def test_architectures_are_read_and_sorted() -> None:
    assert targets_of("sm_90, sm_80,90", ptx=False) == (Target(80), Target(90))
    assert targets_of("sm_120") == (Target(120), PTX)
    assert [str(target) for target in targets_of("sm_86")] == ["sm_86", "ptx"]


@pytest.mark.parametrize("text", ["sm_75", "sm_", "turing", "", ",", "sm_80;sm_90", "sm_²"])
def test_unknown_architectures_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"allowed: sm_80, sm_86, sm_87, sm_89, sm_90, sm_100, sm_120"):
        targets_of(text)


def test_a_bundle_has_the_kernels_that_its_sites_need(gpu_bundle: Path) -> None:
    content = open_pack(gpu_bundle)
    variants = {variant.name for target in targets_of("sm_80") for variant in recipe_for(SITE, target).variants}
    assert {kernel.name for kernel in content.kernels} == variants
    assert content.architectures == ((80, "cubin"), (80, "ptx"))
    (first, second) = content.recipes
    assert first.inputs == second.inputs == SITE.inputs and first.outputs == ("Y",)
    assert dict(first.match) == {
        "D": (16,), "D_v": (16,), "group": (1,), "is_causal": (0,), "softcap": (0,), "dilation": (1,)
    }  # fmt: skip
    record = Bundle.open(gpu_bundle).manifest.gpu
    data = embedded_pack(gpu_bundle / "model.onnx")
    assert record is not None and data is not None
    assert record.targets == ("sm_80", "ptx") and record.refused == {}
    assert (record.pack, record.bytes, record.kernels) == (pack_id(data), len(data), len(content.kernels))
    assert record.compiler == content.compiler
    # Machine code by an assembler of CUDA 13 would need a driver of CUDA 13.
    assert re.fullmatch(r"triton \d+(\.\d+)+, ptxas 12\.\d+", record.compiler)


def test_one_node_carries_the_pack_and_every_node_names_it(gpu_bundle: Path) -> None:
    model = onnx.load(gpu_bundle / "model.onnx")
    nodes = [node for node in model.graph.node if node.domain == "longspan"]
    attributes = [{attribute.name: attribute for attribute in node.attribute} for node in nodes]
    data = onnx.numpy_helper.to_array(attributes[0]["kernel_pack"].t).tobytes()
    assert "kernel_pack" not in attributes[1] and len(nodes) == 2
    assert {given["kernel_pack_id"].s.decode() for given in attributes} == {data[32:64].hex()}
    onnx.checker.check_model(model)
    sites = json.loads((gpu_bundle / "manifest.json").read_text())["sites"]
    assert all("kernel_pack" not in site["attributes"] for site in sites)


def test_the_model_computes_what_it_did_without_kernels(gpu_bundle: Path, kernel_library: str) -> None:
    model = onnx.load(gpu_bundle / "model.onnx")
    ids, zeros = np.arange(2, 102).reshape(2, 50) % 400, np.zeros((2, 50), np.int64)
    feeds = {"input_ids": ids, "attention_mask": zeros + 1, "token_type_ids": zeros}
    with_pack = [_run(model, feeds, library) for library in (None, kernel_library)]
    for node in model.graph.node:
        for attribute in [a for a in node.attribute if a.name.startswith("kernel_pack")]:
            node.attribute.remove(attribute)
    for library, result in zip((None, kernel_library), with_pack, strict=True):
        np.testing.assert_array_equal(result, _run(model, feeds, library))


def _run(model: onnx.ModelProto, feeds: dict[str, Any], library: str | None) -> npt.NDArray[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if library is not None:
        options.register_custom_ops_library(library)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: npt.NDArray[Any] = session.run(None, feeds)[0]
    return result


def test_compiling_again_in_another_order_makes_the_same_bytes(
    gpu_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing is there: compiled, not looked up
    said: list[str] = []
    again = compile_pack([SITE, SITE], targets_of("sm_80")[::-1], jobs=2, progress=said.append)
    assert again.to_bytes() == embedded_pack(gpu_bundle / "model.onnx")
    assert said == [f"kernel {done} of 3" for done in range(4)]


def test_embedding_replaces_what_was_there(gpu_bundle: Path) -> None:
    model = ir.load(gpu_bundle / "model.onnx")
    names = [node.name or "" for node in model.graph if node.domain == "longspan"]
    embed(model, pack(), names[1:], {})
    first, second = (node.attributes for node in model.graph if node.domain == "longspan")
    assert "kernel_pack" not in first and "kernel_pack_id" not in first
    assert second["kernel_pack"].as_tensor().numpy().tobytes() == pack().to_bytes()
    with pytest.raises(InvalidRequest, match="no node"):
        embed(model, pack(), ["other"], {})


def test_the_pack_stays_in_the_model_when_weights_leave_it(gpu_bundle: Path, tmp_path: Path) -> None:
    save_model(ir.load(gpu_bundle / "model.onnx"), tmp_path / "model.onnx", external_data_bytes=0)
    assert (tmp_path / "model.onnx.data").is_file()
    assert embedded_pack(tmp_path / "model.onnx") == embedded_pack(gpu_bundle / "model.onnx")


def test_sites_are_read_from_a_graph(gpu_bundle: Path, longformer_bundle: Path) -> None:
    found = graph_sites(ir.load(gpu_bundle / "model.onnx"))
    assert not found.refused and len(found.sites) == 2
    for site in found.sites.values():
        assert dataclasses.replace(site, attributes={}) == SITE
        assert (site.attributes["left_window_size"], site.attributes["is_causal"]) == (8, 0)
    inputs = {site.inputs for site in graph_sites(ir.load(longformer_bundle / "model.onnx")).sites.values()}
    assert inputs == {("Q", "K", "V", "attn_mask", "global_mask", "global_Q", "global_K", "global_V")}


NODE = """<ir_version: 10, opset_import: ["" : 21, "longspan" : 1]>
graph ({types}) => ({outputs}) {{
    {outputs_names} = longspan.{call}
}}"""


def _graph(types: str, call: str, outputs: str = "Y") -> ir.Model:
    text = NODE.format(types=types, call=call, outputs="float Y", outputs_names=outputs)
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def test_four_axes_lists_and_outputs_are_understood() -> None:
    lists = "int32[1,1,n] c, int32[1,1,n,w] i, int32[1,{},n] fc, int32[1,1,n,w] fi"
    call = "BlockSparseAttention <is_causal: int = 1> (q, k, v, c, i, fc, fi)"
    types = "float16[B,8,S,64] q, float16[B,2,T,64] k, float16[B,2,T,32] v, "
    for second, per_head in ((1, False), (8, True), ("H", True)):
        (site,) = graph_sites(_graph(types + lists.format(second), call, "Y, lse")).sites.values()
        assert (site.heads, site.kv_heads, site.head_size, site.v_head_size) == (8, 2, 64, 32)
        assert (site.dtype, site.lse, site.lists_per_head) == ("float16", True, per_head)
        assert site.attributes == {"is_causal": 1}


REFUSED = {
    "H_q is unknown": ("float[B,h,S,64] q, float[B,2,S,64] k, float[B,2,S,64] v", ""),
    "how many axes its K has": ("float[B,2,S,64] q, float k, float[B,2,S,64] v", ""),
    "of double": ("double[B,2,S,64] q, double[B,2,S,64] k, double[B,2,S,64] v", ""),
    "its H_q is unknown": ("float[B,S,128] q, float[B,S,128] k, float[B,S,128] v", ""),
    "D_v is unknown": (
        "float[B,S,128] q, float[B,S,128] k, float[B,S,w] v",
        "<q_num_heads: int = 2, kv_num_heads: int = 2>",
    ),
    "head size of 512: GPU kernels go up to 256": ("float[B,2,S,512] q, float[B,2,S,512] k, float[B,2,S,64] v", ""),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_site_without_kernel_says_why(reason: str) -> None:
    types, attributes = REFUSED[reason]
    model = _graph(types, f"SlidingWindowAttention {attributes} (q, k, v)")
    found = graph_sites(model)
    assert not found.sites
    (said,) = found.refused.values()
    assert reason in said
    with pytest.raises(InvalidRequest, match="no site has a GPU kernel"):
        add_kernels(model, targets_of("sm_80"))


def test_sites_are_described_by_hand() -> None:
    wanted = Wanted(
        ["sliding-window-attention", "BlockSparseAttention"], ["float16", "bfloat16"], [(64, 64), (96, 32)], [1, 4],
        ["attn_mask", "causal", "softcap", "lse", "tf32"], {"dilation": [2], "q_block_size": 64},
    )  # fmt: skip
    sites = wanted.sites()
    assert len({(s.operator, s.dtype, s.head_size, s.v_head_size, s.group) for s in sites}) == len(sites) == 16
    window, lists = sites[0], sites[-1]
    assert window.inputs == ("Q", "K", "V", "attn_mask") and window.lse and window.allow_tf32
    assert window.attributes == {"dilation": [2], "is_causal": 1, "softcap": 1.0}
    assert lists.attributes == {"q_block_size": 64, "is_causal": 1, "softcap": 1.0} and lists.group == 4
    per_head = Wanted(["SlidingWindowAttention"], ["float16"], [(8, 8)], [2], [], {"dilation": [1, 1, 2, 2]}).sites()
    assert (per_head[0].heads, per_head[0].kv_heads) == (4, 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"operators": ["Attention"]}, "--operator Attention: no such operator; allowed: SlidingWindowAttention"),
        ({"dtypes": ["float64"]}, "float64: GPU kernels compute in float16"),
        ({"head_sizes": [(300, 64)]}, "head size of 300"),
        ({"features": ["sink"]}, "--features sink: SlidingWindowAttention has no such feature; allowed: attn_mask"),
        ({"features": ["exclude_self"]}, "no such feature"),
        ({"groups": [3], "attributes": {"dilation": [1, 2]}}, "2 query heads: not a multiple of --group 3"),
    ],
)
def test_descriptions_that_fit_no_kernel_are_refused(changes: dict[str, Any], reason: str) -> None:
    good: dict[str, Any] = {"operators": ["SlidingWindowAttention"], "dtypes": ["float16"], "head_sizes": [(64, 64)]}
    with pytest.raises(InvalidRequest, match=reason):
        Wanted(**{**good, **changes}).sites()


def test_without_triton_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    with pytest.raises(EnvironmentLacks, match=r"pip install 'longspan\[gpu\]'"):
        export(SourceRequest("no such model"), tmp_path / "out", gpu=targets_of("sm_80"))
    with pytest.raises(EnvironmentLacks):
        compile_pack([SITE], targets_of("sm_80"))


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(site: KernelSite, target: Target) -> Recipe:
        recipe = recipe_for(site, target)
        variant = dataclasses.replace(recipe.variants[0], function="gpu.tile:no_such_kernel")
        paths = (dataclasses.replace(recipe.paths[-1], kernels=(variant,)),)
        return dataclasses.replace(recipe, paths=paths)

    pytest.importorskip("triton")
    monkeypatch.setattr("longspan.exporter.kernel_packs.recipe_for", broken)
    with pytest.raises(ExportFailed, match=r"no_such_kernel_fp32.* does not compile: AttributeError"):
        compile_pack([SITE], targets_of("sm_80", ptx=False))


def test_damaged_packs_and_bundles_without_one_are_refused(
    gpu_bundle: Path, longformer_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "some.pack"
    file.write_bytes(pack().to_bytes()[:-1])
    with pytest.raises(BundleCorrupted, match=r"some\.pack: is \d+ bytes long, .* compile it again"):
        open_pack(file)
    with pytest.raises(InvalidRequest, match="has no GPU kernels; next step: export it with --gpu-arch"):
        open_pack(longformer_bundle)
    with pytest.raises(InvalidRequest, match="no such folder"):
        open_pack(tmp_path / "none")
    with pytest.raises(BundleCorrupted, match="not an ONNX file"):
        embedded_pack(file)
    file.write_bytes(embedded_pack(gpu_bundle / "model.onnx") or b"")
    assert hashlib.sha256(open_pack(file).to_bytes()).digest() == hashlib.sha256(file.read_bytes()).digest()


def test_costs_are_those_of_the_two_products() -> None:
    work = cost_of_recipe(recipe(), Execution(length=100, batch=3, heads=5, window=4))
    # Two heads by the recipe's dilations (1, 2): 100 rows of 9 keys, less those beyond the ends.
    pairs = 3 * ((900 - 20) + (900 - 2 * 2 * (1 + 2 + 3 + 4)))
    assert (work.pairs, work.flops) == (pairs, 2 * pairs * 16)
    assert work.bytes == 2 * 3 * 100 * 16 * (2 + 1)
    uniform = recipe(match=(*recipe().match[:3], ("is_causal", (1,)), ("softcap", (0,)), ("dilation", (1,))))
    assert cost_of_recipe(uniform, Execution(100, 1, 5, None)).pairs == 10 * 100 * 101 // 2
    match = (("D", (8,)), ("D_v", (8,)), ("group", (2,)), ("is_causal", (0,)), ("exclude_self", (0,)))
    lists = dataclasses.replace(recipe(), operator="BlockSparseAttention", match=match)
    assert cost_of_recipe(lists, Execution(100, 1, 5, None, density=0.25)).pairs == 10 * 2500


def test_bounds_are_by_the_slower_of_the_two_peaks() -> None:
    work = cost_of_recipe(recipe(), Execution(length=4096, window=2048))
    peak = PEAKS[90]
    fast = bound(recipe(), work, 90)
    assert fast.limited_by == "compute" and fast.seconds == pytest.approx(work.flops / peak.half)
    assert fast.ridge == pytest.approx(peak.half / peak.bandwidth)
    single = dataclasses.replace(recipe(), dtype="float32")
    assert bound(single, work, 90).seconds == pytest.approx(work.flops / peak.single)
    assert bound(single, work, 90, tf32=True).seconds == pytest.approx(2 * fast.seconds)
    little = cost_of_recipe(recipe(), Execution(length=4096, window=1))
    slow = bound(recipe(), little, 90)
    assert slow.limited_by == "memory" and slow.seconds == pytest.approx(little.bytes / peak.bandwidth)
    assert set(PEAKS) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, 16), ({"architecture": 86}, 12), ({"registers": 255}, 2), ({"registers": 128}, 4),
        ({"shared": 101376 - 1024, "architecture": 86}, 1), ({"shared": 40 * 1024}, 4),
        ({"threads": 256, "registers": 32}, 8),
    ],
)  # fmt: skip
def test_blocks_that_fit_a_multiprocessor(changes: dict[str, Any], blocks: int) -> None:
    assert resident_blocks(kernel(**{"registers": 32, **changes})) == blocks


def test_kernels_are_found_by_the_beginning_of_their_names() -> None:
    names = ("forward_a", "forward_b", "merge")
    recipes = (recipe(paths=(path(launches=(0, 1, 2)),)),)
    content = Pack("compiler 1", tuple(kernel(name) for name in names), recipes)
    found = kernel_reports(content, Execution(), "forward")
    assert [report.kernel.name for report in found] == ["forward_a", "forward_b"] and found[0].main
    assert len(kernel_reports(content, Execution())) == 3
    with pytest.raises(InvalidRequest, match="no kernel is called backward; there are: forward_a, forward_b, merge"):
        kernel_reports(content, Execution(), "backward")


@pytest.mark.parametrize("bad", [{"length": 0}, {"batch": -1}, {"heads": 0}, {"window": -2}, {"density": 0.0}])
def test_sizes_that_cannot_be_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"--{next(iter(bad))} "):
        Execution(**bad)
