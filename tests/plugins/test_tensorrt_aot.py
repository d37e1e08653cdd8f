"""Ahead-of-time plugins for TensorRT: what its own bindings make of them, and what their kernels compute."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from longspan.plugins.gpu import launch
from longspan.plugins.gpu.pack_build import PTX, Target
from longspan.plugins.gpu.tuning import SHARED_MEMORY
from longspan.plugins.gpu.variants import KernelSite, NoKernel, Recipe
from longspan.plugins.tensorrt import aot, ptx
from longspan.plugins.tensorrt.aot_record import AotPlugin, InvalidRecord
from longspan.plugins.tensorrt.aot_variants import SHARED_LIMIT, aot_recipes, architecture_for

from . import aot_cases
from .aot_builder import Answer, bindings_folder, build_stand_in, played, value_of
from .aot_interpreted import dtypes, operands
from .interpreted import OPERATORS
from .test_triton_compiled import LISTS, WINDOW, stack_bytes
from .test_triton_interpreted import assert_close

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
INTERPRETED = [(operator, case.name) for operator, case, _ in aot_cases.interpreted()]
ELIGIBLE = {(operator, case.name): (case, layout) for operator, case, layout in aot_cases.eligible()}
# Cases whose kernels are compiled: each has optional inputs or axes that others lack.
BUILT = (
    ("SlidingWindowAttention", "plain"),
    ("SlidingWindowAttention", "dilation per head"),
    ("SlidingWindowAttention", "bias for all"),
    ("SlidingWindowAttention", "sink and nothing else"),
    ("SlidingWindowAttention", "offsets"),
    ("SlidingWindowAttention", "spans"),
    ("BlockSparseAttention", "every block"),
    ("BlockSparseAttention", "lists of their own for all"),
    ("BlockSparseAttention", "bias per head"),
    ("BlockSparseAttention", "everything"),
)
LENGTHS = ((1, 1, 1), (2, 19, 19), (3, 1, 64), (1, 130, 70), (5, 33, 300))
"""Batches, queries and keys that every expression is evaluated for."""


def eligible_case(operator: str, name: str) -> tuple[Any, str]:
    """A case and the layout that it is tested in; "everything" has masks of whole words here."""
    if (operator, name) == ("BlockSparseAttention", "everything"):
        case = next(each for each in OPERATORS[operator].CASES if each.name == name)
        return dataclasses.replace(case, tall=6, wide=12), "bsd"
    return ELIGIBLE[operator, name]


@cache
def plugin(operator: str, name: str, dtype: str = "float16") -> AotPlugin:
    """The compiled plugin of a case."""
    case, layout = eligible_case(operator, name)
    return aot.compile_plugin(aot_cases.site(operator, case, layout, dtype), layout, 80)


def recipe_of(operator: str, name: str, entry: str) -> Recipe:
    """The recipe of a compiled kernel."""
    case, layout = eligible_case(operator, name)
    ways = aot_recipes(aot_cases.site(operator, case, layout, "float16"), layout, 80)
    return next(recipe for way in ways for recipe in way if aot.entry_name(recipe.variants[0]) == entry)


def shapes_at(operator: str, name: str, lengths: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of a case's inputs for a batch, queries and keys."""
    case, layout = eligible_case(operator, name)
    return aot_cases.stretched(operator, case, layout, *lengths)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the stand-in for TensorRT's libraries."""
    bindings_folder()
    folder = tmp_path_factory.mktemp("tensorrt")
    build_stand_in(folder)
    return folder


@pytest.fixture(scope="module")
def answers(stand_in: Path) -> dict[tuple[str, str], Answer]:
    """What the bindings hand to the builder, for lengths that the profile leaves open."""
    requests = []
    for operator, name in BUILT:
        ends = (aot_cases.network_shapes(operator, shapes_at(operator, name, LENGTHS[end])) for end in (0, -1))
        requests.append((plugin(operator, name), list(zip(*ends, strict=True))))
    return dict(zip(BUILT, played(stand_in, requests), strict=True))


