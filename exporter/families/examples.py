"""A model's example inputs, carried by the model itself: adapters that must run a model to know it find them there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_KEPT = "_longspan_examples"
_BATCH = 0


@dataclass(frozen=True)
class Examples:
    """Inputs that a model runs on.

    Attributes:
        inputs: Forward inputs by name.
        dynamic_shapes: ``torch.export`` specification of the dimensions that vary; None for batch and sequence in
            dimensions 0 and 1 of every input.
    """

    inputs: Mapping[str, torch.Tensor]
    dynamic_shapes: Any = None

    def varying(self) -> dict[str, dict[int, Any]]:
        """What torch.export is told of each dimension that varies, by input and axis."""
        if self.dynamic_shapes is None:
            return {name: dict.fromkeys(range(min(2, value.dim())), True) for name, value in self.inputs.items()}
        given = self.dynamic_shapes
        if not isinstance(given, Mapping):
            given = dict(zip(self.inputs, given, strict=False))
        found = {}
        for name, axes in given.items():
            axes = axes if isinstance(axes, Mapping) else dict(enumerate(axes or ()))
            found[name] = {axis: dim for axis, dim in axes.items() if dim is not None and not isinstance(dim, int)}
        return found

    def resized(self, batch: int, longer: int) -> dict[str, torch.Tensor] | None:
        """The inputs with other sizes where they vary; values are repeated, or cut off.

        Args:
            batch: Batch entries that are added; may be negative.
            longer: Tokens that are added to every other dimension that varies; may be negative.

        Returns:
            None where no dimension but the batch varies, or one cannot have this size.
        """
        found, other = {}, False
        for name, value in self.inputs.items():
            for axis, dim in self.varying().get(name, {}).items():
                size = value.shape[axis] + (batch if axis == _BATCH else longer)
                low, high = getattr(dim, "min", 1) or 1, getattr(dim, "max", None)
                if size < max(1, low) or (isinstance(high, int) and size > high):
                    return None
                other = other or axis != _BATCH
                times = -(-size // value.shape[axis])
                repeats = [times if at == axis else 1 for at in range(value.dim())]
                value = value.repeat(repeats).narrow(axis, 0, size)
            found[name] = value
        return found if other else None

    def redrawn(self, seed: int) -> dict[str, torch.Tensor]:
        """The inputs with other values: whole numbers and truth values from the range of the example's.

        Args:
            seed: 0 for the largest everywhere, 1 for the smallest, and drawn values for others; even ones ascend.
        """
        import torch

        generator = torch.Generator().manual_seed(seed)
        found = {}
        for name, value in self.inputs.items():
            if value.is_floating_point() or not value.numel():
                found[name] = value
                continue
            # A mask of nothing but ones must not stay that.
            low, high = min(0, int(value.min())), max(1, int(value.max()))
            if seed < 2:
                drawn = torch.full(value.shape, (high, low)[seed])
            else:
                drawn = torch.randint(low, high + 1, value.shape, generator=generator)
            if seed % 2 == 0:
                drawn = drawn.sort(-1).values
            found[name] = drawn.to(value.dtype).to(value.device)
        return found


def carry(model: Any, examples: Examples) -> None:
    """Let a model carry its example inputs; copies of it carry them along."""
    model.__dict__[_KEPT] = examples


def examples_of(model: Any) -> Examples | None:
    """The inputs that a model carries; None where it carries none."""
    found: Examples | None = model.__dict__.get(_KEPT)
    return found
