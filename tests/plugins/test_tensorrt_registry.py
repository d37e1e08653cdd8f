"""The plugin library in the real plugin registry of TensorRT-RTX, in a process of its own: it takes no GPU to ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from longspan.plugins import operators, plugin_library_major
from longspan.plugins.tensorrt.headers import find_headers

from .cuda_programs import build
from .packs import pack
from .registry_process import ask, chars

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
MAJORS = sorted(find_headers())
if not MAJORS:
    pytest.skip("no headers of TensorRT: install kernel-lens", allow_module_level=True)

WINDOW: dict[str, Any] = {
    "left_window_size": ("INT32", [31]), "is_causal": ("INT32", [1]), "dilation": ("INT32", [1, 2]),
    "q_num_heads": ("INT32", [2]), "kv_num_heads": ("INT32", [1]), "scale": ("FLOAT32", [0.25]),
    "operands": chars("Q", "K", "V", "attn_mask"), "results": chars("Y"),
    "kernel_pack": ("INT8", pack().to_bytes().hex()),
}  # fmt: skip
BLOCKS: dict[str, Any] = {
    "q_block_size": ("INT32", [16]), "kv_block_size": ("INT32", [32]), "softcap": ("FLOAT32", [30.0]),
    "operands": chars("Q", "K", "V", "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    "results": chars("Y", "lse"),
}  # fmt: skip


@pytest.mark.parametrize("major", MAJORS)
def test_creators_and_plugins(major: int) -> None:
    answer = ask(major, ("SlidingWindowAttention", "BUILD", WINDOW), ("BlockSparseAttention", "BUILD", BLOCKS))
    assert sorted(answer["creators"]) == sorted(definition.name for definition in operators())
    for definition in operators():
        version, fields = answer["creators"][definition.name]
        assert version == "1"
        kinds = {"int": "INT32", "ints": "INT32", "float": "FLOAT32"}
        expected = {attribute.name: kinds[attribute.kind] for attribute in definition.attributes}
        assert fields == expected | {"operands": "CHAR", "results": "CHAR", "kernel_pack": "INT8"}
    window, blocks = answer["plugins"]
    for name, outputs, given in (("SlidingWindowAttention", 1, window), ("BlockSparseAttention", 2, blocks)):
        made = given["made"]
        assert (made["name"], made["version"], made["namespace"]) == (name, "1", "longspan")
        assert made["interfaces"] == ["PLUGIN_V3ONE_CORE", "PLUGIN_V3ONE_BUILD", "PLUGIN_V3ONE_RUNTIME"]
        assert made["outputs"] == outputs
        assert made["metadata"].startswith(f"{name}(Q,K,V,")
        assert not given["said"]
    assert "left_window_size=31" in window["made"]["metadata"] and "dilation=(1, 2)" in window["made"]["metadata"]


@pytest.mark.parametrize("major", MAJORS)
def test_clones_and_what_an_engine_keeps(major: int) -> None:
    answer = ask(major, ("SlidingWindowAttention", "BUILD", WINDOW), ("BlockSparseAttention", "BUILD", BLOCKS))
    for definition, given, fields in zip(operators(), answer["plugins"], (WINDOW, BLOCKS), strict=True):
        lines = given["trip"].splitlines()
        same = f" longspan::{definition.name} 1 {given['made']['id']}"
        assert lines[0] == "made" + same and lines[1] == "clone" + same and lines[-1] == "recreated" + same
        saved = {line.split()[1]: int(line.split()[3]) for line in lines[2:-1]}
        always = {attribute.name for attribute in definition.attributes if attribute.default is not None}
        assert saved.keys() == always | fields.keys() | {"operands", "results"}
        for key, (kind, value) in fields.items():
            assert saved[key] == (len(value) // 2 if kind in ("CHAR", "INT8") else len(value))


@pytest.mark.parametrize("major", MAJORS)
def test_an_engine_is_read_by_the_registry(major: int) -> None:
    saved = WINDOW | {"type": chars("float16")}
    read, built, refused = ask(major, ("SlidingWindowAttention", "RUNTIME", saved),
                               ("SlidingWindowAttention", "BUILD", WINDOW),
                               ("SlidingWindowAttention", "BUILD", saved))["plugins"]  # fmt: skip
    assert read["made"] == built["made"]
    assert refused["made"] is None


REFUSALS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"operands": chars("Q", "K")}, "field operands lacks V, which is required"),
    ({"operands": chars("Q", "K", "V", "mask")}, "field operands names 'mask'; allowed: Q, K, V, attn_mask"),
    ({"left_window_size": ("FLOAT32", [31.0])}, "field left_window_size is 1 of FLOAT32: must be 1 of INT32"),
    ({"left_window_size": ("INT32", [-2])}, "left_window_size = -2: must be -1 (unbounded), 0 or positive"),
    ({"windows": ("INT32", [1])}, "unknown field 'windows'; allowed: left_window_size, right_window_size"),
    ({"kernel_pack": ("INT8", "0102")}, "field kernel_pack is 2 bytes long, less than the header"),
)


@pytest.mark.parametrize("major", MAJORS)
def test_wrong_fields_are_refused_with_a_message(major: int) -> None:
    answer = ask(major, *(("SlidingWindowAttention", "BUILD", WINDOW | change) for change, _ in REFUSALS))
    for given, (_, message) in zip(answer["plugins"], REFUSALS, strict=True):
        assert given["made"] is None
        # TensorRT-RTX 1.7 has the interfaces of TensorRT 11: a library for 10 finds no logger there, and uses stderr.
        said = "".join(given["said"]) if major >= 11 else answer["stderr"]
        assert f"longspan SlidingWindowAttention 'node': {message}" in said


@pytest.mark.parametrize("major", MAJORS)
def test_the_file_tells_its_version(major: int) -> None:
    assert plugin_library_major(build(f"longspan_trt{major}") / f"liblongspan_trt{major}.so") == major


@pytest.mark.parametrize("major", MAJORS)
def test_nothing_is_linked_and_nothing_else_visible(major: int) -> None:
    library = Path(build(f"longspan_trt{major}") / f"liblongspan_trt{major}.so").read_bytes()
    for foreign in (b"libnvinfer", b"libcudart", b"libstdc++.so"):
        assert foreign not in library