@pytest.mark.parametrize(("operator", "name"), BUILT)
def test_bindings_take_the_plugin(operator: str, name: str, answers: dict[tuple[str, str], Answer]) -> None:
    made, answer = plugin(operator, name), answers[operator, name]
    assert answer.failed == "", answer.said
    assert answer.interface == "PLUGIN_V3QUICKAOT_BUILD"
    assert answer.fields == 0  # attributes are compiled in
    assert len(answer.supported) == len(made.operands) + len(made.results)
    kinds = {"FP32": 0, "FP16": 1, "BF16": 7, "INT32": 3, "INT64": 8, "BOOL": 4}
    assert answer.supported == tuple((kinds[kind], 0) for kind in made.types)
    assert [kind for kind, _ in answer.outputs] == [kinds[kind] for kind in made.types[len(made.operands) :]]
    assert list(answer.tactics) == list(range(1, len(made.kernels) + 1))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("operator", "name"), BUILT)
def test_output_shapes_are_the_definitions(
    operator: str, name: str, lengths: tuple[int, int, int], answers: dict[tuple[str, str], Answer]
) -> None:
    case, layout = eligible_case(operator, name)
    given = shapes_at(operator, name, lengths)
    expected = aot_cases.shapes_of(operator, given, case.node_attributes(layout))
    network = aot_cases.network_shapes(operator, given)
    y, lse = (tuple(value_of(each, network) for each in shape) for _, shape in answers[operator, name].outputs)
    assert (y, lse) == (expected.output, expected.lse)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("operator", "name"), BUILT)
def test_launches_are_those_that_the_launcher_plans(
    operator: str, name: str, lengths: tuple[int, int, int], answers: dict[tuple[str, str], Answer]
) -> None:
    case, layout = eligible_case(operator, name)
    given = shapes_at(operator, name, lengths)
    shapes = aot_cases.shapes_of(operator, given, case.node_attributes(layout))
    network = aot_cases.network_shapes(operator, given)
    for tactic, (entry, parameters, numbers, code) in answers[operator, name].tactics.items():
        kernel = plugin(operator, name).kernels[tactic - 1]
        recipe = recipe_of(operator, name, entry)
        planned, variant = launch.plan(recipe, shapes, given, 8, None), recipe.variants[0]
        grid = tuple(value_of(each, network) for each in parameters[:3])
        assert grid == planned.grid(variant)
        assert parameters[3:] == (str(kernel.threads), "1", "1", str(kernel.shared))
        assert (entry, code) == (kernel.entry, kernel.ptx)
        passed = {parameter.meaning: parameter for parameter in variant.parameters if parameter.type == "i32"}
        expected = [launch.argument(planned, meaning, {}) for meaning in passed]
        assert [value_of(each, network) for each in numbers] == expected
        assert max(expected) < 2**31


@pytest.mark.parametrize(("operator", "name"), BUILT)
def test_grid_is_that_of_the_operators_own_kernel(operator: str, name: str) -> None:
    """The launch that packs have for the same tile on the path without splits, less what only they need."""
    from longspan.plugins.block_sparse_attention import triton_variants as lists
    from longspan.plugins.gpu.tiles import Tile
    from longspan.plugins.sliding_window_attention import triton_variants as window

    case, layout = eligible_case(operator, name)
    site = aot_cases.site(operator, case, layout, "float16")
    for recipe in (recipe for way in aot_recipes(site, layout, 80) for recipe in way):
        mine = recipe.variants[0]
        constants = mine.constexprs
        tile = Tile(constants["BLOCK_M"], constants["BLOCK_N"], mine.num_warps, mine.num_stages)
        theirs = (window if operator == "SlidingWindowAttention" else lists).recipe(site, 80, (tile, tile), 0)
        own = theirs.paths[-1].kernels[-1]
        given = shapes_at(operator, name, LENGTHS[-1])
        shapes = aot_cases.shapes_of(operator, given, case.node_attributes(layout))
        plans = [launch.plan(each, shapes, given, 8, None) for each in (recipe, theirs)]
        assert plans[0].path.buffers == ()
        assert plans[0].grid(mine) == plans[1].grid(own)
        shared = {p.meaning for p in own.parameters} & {p.meaning for p in mine.parameters}
        for meaning in (each for each in shared if each.startswith(("size:", "stride:"))):
            assert launch.argument(plans[0], meaning, {}) == launch.argument(plans[1], meaning, {})
        assert {c.name: c.value for c in own.constants if c.name in constants} == {
            c.name: constants[c.name] for c in own.constants if c.name in constants
        }


