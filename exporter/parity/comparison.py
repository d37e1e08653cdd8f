"""Run one case everywhere and judge what comes out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ExportFailed
from ..manifest import Manifest, OutputRecord
from .cases import LONGEST, Case
from .errors_between import Array, Error, meaningful, measure, token_mask
from .inputs import Feed, numpy_type
from .judging import judge_output
from .report import CaseReport, Judged, OutputReport
from .tolerances import Overrides, Scale, computed_in, unit_roundoff

if TYPE_CHECKING:
    from .runners import RuntimePath, TorchRunners

ORIGINAL_LONGEST = LONGEST
"""The original model is run where ``batch · length²`` is at most the square of this: it may be quadratic in both."""


@dataclass(frozen=True)
class Comparison:
    """Everything that runs, and how it is judged.

    Attributes:
        manifest: The bundle's manifest.
        torch: The model in torch.
        paths: Ways through the runtime.
        overrides: Tolerances that the user gave.
        original_longest: Run the original model where ``batch · length²`` is at most the square of this.
    """

    manifest: Manifest
    torch: TorchRunners
    paths: Sequence[RuntimePath]
    overrides: Overrides
    original_longest: int

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Activate every runner."""
        torch = (self.torch.oracle, self.torch.own, self.torch.unconverted, self.torch.original)
        runners = [*torch, *(path.runner for path in self.paths)]
        with contextlib.ExitStack() as stack:
            for runner in runners:
                if runner is not None:
                    stack.enter_context(runner)
            stack.enter_context(_quiet_models())
            yield

    def run(self, case: Case, feed: Feed) -> CaseReport:
        """Run one case everywhere and judge it; nothing of it stays in memory."""
        original, why_not, refused = self._original(case, feed)
        try:
            oracle = infer(self.torch.oracle, feed)
            own = infer(self.torch.own, feed)
            unconverted = None if self.torch.unconverted is None else infer(self.torch.unconverted, feed)
        except Exception as error:  # whatever the model raises for an input that it refuses
            if isinstance(error, ExportFailed):
                raise
            reason = f"the pattern in torch: {_first_line(error)}"
            return CaseReport(case, (), why_not, reason) if refused else self._broken(case, reason, why_not)
        runtime: dict[str, dict[str, Array] | str] = {}
        for path in self.paths:
            if path.runner is not None:
                try:
                    runtime[path.name] = infer(path.runner, feed)
                except Exception as error:  # exceptions of runtimes have no common class
                    runtime[path.name] = f"{path.runtime}: {_first_line(error)}"
        outputs = tuple(
            self._judge(record, case, feed, oracle, own, unconverted, original, runtime)
            for record in self.manifest.outputs
        )
        return CaseReport(case, outputs, why_not)

    def _original(self, case: Case, feed: Feed) -> tuple[dict[str, Array] | None, str, bool]:
        """Outputs of the original model, or why there are none; and whether the model itself refuses the input."""
        if self.torch.original is None:
            return None, "the model calls longspan operators itself", False
        if case.batch * case.length**2 > self.original_longest**2:
            return None, f"batch x length² is beyond that of --original-max-length {self.original_longest}", False
        try:
            return infer(self.torch.original, feed), "", False
        except Exception as error:  # whatever the model raises for an input that it refuses
            if isinstance(error, ExportFailed):
                raise
            return None, f"the original model fails: {_first_line(error)}", True

    def _broken(self, case: Case, reason: str, why_not: str) -> CaseReport:
        """The report of an input that the intercepted model fails on, and the original does not, as far as is known."""
        failure = Judged(Error.failure(reason), 0.0)
        outputs = tuple(
            OutputReport(record.name, record.dtype, 0.0, 0.0, 0, 0, {}, failure) for record in self.manifest.outputs
        )
        return CaseReport(case, outputs, why_not)

    def _judge(
        self,
        record: OutputRecord,
        case: Case,
        feed: Feed,
        oracle: dict[str, Array],
        own: dict[str, Array],
        unconverted: dict[str, Array] | None,
        original: dict[str, Array] | None,
        runtime: dict[str, dict[str, Array] | str],
    ) -> OutputReport:
        name = record.name
        truth = oracle[name]
        tokens = meaningful(record, token_mask(feed, self.manifest.inputs))
        # Where torch itself has no finite value (the mean over a row of nothing but padding) there is nothing to prove.
        defined = np.isfinite(truth)
        everywhere = None
        if not defined.all():
            everywhere = defined | np.broadcast_to(True if tokens is None else tokens, truth.shape)
        magnitude = float(np.abs(truth, where=defined, out=np.zeros_like(truth)).max(initial=0.0))
        scale = Scale.of(self.manifest.sites, self.torch.width, case.length)
        lowering = {
            path: Judged(Error.failure(got) if isinstance(got, str) else measure(got[name], truth, everywhere), 0.0)
            for path, got in runtime.items()
        }
        approximation = None
        if original is not None:
            must_be_equal = 0.0 if self._same_formula(case) else None
            approximation = Judged(measure(truth, original[name], tokens), must_be_equal)
        dtype = computed_in(record.dtype, self.paths[0].dtype)
        explained = None
        if unconverted is not None and dtype != record.dtype:
            error = measure(unconverted[name], truth, everywhere).max_abs
            explained = error * unit_roundoff(numpy_type(dtype)) / unit_roundoff(numpy_type(record.dtype))
        output = OutputReport(
            name=name,
            dtype=dtype,
            magnitude=magnitude,
            torch_error=measure(own[name], truth, everywhere).max_abs,
            terms=scale.terms,
            depth=scale.depth,
            lowering=lowering,
            approximation=approximation,
            explained=explained,
        )
        return judge_output(output, self.overrides)

    def _same_formula(self, case: Case) -> bool:
        """Whether the pattern computes what the original model does on inputs like this one.

        It does everywhere where the adapter claims so, and where a window that was cut into dense attention holds the
        whole text.
        """
        window, always_global = self.manifest.conversion.window, self.manifest.conversion.global_tokens
        return self.manifest.faithful or (window is not None and case.length <= window // 2 + 1 + always_global)


@contextlib.contextmanager
def _quiet_models() -> Iterator[None]:
    """Hold back the hints that transformers gives while its models run."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def infer(runner: Any, feed: Feed) -> dict[str, Array]:
    """Outputs of a Polygraphy runner, without its log."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        outputs: dict[str, Array] = dict(runner.infer(feed))
    return outputs


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
