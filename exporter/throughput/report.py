"""The result of a benchmark, as records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .machine import Machine
from .settings import BenchSettings
from .statistics import Crossover, Latency, drift, percentile
from .variants import TITLES

if TYPE_CHECKING:
    from .comparison import BenchComparison

SCHEMA_VERSION = 3
READABLE = (2, SCHEMA_VERSION)
"""2 added the samples, the profile and the comparison; 3 engines. No release wrote version 1."""

OK = "ok"
OVER_LIMIT = "over limit"
OUT_OF_MEMORY = "out of memory"
UNAVAILABLE = "unavailable"
WRONG_PATH = "wrong path"
CRASHED = "crashed"
FAILED = "failed"

BROKEN = (WRONG_PATH, CRASHED, FAILED)
"""States that mean a defect, not a limit that the caller set or the machine has."""


@dataclass(frozen=True)
class Row:
    """One variant at one length.

    Attributes:
        variant: Key of `TITLES`.
        length: Tokens per sequence.
        status: ``"ok"``, ``"over limit"`` (time), ``"out of memory"``, ``"unavailable"``, ``"wrong path"``,
            ``"crashed"`` or ``"failed"``.
        reason: Why it is not ``"ok"``.
        latency: Statistics of the samples of all rounds; None unless ``"ok"``, like all that follows.
        tokens_per_s: batch x length / median.
        ratio: Median over that of the reference variant at this length.
        peak_rss_bytes: Largest resident memory of the trial's process, interpreter and ONNX Runtime included.
        session_rss_bytes: The same once the session was created, before the first run.
        import_rss_bytes: The same before the session was created.
        load_s: Time to create the session.
        first_run_s: Time of the first run.
        warm_up_runs: Untimed runs, over all rounds, besides the two that are profiled.
        round_medians_ms: Median of each round; their differences are the drift between processes.
        cut_short: Whether the time limit ended the samples before `iterations` and `duration_s` were both met.
        cores_used: CPU time over wall time while sampling.
        others_cores: Cores that other processes kept busy during the trial; the most of all rounds.
        preemptions: Times that the system took a core away while sampling.
        kernel_nodes: Calls of longspan kernels in the profiled run.
        executed: Calls per execution provider and operator in the profiled run.
        time_us: Time of the profiled ``run`` and of its parts: ``attention``, ``matmul``, ``other``; what is left is
            the runtime's own, between the nodes.
        attention_flops: Floating-point operations of all sites together, where their sizes are known.
        sgemm_gflops: What the same runtime reached in one large float32 matrix product right after the trial, the
            best of all rounds, in GFLOP/s.
        drift: Median of the first quarter of a round's samples over that of its last quarter, minus 1; of the round
            where it is largest. None below 12 samples.
        samples_ns: Every sample in the order in which it was taken, one sequence per round.
    """

    variant: str
    length: int
    status: str
    reason: str = ""
    latency: Latency | None = None
    tokens_per_s: float | None = None
    ratio: float | None = None
    peak_rss_bytes: int | None = None
    session_rss_bytes: int | None = None
    import_rss_bytes: int | None = None
    load_s: float | None = None
    first_run_s: float | None = None
    warm_up_runs: int | None = None
    round_medians_ms: tuple[float, ...] = ()
    cut_short: bool = False
    cores_used: float | None = None
    others_cores: float | None = None
    preemptions: int | None = None
    kernel_nodes: int | None = None
    executed: dict[str, dict[str, int]] = field(default_factory=dict)
    time_us: dict[str, int] = field(default_factory=dict)
    attention_flops: int | None = None
    sgemm_gflops: float | None = None
    drift: float | None = None
    samples_ns: tuple[tuple[int, ...], ...] = ()

    @property
    def title(self) -> str:
        """What tables call the variant."""
        return TITLES[self.variant]


@dataclass(frozen=True)
class BenchReport:
    """Everything that a benchmark found.

    Attributes:
        model: Class of the model.
        attention: Its sites in words, e.g. ``"12 x SlidingWindowAttention, reach 256"``.
        identity: Hash of what was exported and how it was converted, the same for every export of one model.
        reference: Variant that ratios and crossovers are relative to: ``"engine"`` where one was measured, ``"kernel"``
            otherwise, or ``"body"`` without the library.
        settings: What was asked for, with the lengths and global tokens that were used.
        machine: What it ran on.
        rows: By length, then by variant.
        crossovers: One per baseline.
        diagnosis: What bounds the bundle, each sentence with its number.
        notes: What a reader should know before trusting the numbers.
        comparison: Against an earlier report; None where none was given.
        command: The command line; empty when called from Python.
        created: UTC time, ISO 8601.
        schema_version: Version of this record.
    """

    model: str
    attention: str
    identity: str
    reference: str
    settings: BenchSettings
    machine: Machine
    rows: tuple[Row, ...]
    crossovers: tuple[Crossover, ...]
    diagnosis: tuple[str, ...]
    notes: tuple[str, ...]
    comparison: BenchComparison | None
    command: str
    created: str
    schema_version: int = SCHEMA_VERSION

    @property
    def broken(self) -> tuple[Row, ...]:
        """Rows of the bundle itself that show a defect."""
        return tuple(row for row in self.rows if row.variant in ("kernel", "body", "engine") and row.status in BROKEN)

    def at(self, variant: str, length: int) -> Row:
        """The row of one variant at one length.

        Raises:
            KeyError: it was not part of the benchmark.
        """
        for row in self.rows:
            if row.variant == variant and row.length == length:
                return row
        raise KeyError(f"{variant} at {length} tokens")


def describe_crossover(crossover: Crossover, reference: str) -> str:
    """One sentence, e.g. ``"faster than stock export from about 811 tokens (12.3x at 4096 tokens)"``."""
    baseline, ours = TITLES[crossover.baseline], TITLES[reference]
    if crossover.kind == "unknown":
        return f"{ours} and {baseline} were not measured at the same length"
    assert crossover.speedup_at_longest is not None
    at_longest = f"{crossover.speedup_at_longest:.3g}x at {crossover.longest} tokens"
    if crossover.kind == "never":
        return f"{ours} is not faster than {baseline} up to {crossover.longest} tokens ({at_longest})"
    if crossover.kind == "always":
        return f"{ours} is faster than {baseline} at every measured length ({at_longest})"
    return f"{ours} is faster than {baseline} from about {crossover.tokens} tokens ({at_longest})"


def pool(
    variant: str, length: int, batch: int, outcomes: list[dict[str, Any]], attention_flops: int | None = None
) -> Row:
    """One row from the outcomes of all rounds; the first that is not ``"ok"`` decides the state."""
    bad = next((outcome for outcome in outcomes if outcome["status"] != OK), None)
    if bad is not None:
        return Row(variant, length, bad["status"], bad["reason"])
    rounds = tuple(tuple(outcome["samples_ns"]) for outcome in outcomes)
    latency = Latency.of([sample / 1e6 for samples in rounds for sample in samples])
    sgemm = [outcome["sgemm_gflops"] for outcome in outcomes if outcome.get("sgemm_gflops")]
    drifts = [found for samples in rounds if (found := drift(samples)) is not None]
    memory = [outcome["memory_bytes"] for outcome in outcomes]
    last = outcomes[-1]
    return Row(
        variant=variant,
        length=length,
        status=OK,
        latency=latency,
        tokens_per_s=batch * length / latency.median * 1e3,
        peak_rss_bytes=max(record["peak"] for record in memory),
        session_rss_bytes=max(record["session"] for record in memory),
        import_rss_bytes=max(record["imports"] for record in memory),
        load_s=min(outcome["load_s"] for outcome in outcomes),
        first_run_s=min(outcome["first_run_s"] for outcome in outcomes),
        warm_up_runs=sum(outcome["warm_up_runs"] for outcome in outcomes),
        round_medians_ms=tuple(percentile(samples, 50) / 1e6 for samples in rounds),
        cut_short=any(outcome["cut_short"] for outcome in outcomes),
        cores_used=sum(outcome["cores_used"] for outcome in outcomes) / len(outcomes),
        others_cores=max(outcome["others_cores"] for outcome in outcomes),
        preemptions=sum(outcome["preemptions"] for outcome in outcomes),
        kernel_nodes=last["executed"]["kernel_nodes"],
        executed=last["executed"]["nodes"],
        time_us=last["executed"]["time_us"],
        attention_flops=attention_flops,
        sgemm_gflops=max(sgemm, default=None),
        drift=max(drifts, key=abs, default=None),
        samples_ns=rounds,
    )
