"""Runs in the place of `longspan.exporter.throughput.engine_trial`, with ONNX Runtime instead of TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from inference_stand_in import Session  # type: ignore[import-not-found]
from longspan.exporter.engines.running.exchange import Array
from longspan.exporter.throughput import engine_trial
from longspan.exporter.throughput.trial import main


class Device:
    """What `engine_trial.Device` does, with the session of the other stand-in."""

    def __init__(self, module: str) -> None:
        self._session = Session()
        self._session.hello(module)

    def open(self, engine: Path, library: str | None) -> list[list[str]]:
        layers: list[list[str]] = self._session.open(str(engine), library)["layers"]
        return layers

    def first(self, feed: Mapping[str, Array], profile: int) -> dict[str, Array]:
        return self._session.infer(feed, profile)[0]

    def keep(self, feed: Mapping[str, Array]) -> None:
        self._feed = feed

    def run(self) -> None:
        self._session.infer(self._feed, 0)


if __name__ == "__main__":
    engine_trial.Device = Device  # type: ignore[assignment, misc]
    main(engine_trial.run)
