"""Runs the kernels of ahead-of-time plugins interpreted: ``TRITON_INTERPRET=1 python -m tests.plugins.aot_interpreted
OUT``, in a process of its own because Triton decides when a kernel's module is imported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import aot_cases
from .interpreted import NUMPY_TYPES, Array, mend_interpreter, tensors

HALF = ("plain", "softcap and scale", "one key head, sizes differ", "block masks", "bias")
"""Cases that are run in a 16-bit type as well."""


def dtypes(case: Any) -> tuple[str, ...]:
    """Types that a case is run in."""
    return ("float32", "bfloat16") if case.name in HALF else ("float32",)


def operands(case: Any, layout: str, dtype: str) -> dict[str, Array]:
    """The case's operands, those of type T rounded to it; block masks went through TensorRT's words."""
    given = {
        name: array.astype(NUMPY_TYPES[dtype]) if array.dtype == np.float64 and name != "spans" else array
        for name, array in case.operands(layout).items()
    }
    if "block_masks" in given:
        masks = given["block_masks"]
        given["block_masks"] = aot_cases.as_words(masks).view(np.uint8).reshape(masks.shape)
    return given


def execute(operator: str, case: Any, layout: str, dtype: str, tactic: int) -> dict[str, Array]:
    """Y and lse of one tactic's kernel."""
    from longspan.plugins.gpu import launch
    from longspan.plugins.tensorrt.aot_variants import aot_recipes

    given = operands(case, layout, dtype)
    attributes = case.node_attributes(layout)
    inputs = {name: array.shape for name, array in given.items()}
    recipe = aot_recipes(aot_cases.site(operator, case, layout, dtype), layout, 80)[tactic - 1][0]
    shapes = aot_cases.shapes_of(operator, inputs, attributes)
    y, lse = launch.run(launch.plan(recipe, shapes, inputs, 8, attributes.get("scale")), tensors(given))
    assert lse is not None
    return {"y": y.float().numpy(), "lse": lse.numpy()}


def main(out: Path) -> None:
    """Run every case, tactics by turns."""
    np.seterr(all="ignore")
    mend_interpreter()
    arrays = {}
    for number, (operator, case, layout) in enumerate(aot_cases.interpreted()):
        for dtype in dtypes(case):
            # Interpretation takes its time by the tile: long sequences go by the tall ones.
            tactic = 1 if case.seq_q > 60 else 1 + number % 2
            result = execute(operator, case, layout, dtype, tactic)
            arrays |= {f"{operator}\t{case.name}\t{dtype}\t{name}": array for name, array in result.items()}
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
