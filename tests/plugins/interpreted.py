"""Runs the Triton kernels interpreted on the CPU: ``TRITON_INTERPRET=1 python -m tests.plugins.interpreted OUT``.

In a process of its own, because Triton decides when a kernel's module is imported. The results of every run that `runs`
makes of the cases, and of `special_cases`, are written to the file OUT, as arrays by operator and name of the run.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from longspan.plugins.gpu.tiles import Tile

from . import block_sparse_cases, sliding_window_cases

Array = npt.NDArray[Any]
OPERATORS = {"SlidingWindowAttention": sliding_window_cases, "BlockSparseAttention": block_sparse_cases}
NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Cut:
    """Tiles for many and for few rows, and how many rows are few: keys are split then."""

    whole: Tile
    split: Tile
    few_rows: int


# Several tiles of keys in most cases, several tiles of rows where they are flat.
_TALL = Cut(Tile(64, 16, 4, 1), Tile(32, 16, 4, 1), 4)
_FLAT = Cut(Tile(16, 32, 4, 1), Tile(16, 16, 4, 1), 64)
_WIDE = Cut(Tile(64, 64, 4, 1), Tile(32, 64, 4, 1), 4)

# Cases that are run in the 16-bit types too: what is between the two products, and what is rounded after them.
_HALF = (
    "plain", "many blocks", "softcap and scale", "one key head, sizes differ", "decode", "bias", "block masks",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One case in one layout and type, with given tiles."""

    case: Any
    layout: str
    dtype: str
    cut: Cut

    @property
    def name(self) -> str:
        """Unique among the runs of an operator."""
        return f"{self.case.name} / {self.layout} / {self.dtype} / {self.cut.whole.block_m}"

    def operands(self) -> dict[str, Array]:
        """The case's operands, those of type T rounded to it."""
        kept = ("spans",)
        return {
            name: array.astype(NUMPY_TYPES[self.dtype]) if array.dtype == np.float64 and name not in kept else array
            for name, array in self.case.operands(self.layout).items()
        }


