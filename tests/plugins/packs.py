"""Kernel packs for tests: a made-up one, which needs no compiler, and the way to damage a pack on purpose."""

from __future__ import annotations

import hashlib
import re
import struct

from longspan.plugins.gpu.pack import Pack, PackedKernel, PackedPath, PackedRecipe
from longspan.plugins.gpu.variants import Buffer, Parameter

INDEX_START = 64


def kernel(name: str = "forward", form: str = "cubin", **changes: object) -> PackedKernel:
    """A kernel with a parameter of every kind."""
    parameters = (
        Parameter("q", "*fp16", "input:Q", 16),
        Parameter("mask", "*u8", "input:attn_mask", 16),
        Parameter("parts", "*fp32", "buffer:parts", 16),
        Parameter("y", "*fp16", "output:Y", 16),
        Parameter("rows", "i32", "size:S_q tiles *"),
        Parameter("q_row", "i64", "stride:Q.row", 8),
        Parameter("mask_batch", "i64", "stride:attn_mask.0"),
        Parameter("left", "i32", "attribute:left_window_size"),
        Parameter("scale", "fp32", "scalar:scale"),
    )
    code = b"\x7fELF" + bytes(range(40)) if form == "cubin" else b".version 8.7\n.target sm_80\n"
    facts: dict[str, object] = {
        "name": name, "architecture": 80, "form": form, "entry": "forward", "threads": 128, "shared": 1024,
        "registers": 64, "stack": 0, "dtype": "float16", "head_size": 8, "v_head_size": 8, "stages": 2,
        "function": "package.module:forward", "features": ("attn_mask",),
        "constants": (("BLOCK_M", "16"), ("lse", "none")), "parameters": parameters,
        "grid": ("tiles H_kv * B *", "1", "1"), "code": code,
    }  # fmt: skip
    return PackedKernel(**{**facts, **changes})  # type: ignore[arg-type]


def path(**changes: object) -> PackedPath:
    """A path that launches kernel 0."""
    facts: dict[str, object] = {
        "name": "whole", "condition": "1", "sizes": (("tiles", "S_q 16 cdiv"),),
        "buffers": (Buffer("parts", "fp32", "tiles B * 8 *", True),), "launches": (0,),
    }  # fmt: skip
    return PackedPath(**{**facts, **changes})  # type: ignore[arg-type]


def recipe(form: str = "cubin", **changes: object) -> PackedRecipe:
    """A recipe of one path."""
    match = (("D", (8,)), ("D_v", (8,)), ("group", (2,)), ("is_causal", (0,)), ("softcap", (0,)), ("dilation", (1, 2)))
    facts: dict[str, object] = {
        "operator": "SlidingWindowAttention", "dtype": "float16", "architecture": 80, "form": form,
        "inputs": ("Q", "K", "V", "attn_mask"), "outputs": ("Y",), "match": match, "paths": (path(),),
    }  # fmt: skip
    return PackedRecipe(**{**facts, **changes})  # type: ignore[arg-type]


def pack(kernels: tuple[PackedKernel, ...] | None = None, recipes: tuple[PackedRecipe, ...] | None = None) -> Pack:
    """A pack of two kernels, machine code and PTX."""
    return Pack(
        "compiler 1",
        kernels if kernels is not None else (kernel(), kernel(form="ptx")),
        recipes if recipes is not None else (recipe(), recipe("ptx", paths=(path(launches=(1,)),))),
    )


def sealed(data: bytes) -> bytes:
    """The file with its hash made right again, as somebody would who means to deceive."""
    head = data[:32]
    return head + hashlib.sha256(head + data[INDEX_START:]).digest() + data[INDEX_START:]


def with_index(data: bytes, index: bytes) -> bytes:
    """The file with another index: offsets, sizes and hash are right again, so that only the change itself is wrong."""
    (size,) = struct.unpack_from("<Q", data, 24)
    start = INDEX_START + size
    code = data[start + -start % 16 :]
    moved = _moved(index, start + -start % 16, INDEX_START + len(index))
    moved = _moved(index, start + -start % 16, INDEX_START + len(moved))
    body = moved + bytes(-len(moved) % 16) + code
    head = data[:16] + struct.pack("<QQ", INDEX_START + len(body), len(moved))
    return sealed(head + bytes(32) + body)


def _moved(index: bytes, old: int, new: int) -> bytes:
    """The index with the offsets of codes that began at `old` and begin at `new`, rounded up to 16."""
    by = new + -new % 16 - old
    return re.sub(rb"(?m)^code\t([0-9]{1,9})\t", lambda line: b"code\t%d\t" % max(0, int(line[1]) + by), index)
