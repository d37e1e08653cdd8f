"""What an execution costs at least on a GPU: operations, bytes, and the time that public peak figures allow.

A roofline bound, not a measurement: no kernel is faster than either peak allows, and none reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..plugins.attention.operands import Shapes, cost_of
from ..plugins.definition import Cost
from ..plugins.gpu.pack import PackedRecipe
from ..plugins.gpu.variants import ELEMENT_SIZES
from ..plugins.sliding_window_attention.definition import Attributes, cost
from .errors import InvalidRequest


@dataclass(frozen=True)
class Peak:
    """Published peak figures of one device of an architecture, without sparsity.

    Attributes:
        device: The device.
        half: Operations per second of the tensor cores, float16 or bfloat16 with float32 sums.
        single: Operations per second outside them, float32.
        bandwidth: Bytes per second of device memory.
        source: Where the figures are published.
    """

    device: str
    half: float
    single: float
    bandwidth: float
    source: str


PEAKS = {
    80: Peak("A100 SXM 80 GB", 312e12, 19.5e12, 2039e9, "NVIDIA A100 datasheet"),
    86: Peak("A40", 149.7e12, 37.4e12, 696e9, "NVIDIA A40 datasheet"),
    87: Peak("Jetson AGX Orin 64 GB", 42.5e12, 5.3e12, 204.8e9, "Jetson AGX Orin technical brief; half of sparse"),
    89: Peak("L40S", 362e12, 91.6e12, 864e9, "NVIDIA L40S datasheet"),
    90: Peak("H100 SXM", 989.4e12, 66.9e12, 3350e9, "NVIDIA H100 architecture whitepaper and datasheet"),
    100: Peak("B200", 2250e12, 75e12, 8000e9, "NVIDIA DGX and HGX B200 datasheets; half of sparse"),
    120: Peak("RTX 5090", 209.5e12, 104.8e12, 1792e9, "NVIDIA RTX Blackwell architecture whitepaper"),
}
"""One device for each architecture; others of the same architecture differ."""


@dataclass(frozen=True)
class Execution:
    """Sizes to compute costs for.

    Attributes:
        length: Queries, and keys, of a text.
        batch: Texts.
        heads: Key heads; there are `group` times as many query heads.
        window: Keys to either side that a query of SlidingWindowAttention sees; None for all.
        density: Part of all pairs that BlockSparseAttention scores.
    """

    length: int = 4096
    batch: int = 1
    heads: int = 8
    window: int | None = 256
    density: float = 0.1

    def __post_init__(self) -> None:
        for name in ("length", "batch", "heads"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"--{name} {getattr(self, name)}: must be 1 or more")
        if self.window is not None and self.window < 0:
            raise InvalidRequest(f"--window {self.window}: must be 0 or more")
        if not 0 < self.density <= 1:
            raise InvalidRequest(f"--density {self.density}: must be above 0 and at most 1")


@dataclass(frozen=True)
class Bound:
    """Least time of an execution on one device.

    Attributes:
        device: The device.
        seconds: No kernel is faster.
        limited_by: ``"compute"`` or ``"memory"``: which peak sets the time.
        ridge: Operations per byte above which this device is limited by compute.
        source: Where the peak figures are published.
    """

    device: str
    seconds: float
    limited_by: str
    ridge: float
    source: str


def cost_of_recipe(recipe: PackedRecipe, execution: Execution) -> Cost:
    """Operations and bytes of one execution: the two matrix products; Q, K, V read once, Y written once."""
    facts = dict(recipe.match)
    (size,), (v_size,), (group,) = facts["D"], facts["D_v"], facts["group"]
    steps = facts.get("dilation", (1,))
    heads = len(steps) if len(steps) > 1 else execution.heads * group
    length = execution.length
    shapes = Shapes("bhsd", execution.batch, heads, max(1, heads // group), length, length, size, v_size)
    element = ELEMENT_SIZES[recipe.dtype]
    if recipe.operator == "SlidingWindowAttention":
        window = -1 if execution.window is None else execution.window
        return cost(shapes, Attributes(window, window, steps, is_causal=bool(facts["is_causal"][0])), element)
    # Which blocks are listed is known when it runs, not before.
    return cost_of(shapes, round(execution.density * execution.batch * heads * length * length), element)


def bound(recipe: PackedRecipe, work: Cost, architecture: int, tf32: bool = False) -> Bound:
    """The least time of `work` on the device that stands for an architecture.

    Args:
        recipe: Whose type decides which units compute.
        work: Operations and bytes.
        architecture: Compute capability.
        tf32: Whether float32 products are rounded to tf32, which runs at half the speed of float16.
    """
    peak = PEAKS[architecture]
    speed = peak.half if recipe.dtype != "float32" else peak.half / 2 if tf32 else peak.single
    compute, memory = work.flops / speed, work.bytes / peak.bandwidth
    limited_by = "compute" if compute >= memory else "memory"
    return Bound(peak.device, max(compute, memory), limited_by, speed / peak.bandwidth, peak.source)