def runs(cases: Any) -> Iterator[Run]:
    """Every case once in float32, layouts and tiles by turns; some in the 16-bit types."""
    for number, case in enumerate(cases.CASES):
        layout, cut = ("bhsd", "bsd")[number % 2], (_TALL, _FLAT)[number // 2 % 2]
        # Interpretation takes its time by the tile, whatever the tile's size.
        block_rows = -(-case.seq_q // case.tall) * case.heads if hasattr(case, "tall") else 0
        if block_rows > 100:
            case = dataclasses.replace(case, seq_q=case.seq_q // 3)
        if case.seq_q > 100 or block_rows > 20:
            cut = _WIDE
        yield Run(case, layout, "float32", cut)
        if case.name in _HALF and case.batch * case.heads < 8:
            yield Run(case, layout, ("float16", "bfloat16")[number % 2], cut)


def tensors(operands: dict[str, Array]) -> dict[str, Any]:
    """torch tensors of numpy arrays, bfloat16 included."""
    import torch

    def convert(name: str, array: Array) -> Any:
        array = np.ascontiguousarray(array)
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array.astype(np.float32) if name == "spans" else array)

    return {name: convert(name, array) for name, array in operands.items()}


def execute(operator: str, operands: dict[str, Array], attributes: dict[str, Any], cut: Cut) -> dict[str, Any]:
    """Run one call: "y", "lse", the "path" taken, "error" that the status tells, and the buffers by name."""
    import importlib

    import torch
    from longspan.plugins.errors import InvalidOperands
    from longspan.plugins.gpu import launch

    folder = {"SlidingWindowAttention": "sliding_window_attention", "BlockSparseAttention": "block_sparse_attention"}
    package = f"longspan.plugins.{folder[operator]}"
    made = importlib.import_module(f"{package}.definition").Attributes.from_mapping(attributes)
    given = tensors(operands)
    planned = importlib.import_module(f"{package}.triton_run").plan
    plan = planned(given, made, lse=True, tiles=(cut.whole, cut.split), few_rows=cut.few_rows)
    buffers = launch.allocate(plan, torch.device("cpu"))
    for buffer in buffers.values():  # whatever is read must have been written
        buffer.fill_(float("nan") if buffer.is_floating_point() else -(2**30))
    y, lse = launch.run(plan, given, buffers)
    assert lse is not None
    try:
        launch.check_status(buffers.get("status"), plan.inputs)
        error = ""
    except InvalidOperands as found:
        error = str(found)
    found = {f"buffer {name}": buffer.numpy() for name, buffer in buffers.items()}
    return {"y": y.float().numpy(), "lse": lse.numpy(), "path": plan.path.name, "error": error, **found}


def mend_interpreter() -> None:
    """Make up for what Triton 3.9's interpreter lacks.

    It patches triton.language again in every call of a function, which takes a third of its time, and it multiplies
    matrices of bfloat16 by their bit patterns.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return multiply(self, widened(a), widened(b), *more)

    interpreter.InterpreterBuilder.create_dot = create_dot
    patched: set[str] = set()
    original = interpreter._patch_lang

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module not in patched and not module.startswith("longspan."):  # ours are patched with the kernel
            original(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


NEGATIVE_SCALE = sliding_window_cases.Case(
    "negative scale", {"left_window_size": 2, "right_window_size": 1, "scale": -0.5}
)
MANY_HEADS = sliding_window_cases.Case(
    "20 heads", {"left_window_size": 2, "right_window_size": 1}, heads=20, kv_heads=1, seq_q=7, batch=1
)
MANY_HEADS_LISTS = block_sparse_cases.Case("20 heads", heads=20, kv_heads=1, seq_q=7, batch=1)


def special_cases() -> dict[str, dict[str, Any]]:
    """What the shared cases cannot say: values out of range, empty operands, the order of the rows."""
    window, lists = sliding_window_cases.Case, block_sparse_cases.Case
    results = {}

    def window_run(name: str, case: Any, edit: dict[str, Array] | None = None) -> None:
        operands = Run(case, "bhsd", "float32", _TALL).operands() | (edit or {})
        results[name] = execute("SlidingWindowAttention", operands, case.node_attributes("bhsd"), _TALL)

    def list_run(name: str, case: Any, edit: dict[str, Array] | None = None) -> None:
        operands = Run(case, "bhsd", "float32", _TALL).operands() | (edit or {})
        results[name] = execute("BlockSparseAttention", operands, case.node_attributes("bhsd"), _TALL)

    sizes = {"left_window_size": 2, "right_window_size": 1}
    window_run("no keys", window("no keys", sizes, seq_q=3, seq_k=0, features=("sinks",)))
    window_run("no queries", window("no queries", sizes, seq_q=0, seq_k=3))
    window_run("no batch", window("no batch", sizes, batch=0, seq_q=3))
    cached = window("length out of range", sizes, ("nonpad_kv_seqlen",), seq_q=3, seq_k=9, lengths=(9, 9))
    window_run("window, length too long", cached, {"nonpad_kv_seqlen": np.array([9, 10])})
    window_run("window, length negative", cached, {"nonpad_kv_seqlen": np.array([-1, 9])})
    window_run("negative scale", NEGATIVE_SCALE)
    window_run("20 heads a key head", MANY_HEADS)
    list_run("20 heads a key head, lists", MANY_HEADS_LISTS)

    masked = lists("out of range", features=("block_masks", "nonpad_kv_seqlen"), lengths=(19, 19), shared=(2, 2))
    good = masked.operands("bhsd")
    list_run("all in range", masked)
    wrong_values = (
        ("kv_num_blocks", 99), ("kv_num_blocks", -1), ("full_kv_num_blocks", 2**31 - 1), ("kv_indices", 5),
        ("full_kv_indices", -3), ("block_mask_ids", 3), ("block_mask_ids", -2),
    )  # fmt: skip
    for name, value in wrong_values:
        wrong = good[name].copy()
        wrong[1, 1, 2, ...] = value
        counts = {count: np.maximum(good[count], 1) for count in ("kv_num_blocks", "full_kv_num_blocks")}
        list_run(f"{name} = {value}", masked, counts | {name: wrong})
    list_run("length too long", masked, {"nonpad_kv_seqlen": np.array([19, 20])})
    list_run("lists without keys", lists("empty", seq_q=5, seq_k=4, density=1.0), {
        "K": np.zeros((2, 2, 0, 8), np.float32), "V": np.zeros((2, 2, 0, 8), np.float32),
    })  # fmt: skip
    list_run("many rows", dataclasses.replace(lists("many rows", repeats=3), tall=1, wide=8, seq_q=70, batch=1,
                                               features=()))  # fmt: skip
    return results


def main(out: Path) -> None:
    """Run everything and write the results."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    np.seterr(all="ignore")
    mend_interpreter()
    results = {("special", name): result for name, result in special_cases().items()}
    for operator, cases in OPERATORS.items():
        for run in runs(cases):
            attributes = run.case.node_attributes(run.layout)
            results[operator, run.name] = execute(operator, run.operands(), attributes, run.cut)
    arrays = {"\t".join((*name, key)): value for name, result in results.items() for key, value in result.items()}
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
