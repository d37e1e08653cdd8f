"""A BigBird of random weights: export it, check it where its attention turns sparse, serve texts of all lengths."""

from __future__ import annotations

import argparse
import copy
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from longspan.exporter import SourceRequest
from longspan.exporter.sources import load_source
from longspan.plugins import ort_library_path
from transformers.utils import logging

CONFIG = Path(os.path.relpath(Path(__file__).with_name("config.json")))
SHORT = (5 + 2 * 3) * 16
"""Longest text that gets full attention, in tokens: two global blocks, three of the window, 2 · num_random_blocks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/bigbird"), help="folder of the bundle")
    parser.add_argument("--quick", action="store_true", help="short lengths only, for the tests")
    arguments = parser.parse_args()
    longspan("export", CONFIG, arguments.out, "--random-weights", "--force")
    longspan("check", arguments.out, "--max-length", 200 if arguments.quick else 1000)
    longspan("inspect", arguments.out, "--length", 4096)
    serve(arguments.out, [SHORT, SHORT + 1, 300] if arguments.quick else [20, SHORT, SHORT + 1, 1000, 4000])


def longspan(command: str, *arguments: object) -> None:
    """Run one command as a user would; stop where it fails."""
    words = [command, *map(str, arguments)]
    print("$ longspan " + shlex.join(words), flush=True)
    finished = subprocess.run([Path(sys.executable).with_name("longspan"), *words], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    print(flush=True)


def serve(bundle: Path, lengths: list[int]) -> None:
    """Answer texts of several lengths by the exported file, and by the model in torch, which remembers a short text."""
    logging.set_verbosity_error()
    model: Any = load_source(SourceRequest(str(CONFIG), random_weights=True)).model
    used = copy.deepcopy(model)
    embed(used, tokens(20))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(ort_library_path())
    session = onnxruntime.InferenceSession(bundle / "model.onnx", options)
    print("largest difference to the model in torch, of its outputs' range -1 … 1")
    print("tokens   exported   torch, after a text of 20 tokens")
    for length in lengths:
        ids = tokens(length)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        (pooled,) = session.run(["pooler_output"], feed)
        truth = embed(copy.deepcopy(model), ids)
        exported, after = (float(np.abs(other - truth).max()) for other in (pooled, embed(used, ids)))
        print(f"{length:6,}   {exported:8.0e}   {after:8.0e}")


def tokens(length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Token ids (1, length), always the same."""
    return np.random.default_rng(length).integers(3, 1024, (1, length))


def embed(model: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The pooled output of a model in torch."""
    with torch.no_grad():
        pooled: np.ndarray[Any, np.dtype[np.float32]] = model(torch.from_numpy(ids)).pooler_output.numpy()
    return pooled


if __name__ == "__main__":
    main()
