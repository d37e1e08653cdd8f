"""Run a recipe on torch tensors through Triton's own launcher: on a CUDA device, or interpreted on the CPU.

`plan` does all index work on the host from shapes alone; `run` only launches, so that it never synchronises and can be
captured in a CUDA graph. The ONNX Runtime library launches the same recipes from C++.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..attention.operands import Shapes
from ..errors import InvalidOperands
from ..registry import operator as definition_of
from .expressions import evaluate
from .tiles import Tile
from .variants import MOST_MULTIPROCESSORS, STATUS, KernelSite, KernelVariant, NoKernel, Path, Recipe

if TYPE_CHECKING:
    import torch

SIZE_LIMIT = 2**30
"""Largest S_q + S_k, and number of any other kind, that the kernels count in int32."""

_BYTES = ("attn_mask", "global_mask")


@dataclass(frozen=True)
class LaunchPlan:
    """One execution of a recipe, for given shapes.

    Attributes:
        recipe: What is executed.
        path: The path it takes.
        sizes: Value of every size, those of the path included.
        shapes: Sizes and layout of the operands.
        inputs: Shape of each input that is present.
        scalars: Values of ``scalar:`` and ``attribute:`` parameters.
    """

    recipe: Recipe
    path: Path
    sizes: dict[str, int]
    shapes: Shapes
    inputs: dict[str, tuple[int, ...]]
    scalars: dict[str, float]

    @property
    def workspace_bytes(self) -> int:
        """Size of all buffers."""
        return sum(4 * evaluate(buffer.elements, self.sizes) for buffer in self.path.buffers)

    def grid(self, kernel: KernelVariant) -> tuple[int, int, int]:
        """Grid of one of the path's kernels."""
        x, y, z = (evaluate(expression, self.sizes) for expression in kernel.grid)
        return x, y, z


def plan(
    recipe: Recipe, shapes: Shapes, inputs: Mapping[str, tuple[int, ...]], multiprocessors: int, scale: float | None
) -> LaunchPlan:
    """Choose the path for given shapes and work out every size.

    Args:
        recipe: From `variants_for`.
        shapes: From the operator's `infer_shapes`.
        inputs: Shape of each input that is present, by formal name.
        multiprocessors: Of the device.
        scale: The node's `scale`.

    Raises:
        NoKernel: a size is beyond what the kernels count.
    """
    sizes = {
        "B": shapes.batch, "H_q": shapes.q_num_heads, "H_kv": shapes.kv_num_heads, "S_q": shapes.seq_q,
        "S_k": shapes.seq_k, "D": shapes.head_size, "D_v": shapes.v_head_size,
        "SMS": min(multiprocessors, MOST_MULTIPROCESSORS),
    }  # fmt: skip
    if "kv_indices" in inputs:
        counts = inputs["kv_num_blocks"], inputs["full_kv_num_blocks"]
        sizes |= {
            "W": inputs["kv_indices"][3], "W_full": inputs["full_kv_indices"][3],
            "M": inputs["block_masks"][0] if "block_masks" in inputs else 0,
            "B_lists": max(shape[0] for shape in counts), "H_lists": max(shape[1] for shape in counts),
        }  # fmt: skip
    if shapes.seq_q + shapes.seq_k >= SIZE_LIMIT:
        raise NoKernel(f"S_q + S_k = {shapes.seq_q + shapes.seq_k}: GPU kernels go up to {SIZE_LIMIT - 1}")
    defaults = {a.name: a.default for a in definition_of(recipe.site.operator).attributes}
    attributes: dict[str, Any] = {**defaults, **recipe.site.attributes}
    if "left_window_size" in attributes:
        everything = shapes.seq_q + shapes.seq_k
        left, right = attributes["left_window_size"], attributes["right_window_size"]
        sizes["LEFT"] = everything if left < 0 else left
        sizes["RIGHT"] = 0 if attributes["is_causal"] else everything if right < 0 else right
    path = next(path for path in recipe.paths if evaluate(path.condition, sizes))
    for name, expression in path.sizes:
        sizes[name] = evaluate(expression, sizes)
    scalars = {
        name: float(value) if isinstance(value, float) else value
        for name, value in attributes.items()
        if isinstance(value, (int, float))
    }
    scalars["scale"] = 1.0 / math.sqrt(shapes.head_size) if scale is None else scale
    return LaunchPlan(recipe, path, sizes, shapes, dict(inputs), scalars)


