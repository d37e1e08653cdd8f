"""A decoder with a sliding window, of random weights: export it, check it beyond its window, inspect it."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

CONFIG = Path(os.path.relpath(Path(__file__).with_name("config.json")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/windowed_decoder"), help="folder of the bundle")
    out = parser.parse_args().out
    longspan("export", CONFIG, out, "--random-weights", "--force")
    longspan("check", out, "--max-length", 200)
    longspan("inspect", out, "--length", 2048)


def longspan(command: str, *arguments: object) -> None:
    """Run one command as a user would; stop where it fails."""
    words = [command, *map(str, arguments)]
    print("$ longspan " + shlex.join(words), flush=True)
    finished = subprocess.run([Path(sys.executable).with_name("longspan"), *words], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    print(flush=True)


if __name__ == "__main__":
    main()
