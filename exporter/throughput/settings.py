"""What to measure, and how thoroughly."""

from __future__ import annotations

from dataclasses import dataclass

from ..devices import CPU, CUDA, PROVIDERS
from ..errors import InvalidRequest
from ..manifest import Manifest

BASELINES = ("body", "dense", "stock")
"""What a bundle's kernel can be timed against."""

_SHORTEST = 512
_UNLIMITED = 4096


@dataclass(frozen=True)
class BenchSettings:
    """Settings of a benchmark.

    Attributes:
        lengths: Sequence lengths in tokens; empty for the default (see `resolve_lengths`).
        batch: Sequences per run.
        against: Baselines, of `BASELINES`.
        threads: Intra-op threads; 0 for ONNX Runtime's choice, one per core.
        providers: Execution providers, most wanted first; one of `longspan.exporter.devices.PROVIDERS`.
        warm_up_ms: Least time of untimed runs before the first sample, in milliseconds.
        iterations: Least number of samples of a trial.
        duration_s: Least time of the samples of a trial together, in seconds.
        rounds: Times that the trials of a length are repeated, each in a new process; samples are pooled.
        time_limit_s: Longest time of a trial in seconds, loading included.
        memory_limit_bytes: Memory that a trial may take; None for nine tenths of what is available when it begins.
        global_tokens: Global tokens at the start of each sequence, for inputs with a global mask; None for 1 there.
        seed: Seed of the inputs.
        engine: Name of an engine of the bundle to time as well; empty for none. It decides on the providers.

    Raises:
        InvalidRequest: a value is out of range.
    """

    lengths: tuple[int, ...] = ()
    batch: int = 1
    against: tuple[str, ...] = BASELINES
    threads: int = 0
    providers: tuple[str, ...] = PROVIDERS[CPU]
    warm_up_ms: float = 200.0
    iterations: int = 10
    duration_s: float = 1.0
    rounds: int = 1
    time_limit_s: float = 120.0
    memory_limit_bytes: int | None = None
    global_tokens: int | None = None
    seed: int = 0
    engine: str = ""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("iterations", 1), ("rounds", 1), ("threads", 0), ("warm_up_ms", 0)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"--{name.removesuffix('_ms').replace('_', '-')}: must be {least} or more")
        if self.duration_s < 0 or self.time_limit_s <= 0:
            raise InvalidRequest("--duration must be 0 or more, --time-limit more than 0, both in seconds")
        if self.memory_limit_bytes is not None and self.memory_limit_bytes <= 0:
            raise InvalidRequest("--memory-limit: must be positive")
        if self.global_tokens is not None and self.global_tokens < 0:
            raise InvalidRequest(f"--global-tokens {self.global_tokens}: must be 0 or more")
        unknown = [name for name in self.against if name not in BASELINES]
        if unknown:
            raise InvalidRequest(f"--against {', '.join(unknown)}: allowed: {', '.join(BASELINES)}, none")
        if not self.providers:
            raise InvalidRequest("--device: give one provider or more, e.g. CPUExecutionProvider")

    @property
    def device(self) -> str:
        """Where the most wanted provider computes: ``"cpu"`` or ``"cuda"``."""
        return CUDA if self.providers and self.providers[0] in PROVIDERS[CUDA][:1] else CPU


def resolve_lengths(settings: BenchSettings, manifest: Manifest) -> tuple[int, ...]:
    """The lengths to measure, ascending.

    By default powers of two from 512 to the longest sequence that the model accepts, and that length itself where it is
    more than a quarter beyond the last power; three powers for models of fewer than 2048 tokens; up to 4096 where
    unlimited.

    Raises:
        InvalidRequest: a length is below 1 or beyond what the model accepts, or fewer than the global tokens.
    """
    limit = manifest.max_length
    lengths = tuple(sorted(set(settings.lengths)))
    if not lengths:
        lengths = _default_lengths(limit or _UNLIMITED) if manifest.fixed_length is None else (manifest.fixed_length,)
    elif manifest.fixed_length is not None and lengths != (manifest.fixed_length,):
        raise InvalidRequest(
            f"--lengths {lengths[-1]}: the model was exported for {manifest.fixed_length} tokens only; allowed: that"
        )
    if lengths[0] < 1:
        raise InvalidRequest(f"--lengths {lengths[0]}: must be 1 or more")
    if limit is not None and lengths[-1] > limit:
        raise InvalidRequest(
            f"--lengths {lengths[-1]}: the model accepts {limit} tokens at most; give lengths up to {limit}, or export "
            "with --max-positions where the model has trained absolute positions"
        )
    if settings.global_tokens is not None and settings.global_tokens > lengths[0]:
        raise InvalidRequest(f"--global-tokens {settings.global_tokens}: more than the shortest length, {lengths[0]}")
    return lengths


def _default_lengths(limit: int) -> tuple[int, ...]:
    largest = 1 << (limit.bit_length() - 1)
    lengths = []
    length = max(1, min(_SHORTEST, largest // 4))
    while length <= largest:
        lengths.append(length)
        length *= 2
    if limit > 1.25 * largest:
        lengths.append(limit)
    return tuple(lengths)