def allocate(plan: LaunchPlan, device: torch.device) -> dict[str, torch.Tensor]:
    """The plan's buffers by name; for `run`, which may use them again and again."""
    import torch

    # One element more, so that no pointer is null when a size is 0.
    return {
        buffer.name: torch.empty(
            evaluate(buffer.elements, plan.sizes) + 1,
            dtype=torch.float32 if buffer.type == "fp32" else torch.int32,
            device=device,
        )
        for buffer in plan.path.buffers
    }


def run(
    plan: LaunchPlan, operands: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch every kernel of a plan.

    Args:
        plan: From `plan`, for the shapes of these operands.
        operands: Inputs by formal name, on one device; made contiguous where they are not.
        buffers: From `allocate`; new ones where they are not given.

    Returns:
        (Y, lse or None), still being written by the device, as is the buffer ``status``.
    """
    import torch

    site = plan.recipe.site
    device, dtype = operands["Q"].device, operands["Q"].dtype
    given = {name: _as_read(name, tensor) for name, tensor in operands.items()}
    y = torch.empty(plan.shapes.output, dtype=dtype, device=device)
    lse = torch.empty(plan.shapes.lse, dtype=torch.float32, device=device) if site.lse else None
    if buffers is None:
        buffers = allocate(plan, device)
    for buffer in plan.path.buffers:
        if buffer.zeroed:
            buffers[buffer.name].zero_()
    pointers: dict[str, Any] = {f"input:{name}": tensor for name, tensor in given.items()}
    pointers |= {f"buffer:{name}": tensor for name, tensor in buffers.items()}
    pointers |= {"output:Y": y, "output:lse": lse}
    for kernel in plan.path.kernels:
        grid = plan.grid(kernel)
        if 0 in grid:
            continue
        arguments = {p.name: argument(plan, p.meaning, pointers) for p in kernel.parameters}
        load(kernel)[grid](**arguments, **kernel.constexprs, num_warps=kernel.num_warps, num_stages=kernel.num_stages)
    return y, lse


def load(kernel: KernelVariant) -> Any:
    """The Triton function of a variant.

    Raises:
        NoKernel: Triton is not installed.
    """
    module, _, name = kernel.function.partition(":")
    try:
        return getattr(importlib.import_module(f"...{module}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise NoKernel(
            "GPU kernels are written in Triton, which is not installed; next step: pip install 'longspan[gpu]'"
        ) from error


def check_status(status: torch.Tensor | None, inputs: Mapping[str, tuple[int, ...]]) -> None:
    """Raise what the kernels found out of range. Waits for the device.

    Args:
        status: The buffer of that name after `run`; None where the plan has none.
        inputs: Shape of each input that is present, by formal name.

    Raises:
        InvalidOperands: a length, or a value of the block lists, is out of range; the message names its place.
    """
    if status is None:
        return
    for name, found in zip(STATUS, status.tolist(), strict=False):
        if found:
            place: list[int] = []
            rest = found - 1
            for size in reversed(inputs[name]):
                place.insert(0, rest % size)
                rest //= size
            axes = ("batch", "head", "row", "slot")
            named = ", ".join(f"{axis} {at}" for axis, at in zip(axes, place, strict=False))
            raise InvalidOperands(f"{name}[{named}] is out of range; see docs/operators.md for what it may hold")


def site_of(
    operator: str, shapes: Shapes, dtype: str, inputs: Mapping[str, tuple[int, ...]], attributes: Mapping[str, Any],
    lse: bool,
) -> KernelSite:  # fmt: skip
    """The site of a call with the given operands."""
    counts = [inputs[name] for name in ("kv_num_blocks", "full_kv_num_blocks") if name in inputs]
    return KernelSite(
        operator=operator, dtype=dtype, head_size=shapes.head_size, v_head_size=shapes.v_head_size,
        heads=shapes.q_num_heads, kv_heads=shapes.kv_num_heads, inputs=tuple(inputs), attributes=dict(attributes),
        lse=lse, lists_per_head=any(shape[1] > 1 for shape in counts),
    )  # fmt: skip


def plan_node(
    operator: str,
    definition: tuple[Callable[..., Shapes], Callable[..., Recipe]],
    operands: Mapping[str, torch.Tensor],
    attributes: Any,
    lse: bool,
    tiles: tuple[Tile, Tile] | None,
    few_rows: int | None,
) -> LaunchPlan:
    """Check the shapes of an operator's inputs and lay out its launches; what every operator's own `plan` does.

    Args:
        operator: Name of the operator.
        definition: Its `infer_shapes` and its `recipe`.
        operands: Inputs by formal name.
        attributes: Its attributes, a dataclass.
        lse: Whether the log-sum-exp is wanted.
        tiles: Tiles for many and for few rows; None for the tuned ones.
        few_rows: Largest S_q for which keys are split; None for the recipe's own.

    Raises:
        InvalidOperands: a shape contradicts the definition.
        NoKernel: no kernel covers the call.
    """
    infer_shapes, recipe = definition
    inputs = {name: tuple(tensor.shape) for name, tensor in operands.items()}
    shapes = infer_shapes(inputs, attributes)
    given = {name: value for name, value in asdict(attributes).items() if value is not None}
    dtype = str(operands["Q"].dtype).removeprefix("torch.")
    site = site_of(operator, shapes, dtype, inputs, given, lse)
    architecture, multiprocessors = device_facts(operands["Q"])
    return plan(recipe(site, architecture, tiles, few_rows), shapes, inputs, multiprocessors, attributes.scale)


def execute(
    planned: LaunchPlan, operands: Mapping[str, torch.Tensor], check: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Allocate what a plan needs and run it.

    Args:
        planned: The plan.
        operands: Inputs by formal name, on one device.
        check: Whether to wait for the device and raise what it found out of range.

    Returns:
        (Y, lse or None).

    Raises:
        InvalidOperands: with `check`, a value is out of range.
    """
    buffers = allocate(planned, operands["Q"].device)
    results = run(planned, operands, buffers)
    if check:
        check_status(buffers.get("status"), planned.inputs)
    return results


def device_facts(tensor: torch.Tensor) -> tuple[int, int]:
    """(compute capability to take tiles for, multiprocessors) of a tensor's device.

    A capability that no tiles were chosen for takes those of the next lower one; a CPU, where kernels are interpreted,
    those of an sm_80 with a handful of multiprocessors.
    """
    import torch

    from .variants import ARCHITECTURES

    if tensor.device.type != "cuda":
        return 80, 8
    major, minor = torch.cuda.get_device_capability(tensor.device)
    below = [known for known in ARCHITECTURES if known <= 10 * major + minor]
    if not below:
        raise NoKernel(f"compute capability {major}.{minor}: GPU kernels need {ARCHITECTURES[0] / 10} or more")
    return below[-1], int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)


