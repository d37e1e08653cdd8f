"""What every kind of MODEL argument is loaded into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..manifest import InputRecord, SourceRecord

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

BATCH = "batch"
SEQUENCE = "sequence"

# Examples avoid 0 and 1, which torch.export specialises, and powers of two, which hide alignment assumptions.
EXAMPLE_BATCH = 2
EXAMPLE_LENGTH = 150


FACTORY = "factory"
PROGRAM = "program"


def form_of(location: str) -> str:
    """`FACTORY`, `PROGRAM`, or empty for whatever transformers loads."""
    if Path(location).suffix == ".pt2":
        return PROGRAM
    path, separator, _ = location.rpartition(":")
    return FACTORY if separator and path.endswith(".py") else ""


def file_of(location: str) -> str:
    """The file or folder of a location, without the name of a factory."""
    return location.rpartition(":")[0] if form_of(location) == FACTORY else location


@dataclass(frozen=True)
class SourceRequest:
    """Which model to load and what that may do.

    Attributes:
        location: Folder, configuration file, ``file.py:factory``, ``.pt2`` or hub id.
        random_weights: Draw small random weights of the same architecture instead of reading weights.
        seed: Seed of random weights and example inputs.
        allow_pickle: Read weights that are stored as pickles, which can run any code.
        trust_remote_code: Let the model's own Python code run.
        inputs: Forward inputs to trace with; empty for the default choice.
        revision: Commit of a model of the hub; empty for its newest.
    """

    location: str
    random_weights: bool = False
    seed: int = 0
    allow_pickle: bool = False
    trust_remote_code: bool = False
    inputs: tuple[str, ...] = ()
    revision: str = ""

    @classmethod
    def again(
        cls,
        record: SourceRecord,
        location: str | None = None,
        *,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
    ) -> SourceRequest:
        """The request that loads what `record` describes, optionally from where it is now.

        Permissions are the caller's to give: a record says what was allowed once, and anybody can write one.
        """
        return cls(
            location=location or record.location,
            random_weights=record.random_weights,
            seed=record.seed,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            inputs=record.inputs,
            # Another place has other commits.
            revision=record.revision if location in (None, record.location) else "",
        )


@dataclass(frozen=True)
class Source:
    """A loaded model, ready to be traced.

    Attributes:
        record: Where it came from.
        model: The module in evaluation mode, or an exported program.
        example_inputs: Forward inputs by name.
        dynamic_shapes: ``torch.export`` specification of the dimensions that vary, as the user gave it; None for batch
            and sequence in dimensions 0 and 1 of every input.
        input_records: How to draw other inputs, by name; the file that is written decides names and shapes.
        max_length: Longest sequence that the model accepts; None when unlimited.
    """

    record: SourceRecord
    model: nn.Module | ExportedProgram
    example_inputs: Mapping[str, torch.Tensor]
    dynamic_shapes: Any
    input_records: Mapping[str, InputRecord]
    max_length: int | None


def record_input(name: str, example: torch.Tensor, vocabulary: tuple[int, int] | None = None) -> InputRecord:
    """Describe how to draw an input like `example`.

    Args:
        name: Forward name; ``…attention_mask`` names are masks.
        example: Example value; integers are drawn from its range.
        vocabulary: Smallest and largest token id, where `name` holds tokens.
    """
    role = "data"
    low, high = 0, 1
    if name == "global_attention_mask":
        role = "global_mask"
    elif name == "attention_mask" and example.dim() == 2:
        role = "padding_mask"
    elif vocabulary is not None:
        role, (low, high) = "tokens", vocabulary
    elif not example.is_floating_point() and example.numel():
        low, high = int(example.min()), int(example.max())
    shape = (BATCH, SEQUENCE, *example.shape[2:])[: example.dim()]
    return InputRecord(name, str(example.dtype).removeprefix("torch."), shape, role, low, high)


def max_length(model: Any) -> int | None:
    """Tokens that a model accepts, from its table of positions or its configuration; None when unlimited."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and hasattr(module, "num_embeddings"):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return int(module.num_embeddings - first)
    config = getattr(model, "config", None)
    limit = getattr(config, "max_encoder_position_embeddings", None) or getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None
