"""A windowed decoder of random weights as an engine for a server: built, checked, timed, put into a Triton repository.

Where TensorRT is, that is an engine with the longspan plugin. Elsewhere the graph for it is made, with its GPU kernels,
and ONNX Runtime takes the engine's place.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

CONFIG = Path(os.path.relpath(Path(__file__).parents[1] / "windowed_decoder" / "config.json"))
ENGINE = "server"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("out/datacenter_engine"), help="folder of bundle and repository"
    )
    parser.add_argument("--quick", action="store_true", help="short lengths and one kind of GPU, for the tests")
    arguments = parser.parse_args()
    out, quick = arguments.out, arguments.quick
    bundle, repository = out / "bundle", out / "triton"
    longspan("export", CONFIG, bundle, "--random-weights", "--force")
    shapes = ("--opt-shapes", "input_ids:[4,1024]", "--max-shapes", "input_ids:[8,2048]")
    gpus = "sm80" if quick else "sm80,sm90"
    tensorrt = ("build", bundle, "--target", "tensorrt", "--dtype", "fp16", *shapes)
    if longspan(
        *tensorrt, "--name", ENGINE, "--require-kernel", "--timing-cache", out / "timing.cache", allowed=(0, 4)
    ):
        print("TensorRT is not here, so the engine cannot be built. Its graph can, with kernels for servers' GPUs:\n")
        longspan(*tensorrt, "--name", "server-graph", "--graph-only", "--force", "--compute-capability", gpus)
        longspan("build", bundle, "--target", "ort", "--name", ENGINE)
    longspan("check", bundle, "--engine", ENGINE, "--max-length", 100 if quick else 500)
    if not quick:
        longspan("bench", bundle, "--engine", ENGINE, "--lengths", "512,1024,2048")
    longspan(
        "package", bundle, "--engine", ENGINE, "--name", "windowed_decoder", "--triton-server", repository, "--force"
    )
    print((repository / "README.md").read_text(encoding="utf-8"))


def longspan(command: str, *arguments: object, allowed: tuple[int, ...] = (0,)) -> int:
    """Run one command as a user would; stop where it fails otherwise than is allowed."""
    words = [command, *map(str, arguments)]
    print("$ longspan " + shlex.join(words), flush=True)
    finished = subprocess.run([Path(sys.executable).with_name("longspan"), *words], check=False)
    if finished.returncode not in allowed:
        sys.exit(finished.returncode)
    print(flush=True)
    return finished.returncode


if __name__ == "__main__":
    main()