@pytest.mark.parametrize(("operator", "name"), BUILT)
def test_kernels_have_the_parameters_that_tensorrt_passes(operator: str, name: str, tmp_path: Path) -> None:
    made = plugin(operator, name)
    assert 1 <= len(made.kernels) <= 2
    for kernel in made.kernels:
        expected = [8] * len(made.operands) + [4] * len(kernel.numbers) + [8] * len(made.results)
        assert [parameter.bytes for parameter in ptx.parameters(kernel.ptx, kernel.entry)] == expected
        used = {int(number) for number in re.findall(rf"{kernel.entry}_param_(\d+)", kernel.ptx)}
        assert max(used) < len(expected)
        assert 0 < kernel.shared <= SHARED_LIMIT
        assert re.search(rf"^\.reqntid {kernel.threads}$", kernel.ptx, re.MULTILINE)
        assert "global_scratch" not in kernel.ptx
        _assemble(kernel.ptx, "sm_80", tmp_path)


def _assemble(text: str, architecture: str, folder: Path) -> bytes:
    """Machine code of PTX, by the assembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    source, out = folder / "kernel.ptx", folder / "kernel.out"
    source.write_text(text)
    command = [str(tool), f"-arch={architecture}", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out.read_bytes()


SITES = {
    "window": KernelSite("SlidingWindowAttention", "bfloat16", 64, 64, 12, 12, ("Q", "K", "V"), WINDOW),
    "wide heads": KernelSite(
        "SlidingWindowAttention", "float16", 256, 256, 8, 2, ("Q", "K", "V", "sinks"),
        {"left_window_size": 4095, "right_window_size": 0, "is_causal": 1},
    ),
    "edited scores": KernelSite(
        "SlidingWindowAttention", "float16", 64, 64, 8, 8, ("Q", "K", "V", "attn_mask", "band_bias", "sinks"),
        {**WINDOW, "softcap": 30.0},
    ),
    "blocks": KernelSite(
        "BlockSparseAttention", "bfloat16", 64, 64, 12, 12, ("Q", "K", "V", *LISTS, "block_mask_ids", "block_masks"),
        {"q_block_size": 64, "kv_block_size": 64}, lists_per_head=False,
    ),
}  # fmt: skip


# What kernels of packs spill too; tall tiles of edited scores use every register.
SPILLS = {"wide heads": 64, "edited scores": 136}


@pytest.mark.parametrize(
    ("name", "architecture"), [*itertools.product(SITES, (80, 90, 120)), ("edited scores", 100)]
)  # fmt: skip
def test_compiled_on_several_architectures(name: str, architecture: int, tmp_path: Path) -> None:
    made = aot.compile_plugin(SITES[name], "bhsd", architecture)
    for kernel in made.kernels:
        assert kernel.shared <= min(SHARED_LIMIT, SHARED_MEMORY[architecture][0] * 1024)
        target = re.search(r"^\.target (sm_\d+a?)$", kernel.ptx, re.MULTILINE)
        assert target is not None
        assert target[1].startswith(f"sm_{architecture}")
        assert re.search(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", kernel.ptx)
        assert "cp.async" in kernel.ptx
        spilled, local = stack_bytes(_assemble(kernel.ptx, target[1], tmp_path), tmp_path)
        assert local == 0
        assert spilled <= SPILLS.get(name, 16)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results of every case, from one process for all."""
    out = tmp_path_factory.mktemp("aot") / "results.npz"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.plugins.aot_interpreted", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=900)
    with np.load(out) as arrays:
        return {tuple(key.split("\t")): array for key, array in arrays.items()}


@pytest.mark.parametrize(("operator", "name"), INTERPRETED)
def test_kernel_agrees_with_the_reference(operator: str, name: str, interpreted: Any) -> None:
    case, layout = ELIGIBLE[operator, name]
    for dtype in dtypes(case):
        result = {kind: interpreted[operator, name, dtype, kind] for kind in ("y", "lse")}
        assert_close(result, operator, operands(case, layout, dtype), case.node_attributes(layout), dtype)


def test_a_profile_that_the_kernel_cannot_count_is_refused_by_name(stand_in: Path) -> None:
    made = plugin("SlidingWindowAttention", "plain")
    wrong = {
        "begins at 1 sequences of 0 queries": [((1, 2, 0, 8), (1, 2, 9, 8)), *[((1, 2, 1, 8), (1, 2, 9, 8))] * 2],
        "ends at S_q + S_k = 1073741824": [((1, 2, 1, 8), (1, 2, 2**29, 8))] * 3,
        "axis 1 of K is 1; its kernel was compiled for 2": [((1, heads, 9, 8),) * 2 for heads in (2, 1, 2)],
        "axis 3 of Q is 16": [((1, 2, 9, 16),) * 2] * 3,
        "Q has 3 axes; expected layout bhsd": [((1, 9, 16),) * 2] * 3,
    }  # fmt: skip
    for text, bounds in wrong.items():
        answer = played(stand_in, [(made, bounds)])[0]
        assert answer.failed in ("getOutputDataTypes", "getOutputShapes", "getLaunchParams")
        assert text in answer.said


