"""Sparse Transformer's two forms, of random weights: export both, check them beyond their stride, see the savings."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

MODEL = Path(os.path.relpath(Path(__file__).parents[1] / "models" / "sparse_transformer.py"))
FORMS = ("strided", "strided_heads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/sparse_transformer"), help="folder of the bundles")
    parser.add_argument("--quick", action="store_true", help="check short texts only")
    arguments = parser.parse_args()
    for form in FORMS:
        out = arguments.out / form
        longspan("export", f"{MODEL}:{form}", out, "--force")
        longspan("check", out, "--max-length", 70 if arguments.quick else 200)
        longspan("inspect", out, "--length", 4096)


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