def _as_read(name: str, tensor: torch.Tensor) -> torch.Tensor:
    import torch

    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if name in _BYTES and tensor.dtype == torch.bool else tensor


def argument(plan: LaunchPlan, meaning: str, pointers: Mapping[str, Any]) -> Any:
    """What a kernel's parameter of this meaning gets; `pointers` has those to inputs, outputs and buffers."""
    kind, _, what = meaning.partition(":")
    if kind in ("input", "output", "buffer"):
        return pointers[meaning]
    if kind == "size":
        return evaluate(what, plan.sizes)
    if kind == "stride":
        return _stride(plan, *what.split("."))
    return plan.scalars[what]


def _stride(plan: LaunchPlan, name: str, axis: str) -> int:
    shapes = plan.shapes
    if name in ("Q", "K", "V", "Y"):
        heads = shapes.q_num_heads if name in ("Q", "Y") else shapes.kv_num_heads
        length = shapes.seq_q if name in ("Q", "Y") else shapes.seq_k
        size = shapes.head_size if name in ("Q", "K") else shapes.v_head_size
        joined = shapes.layout == "bsd"
        return {"batch": heads * length * size, "head": size if joined else length * size,
                "row": heads * size if joined else size}[axis]  # fmt: skip
    shape = plan.inputs[name]
    index = int(axis)
    return math.prod(shape[index + 1 :]) if shape[index] > 1 else 0