def test_another_type_is_refused(stand_in: Path) -> None:
    made = dataclasses.replace(plugin("SlidingWindowAttention", "plain"), name="other_types", types=("FP32",) * 5)
    shifted = dataclasses.replace(made, types=("FP32", "FP16", "FP32", "FP32", "FP32"))
    bounds = [((1, 2, 9, 8),) * 2] * 3
    assert played(stand_in, [(made, bounds)])[0].failed == ""
    _, answer = played(stand_in, [(made, bounds), (shifted, bounds)])  # the first definition of a name stays
    assert answer.failed == "getOutputDataTypes"
    assert "K is DataType.HALF; its kernel was compiled for FP32" in answer.said


def test_plugins_of_a_model_are_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plugin("SlidingWindowAttention", "plain")
    defined: list[str] = []
    monkeypatch.setattr("longspan.plugins.tensorrt.aot_definition.plugin_module", lambda tensorrt: None)
    monkeypatch.setattr(
        "longspan.plugins.tensorrt.aot_definition.define", lambda tensorrt, module, each: defined.append(each.name)
    )
    node = onnx.helper.make_node(
        made.name, ["q", "k", "v"], ["y", "lse"], domain="longspan", **aot.node_attributes(made)
    )
    later = onnx.helper.make_node(made.name, ["y", "k", "v"], ["z", ""], domain="longspan", plugin_namespace="longspan")
    file = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node, later], "two", [], [])), file)
    assert aot.register_plugins(SimpleNamespace(__version__="11.4.0.106"), file) == (made,)
    assert defined == [made.name]
    with pytest.raises(aot.NoAotPlugin, match=r"11\.2"):
        aot.register_plugins(SimpleNamespace(__version__="11.2.1.2"), file)


def test_tensorrt_rtx_has_no_such_plugins() -> None:
    """Its wheels name a module ``plugin`` that they do not bring, and its networks take no plugin layer."""
    rtx = pytest.importorskip("tensorrt_rtx")
    from longspan.plugins.tensorrt.aot_definition import plugin_module

    with pytest.raises(aot.NoAotPlugin, match="tensorrt_rtx"):
        plugin_module(rtx)
    assert not [name for name in dir(rtx.INetworkDefinition) if "plugin" in name]


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("10.14.1.48", "does not run ahead-of-time plugins reliably"),
        ("11.2.1.2", "4849"),
        ("11.3.0.1", ""),
        ("11.4.0.106", ""),
        ("12.0", ""),
        ("", "next step"),
    ],
)
def test_versions(version: str, reason: str) -> None:
    assert (reason in aot.unsupported(version)) and bool(aot.unsupported(version)) == bool(reason)


def test_sites_that_one_kernel_does_not_execute() -> None:
    globals_ = dataclasses.replace(SITES["window"], inputs=("Q", "K", "V", "global_mask"))
    with pytest.raises(NoKernel, match="rows of global tokens"):
        aot_recipes(globals_, "bhsd", 80)
    wide = dataclasses.replace(SITES["window"], dtype="float32", head_size=256, v_head_size=256)
    with pytest.raises(NoKernel, match="head size 256 in float32: no tile fits the 48 KiB"):
        aot_recipes(wide, "bhsd", 80)
    odd = dataclasses.replace(SITES["blocks"], attributes={"q_block_size": 5, "kv_block_size": 3})
    with pytest.raises(NoKernel, match="has 5 bytes"):
        aot_recipes(odd, "bhsd", 80)
    with pytest.raises(NoKernel, match="sm_75"):
        aot_recipes(SITES["window"], "bhsd", 75)
    with pytest.raises(ValueError, match="bshd"):
        aot_recipes(SITES["window"], "bshd", 80)


