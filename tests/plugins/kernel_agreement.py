"""The Triton kernels against the float64 references, case by case, on any device that Triton runs on.

Needs torch, Triton and numpy only, so that a borrowed GPU can run it: what the tests of `tests/gpu` and
`benchmarks/gpu_attention.py` hold the kernels to.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from longspan.plugins.gpu import launch
from longspan.plugins.gpu.launch import LaunchPlan

from . import block_sparse_cases, sliding_window_cases

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

CASES = {"SlidingWindowAttention": sliding_window_cases, "BlockSparseAttention": block_sparse_cases}
PACKAGES = {"SlidingWindowAttention": "sliding_window_attention", "BlockSparseAttention": "block_sparse_attention"}
DTYPES = ("float32", "float16", "bfloat16")

_ROUNDING = {"float32": 0.0, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Run:
    """One case of an operator in one layout and type."""

    operator: str
    case: Any
    layout: str
    dtype: str

    @property
    def name(self) -> str:
        """Unique among all runs."""
        return f"{self.operator} / {self.case.name} / {self.layout} / {self.dtype}"

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the node."""
        made: dict[str, Any] = self.case.node_attributes(self.layout)
        return made

    def operands(self, device: str) -> dict[str, torch.Tensor]:
        """The case's operands on `device`, those of type T rounded to it."""
        import torch

        given: dict[str, Array] = self.case.operands(self.layout)
        made = {}
        for name, array in given.items():
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            if array.dtype == np.float64:
                tensor = tensor.to(torch.float32 if name == "spans" else getattr(torch, self.dtype))
            made[name] = tensor.to(device)
        return made


def runs() -> Iterator[Run]:
    """Every case in every type; the layouts take turns, so that each case comes in both."""
    for operator, cases in CASES.items():
        for number, case in enumerate(cases.CASES):
            for turn, dtype in enumerate(DTYPES):
                yield Run(operator, case, ("bhsd", "bsd")[(number + turn) % 2], dtype)


def plan(
    operator: str, operands: Mapping[str, torch.Tensor], attributes: Mapping[str, Any], *, lse: bool
) -> LaunchPlan:
    """The launches for given operands."""
    package = f"longspan.plugins.{PACKAGES[operator]}"
    made = _module(f"{package}.definition").Attributes.from_mapping(attributes)
    planned: LaunchPlan = _module(f"{package}.triton_run").plan(operands, made, lse=lse)
    return planned


def execute(operator: str, operands: Mapping[str, torch.Tensor], attributes: Mapping[str, Any]) -> tuple[Array, Array]:
    """(Y, lse) of the kernels, in float64; buffers are filled with garbage before, as whatever is read must be written.

    Raises:
        InvalidOperands: a value is out of range, as the kernels found it.
    """
    planned = plan(operator, operands, attributes, lse=True)
    buffers = launch.allocate(planned, operands["Q"].device)
    for buffer in buffers.values():
        buffer.fill_(float("nan") if buffer.is_floating_point() else -(2**30))
    y, lse = launch.run(planned, operands, buffers)
    launch.check_status(buffers.get("status"), planned.inputs)
    assert lse is not None
    return y.double().cpu().numpy(), lse.double().cpu().numpy()


def reference(
    operator: str, operands: Mapping[str, torch.Tensor], attributes: Mapping[str, Any]
) -> tuple[Array, Array]:
    """(Y, lse) of the float64 reference, for the operands as the kernels get them."""
    package = f"longspan.plugins.{PACKAGES[operator]}"
    given = {
        name.lower(): (tensor.double() if tensor.is_floating_point() else tensor).cpu().numpy()
        for name, tensor in operands.items()
    }
    compute = getattr(_module(f"{package}.reference"), PACKAGES[operator])
    expected: tuple[Array, Array] = compute(
        **given, attributes=_module(f"{package}.definition").Attributes.from_mapping(attributes)
    )
    return expected


@dataclass(frozen=True)
class Errors:
    """Largest errors of Y and of the finite lse, what they may be, and "" or what else is wrong."""

    y: float
    y_allowed: float
    lse: float
    lse_allowed: float
    fault: str = ""

    @property
    def message(self) -> str:
        """What is wrong, or ""."""
        if self.fault:
            return self.fault
        wrong = [
            f"{name} is off by {error:.2e}, allowed {allowed:.2e}"
            for name, error, allowed in (("Y", self.y, self.y_allowed), ("lse", self.lse, self.lse_allowed))
            if not error <= allowed
        ]
        return "; ".join(wrong)


def compare(run: Run, operands: Mapping[str, torch.Tensor], got: tuple[Array, Array]) -> Errors:
    """Hold (Y, lse) against the reference.

    A score is off by D roundings of products of at most |q|·|k|, and by as many of its own size (scaling, bias, cap); a
    term of the softmax by twice that relative to itself, and by the device's own exp2 and log2 (2 ulp each, CUDA C++
    Programming Guide, "Mathematical Functions"); sums by one rounding a key. In 16-bit types each term is rounded
    before the second product, and Y after it.
    """
    expected_y, expected_lse = reference(run.operator, operands, run.attributes)
    magnitude = {name: _largest(tensor) for name, tensor in operands.items() if tensor.is_floating_point()}
    queries = max(magnitude["Q"], magnitude.get("global_Q", 0.0))
    keys = max(magnitude["K"], magnitude.get("global_K", 0.0))
    values = max(magnitude["V"], magnitude.get("global_V", 0.0))
    extra = sum(magnitude.get(name, 0.0) for name in ("band_bias", "distance_bias", "sinks"))
    score = _EPS * (run.case.size * queries * keys * abs(run.attributes.get("scale", 1.0)) + 4 * extra + 12)
    term = 2 * score + _EPS * run.case.keys
    y_allowed = values * (term + 2 * _ROUNDING[run.dtype])
    finite = np.isfinite(expected_lse)
    lse_allowed = term + 4 * _EPS * float(np.abs(expected_lse[finite]).max(initial=0.0))
    y, lse = got
    if y.shape != expected_y.shape or lse.shape != expected_lse.shape:
        fault = f"shapes {y.shape} and {lse.shape}, expected {expected_y.shape} and {expected_lse.shape}"
        return Errors(np.inf, y_allowed, np.inf, lse_allowed, fault)
    fault = "" if np.array_equal(lse[~finite], expected_lse[~finite]) else "lse of rows without keys is not -inf"
    y_error = float(np.abs(y - expected_y).max(initial=0.0))
    lse_error = float(np.abs(lse[finite] - expected_lse[finite]).max(initial=0.0))
    return Errors(y_error, y_allowed, lse_error, lse_allowed, fault)


def disagreement(run: Run, device: str) -> Errors:
    """Execute a run on a device and compare it."""
    operands = run.operands(device)
    return compare(run, operands, execute(run.operator, operands, run.attributes))


def _module(name: str) -> ModuleType:
    return importlib.import_module(name)


def _largest(tensor: torch.Tensor) -> float:
    values = tensor.double().abs()
    values = values[values.isfinite()]
    return float(values.max()) if values.numel() else 0.0