def test_a_kernel_that_takes_more_than_it_should_gives_way_to_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tall, _ = aot_recipes(SITES["window"], "bhsd", 80)
    assert len(tall) > 1
    names = [aot.entry_name(recipe.variants[0]) for recipe in tall]
    too_large = {names[0]}

    def compiled(variant: Any) -> tuple[str, str, int, int]:
        name = aot.entry_name(variant)
        return name, "", 128, SHARED_LIMIT + (name in too_large)

    monkeypatch.setattr(aot, "_compiled", compiled)
    assert aot.compile_plugin(SITES["window"], "bhsd", 80).kernels[0].entry == names[1]
    too_large.update(names)
    with pytest.raises(NoKernel, match="49153 bytes"):
        aot.compile_plugin(SITES["window"], "bhsd", 80)


def test_one_ptx_serves_all_that_an_engine_is_for() -> None:
    assert architecture_for([Target(90)]) == 90
    assert architecture_for([Target(89), Target(90)]) == 80
    assert architecture_for([PTX]) == 80


def test_nodes_that_differ_are_different_plugins() -> None:
    changes: list[dict[str, Any]] = [
        {}, {"attributes": {**WINDOW, "left_window_size": 255}}, {"attributes": {**WINDOW, "scale": 0.5}},
        {"heads": 24, "kv_heads": 24}, {"lse": True}, {"inputs": ("Q", "K", "V", "sinks")}, {"dtype": "float16"},
        {"attributes": {**WINDOW, "softcap": 30.0}}, {"attributes": {**WINDOW, "softcap": 31.0}},
    ]  # fmt: skip
    sites = [dataclasses.replace(SITES["window"], **change) for change in changes]
    names = {aot.plugin_name(site, layout, 80) for site in sites for layout in ("bhsd", "bsd")}
    assert len(names) == 2 * len(sites)
    assert len(names | {aot.plugin_name(SITES["window"], "bhsd", 90)}) == 2 * len(sites) + 1


def test_records_survive_json() -> None:
    made = plugin("BlockSparseAttention", "everything")
    assert AotPlugin.from_json(made.to_json()) == made
    for text in ("", "[]", "{}", '{"version": 1}', made.to_json().replace('"entry"', '"entrance"')):
        with pytest.raises(InvalidRecord):
            AotPlugin.from_json(text)
    with pytest.raises(InvalidRecord, match="version 2"):
        AotPlugin.from_json(made.to_json().replace('"version": 1', '"version": 2'))


_PTX = """
.visible .entry add(
	.param .u64 .ptr .global .align 1 add_param_0,
	.param .u32 add_param_1,
	.param .u64 .ptr .global .align 1 add_param_2
)
{
	ld.param.b64 	%rd1, [add_param_0];
	{use}
	ret;
}
"""


def test_parameters_that_are_not_passed_are_dropped() -> None:
    unused = _PTX.replace("{use}", "ld.param.b32 	%r1, [add_param_1];")
    kept = ptx.drop_trailing(unused, "add", [8, 4])
    assert [(p.name, p.bytes) for p in ptx.parameters(kept, "add")] == [("add_param_0", 8), ("add_param_1", 4)]
    assert ptx.drop_trailing(kept, "add", [8, 4]).split() == kept.split()
    assert kept.partition("{")[2] == unused.partition("{")[2]
    again = ptx.renamed(kept, "add", "sum")
    assert [p.name for p in ptx.parameters(again, "sum")] == ["sum_param_0", "sum_param_1"]
    assert "[sum_param_1]" in again


@pytest.mark.parametrize(
    ("text", "sizes", "reason"),
    [
        (_PTX.replace("{use}", "ld.param.b64 %rd2, [add_param_2];"), [8, 4], "uses add_param_2"),
        (_PTX.replace("{use}", "mov.b64 %rd2, add_param_2;"), [8, 4], "uses add_param_2"),
        (_PTX, [8, 8], r"parameters of \[8, 4\] bytes"),
        (_PTX, [8, 4, 8, 8], "the launcher passes"),
        (_PTX.replace(".u32", ".v2 .u32"), [8, 4], "only numbers and pointers"),
        (_PTX + _PTX, [8, 4], "expected add alone"),
        (_PTX.replace("add(", "sub("), [8, 4], "the kernels sub"),
        ("", [8], "none"),
    ],
)  # fmt: skip
def test_ptx_that_cannot_be_cut_is_refused(text: str, sizes: list[int], reason: str) -> None:
    with pytest.raises(ptx.UnusablePtx, match=reason):
        ptx.drop_trailing(text, "add", sizes)
