"""Models that call flex_attention: PyTorch's own eager result, in float64, is the truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from longspan.exporter import SourceRequest, check, export
from longspan.exporter.conversion import UNCHANGED
from longspan.exporter.errors import ExportFailed
from longspan.exporter.families import find_family
from longspan.exporter.families.examples import Examples, carry
from longspan.exporter.families.flex.family import FLEX_ATTENTION
from longspan.exporter.families.flex.survey import survey
from longspan.exporter.manifest import SourceRecord
from longspan.exporter.parity.oracle import float64_arithmetic, float64_copy
from longspan.exporter.patterns import Tabulated
from longspan.exporter.sites.record import longspan_nodes
from longspan.exporter.sources import Source
from longspan.exporter.sources.base import record_input
from torch import nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from . import flex_models as models
from .family_checks import TOLERANCE, export_graph, run_session, session_of
from .flex_models import CASES, CHANNELS, LENGTH, Attention, of

pytestmark = pytest.mark.usefixtures("one_thread")

# Around the blocks of 16, the windows and periods of the cases, and the longest that their tables allow.
SIZES = ((1, 1), (3, 7), (1, 15), (2, 16), (1, 17), (3, 33), (1, LENGTH), (1, models.DOCUMENTS))

# The scores of these models are below 32, their values below 8: float32 is good for a few times 1e-6 of that.
FLOAT32 = 4e-6

EXPORTED = ("global", "documents", "heads by kind", "alibi, window", "everything")
"""Cases that are run in ONNX Runtime: one of each way to get lists, masks and biases into the graph."""


def prepared(model: nn.Module, dynamic: Any = None, **more: torch.Tensor) -> nn.Module:
    """A model that carries example inputs."""
    inputs = {"x": torch.randn(2, LENGTH, CHANNELS, generator=torch.Generator().manual_seed(1)), **more}
    carry(model.eval(), Examples(inputs, dynamic))
    return model


def made(name: str) -> nn.Module:
    """The model of a case, the same every time."""
    torch.manual_seed(0)
    return prepared(CASES[name][0]())


def both(model: nn.Module, **inputs: torch.Tensor) -> tuple[Any, Any]:
    """What a model returns intercepted, and by PyTorch's own flex_attention; all in float64."""
    with torch.no_grad():
        with FLEX_ATTENTION.intercept(model, UNCHANGED), float64_arithmetic():
            ours = model(**inputs)
        with FLEX_ATTENTION.original(model), float64_arithmetic():
            theirs = model(**inputs)
    return ours, theirs


def texts(batch: int, length: int) -> torch.Tensor:
    return torch.randn(
        batch, length, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(batch * 1000 + length)
    )


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_what_flex_attention_computes(name: str) -> None:
    model = made(name)
    assert FLEX_ATTENTION.sites(model, UNCHANGED) == ["Attention"]
    double = float64_copy(model)
    for batch, length in SIZES:
        ours, theirs = both(double, x=texts(batch, length))
        assert float((ours[0] - theirs[0]).abs().max()) < TOLERANCE, (batch, length)


@pytest.mark.parametrize("name", ["documents", "relative table", "relative table, fixed"])
def test_a_tensor_that_ends_is_the_longest_text(name: str) -> None:
    assert FLEX_ATTENTION.max_length(made(name)) == models.DOCUMENTS


def test_other_masks_have_no_longest_text() -> None:
    assert FLEX_ATTENTION.max_length(made("alibi")) is None


def source_of(model: nn.Module, **more: torch.Tensor) -> Source:
    inputs = {"x": torch.randn(2, LENGTH, CHANNELS), **more}
    record = SourceRecord(kind="factory", location="a.py:f", model_class="Attention", files={}, seed=0)
    records = {name: record_input(name, value) for name, value in inputs.items()}
    return Source(record, model, inputs, None, records, None)


@pytest.mark.parametrize("name", EXPORTED)
def test_a_graph_of_any_length(name: str, tmp_path: Path, kernel_library: str) -> None:
    model = made(name)
    graph = export_graph(source_of(model), FLEX_ATTENTION)
    assert [node.op_type for node in longspan_nodes(graph)] == [CASES[name][1]]
    double = float64_copy(model)
    sessions = [session_of(graph, tmp_path / "model.onnx", library) for library in ("", kernel_library)]
    for batch, length in SIZES:
        x = texts(batch, length).float()
        with torch.no_grad(), FLEX_ATTENTION.original(double), float64_arithmetic():
            truth = double(x=x.double())[0]
        for session in sessions:
            error = float((run_session(session, {"x": x}) - truth).abs().max())
            assert error < FLOAT32, (batch, length)


def test_export_and_check(tmp_path: Path) -> None:
    source = f"{models.__file__}:stack"
    bundle = export(source, tmp_path / "bundle")
    assert [site.layer for site in bundle.manifest.sites] == ["layers.0", "layers.1"]
    assert bundle.manifest.family == "flex-attention"
    report = check(bundle.path, source=source, lengths=[1, 16, 33])
    assert report.passed
    assert all(case.original is not None for case in report.cases if case.case.length > 1)


def padding_of(batch: int, length: int) -> torch.Tensor:
    padding = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) > 0.3
    padding[0] = True
    padding[-1] = length < 4
    return padding


def test_padding_that_the_mask_hides() -> None:
    model, inputs = models.padded()
    double = float64_copy(prepared(model, padding=inputs["padding"]))
    for batch, length in SIZES:
        feed = {"x": texts(batch, length), "padding": padding_of(batch, length)}
        ours, theirs = both(double, **feed)
        assert float((ours[0] - theirs[0]).abs().max()) < TOLERANCE, (batch, length)


def documents_of(batch: int, length: int) -> torch.Tensor:
    """Numbers of documents: in a row, and in the last of three entries in any order."""
    numbers = torch.arange(length).expand(batch, -1) // torch.tensor([[23], [40], [9]])[:batch]
    if batch == 3:
        numbers[-1] = torch.randint(0, 4, (length,), generator=torch.Generator().manual_seed(length))
    return numbers


def test_documents_that_the_inputs_say() -> None:
    model, inputs = models.packed()
    model = prepared(model, padding=inputs["padding"])
    meaning = survey(model).calls[0]
    assert (meaning.documents, meaning.causal, meaning.pattern) == (".layer.padding", True, None)
    double = float64_copy(model)
    for batch, length in SIZES:
        ours, theirs = both(double, x=texts(batch, length), padding=documents_of(batch, length))
        assert float((ours[0] - theirs[0]).abs().max()) < TOLERANCE, (batch, length)


def test_a_graph_that_finds_the_blocks_of_documents(tmp_path: Path, kernel_library: str) -> None:
    model, inputs = models.packed()
    model = prepared(model, padding=inputs["padding"])
    graph = export_graph(source_of(model, padding=inputs["padding"]), FLEX_ATTENTION)
    double = float64_copy(model)
    sessions = [session_of(graph, tmp_path / "model.onnx", library) for library in ("", kernel_library)]
    for batch, length in SIZES:
        feed = {"x": texts(batch, length).float(), "padding": documents_of(batch, length)}
        with torch.no_grad(), FLEX_ATTENTION.original(double), float64_arithmetic():
            truth = double(x=feed["x"].double(), padding=feed["padding"])[0]
        for session in sessions:
            assert float((run_session(session, feed) - truth).abs().max()) < FLOAT32, (batch, length)


def test_documents_that_differ_between_batch_entries() -> None:
    model = Attention(models.documents_by_entry, batched=True)
    model = prepared(model, {"x": {1: torch.export.Dim("sequence")}})
    double = float64_copy(model)
    assert survey(model).calls[0].frozen.arrays["kv_num_blocks"].shape[0] == 2
    for length in (1, 16, 50, models.DOCUMENTS):
        ours, theirs = both(double, x=texts(2, length))
        assert float((ours[0] - theirs[0]).abs().max()) < TOLERANCE, length


def test_the_log_sum_exp() -> None:
    model = Attention(of(models.uneven), models.alibi, return_aux=AuxRequest(lse=True))
    double = float64_copy(prepared(model))
    (ours, aux), (theirs, their_aux) = both(double, x=texts(2, 41))
    assert float((ours - theirs).abs().max()) < TOLERANCE
    assert aux.lse.shape == their_aux.lse.shape == (2, 4, 41)
    assert float((aux.lse - their_aux.lse).abs().max()) < TOLERANCE
    assert aux.max_scores is None


def test_rows_without_a_key_are_zero() -> None:
    model = Attention(of(lambda b, h, q, k: (k < q) & (q - k < 9)), return_lse=True)
    double = float64_copy(prepared(model))
    (ours, lse), (theirs, their_lse) = both(double, x=texts(2, 41))
    assert float((ours - theirs).abs().max()) < TOLERANCE
    assert torch.equal(lse[..., 0], torch.full_like(lse[..., 0], -torch.inf))
    assert torch.equal(lse[..., 0], their_lse[..., 0])


class OwnLists(nn.Module):
    """Block lists of the model's own, with and without a mask for partial blocks."""

    def __init__(self, mask_mod: Any = None) -> None:
        super().__init__()
        self.mask = BlockMask.from_kv_blocks(
            torch.tensor([[[2, 1, 1, 2]]], dtype=torch.int32),
            torch.tensor([[[[3, 0, 9], [2, 9, 9], [1, 9, 9], [0, 4, 9]]]], dtype=torch.int32),
            torch.tensor([[[1, 0, 2, 0]]], dtype=torch.int32),
            torch.tensor([[[[1, 0], [0, 0], [3, 0], [0, 0]]]], dtype=torch.int32),
            BLOCK_SIZE=(16, 12),
            mask_mod=mask_mod,
            seq_lengths=(60, 57),
            compute_q_blocks=False,
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        """(B, 60, C) in and out."""
        heads = x.unflatten(2, (4, 8)).transpose(1, 2)
        keys = heads[:, :, :57].flip(2)
        return (flex_attention(heads * 3, keys, keys, block_mask=self.mask).transpose(1, 2).flatten(2),)


@pytest.mark.parametrize("mask_mod", [None, models.uneven], ids=["lists alone", "with a mask"])
def test_block_lists_of_the_models_own(mask_mod: Any) -> None:
    model = OwnLists(mask_mod).eval()
    carry(model, Examples({"x": torch.randn(2, 60, CHANNELS)}, {"x": {0: torch.export.Dim("batch")}}))
    for batch in (1, 3):
        ours, theirs = both(model, x=texts(batch, 60))
        assert float((ours[0] - theirs[0]).abs().max()) < TOLERANCE


def test_a_mask_that_knows_the_length() -> None:
    class Clipped(Attention):
        def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> Any:
            length = x.shape[1]
            self.mask = of(lambda b, h, q, k: (q - k <= 11) & (k <= q) & (k < length))
            return super().forward(x, padding)

    model = prepared(Clipped())
    double = float64_copy(model)
    assert str(survey(model).calls[0].pattern) == "window of 11 left, 0 right"
    for batch, length in SIZES:
        ours, theirs = both(double, x=texts(batch, length))
        assert float((ours[0] - theirs[0]).abs().max()) < TOLERANCE


compiled = torch.compile(flex_attention)


class Wrapped(nn.Module):
    """Calls a compiled flex_attention, with masks from a cache."""

    masks: dict[int, Any]

    def __init__(self) -> None:
        super().__init__()
        self.masks = {}

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        """(B, S, C) in and out."""
        length = x.shape[1]
        if length not in self.masks:
            self.masks[length] = create_block_mask(models.uneven, None, None, length, length, "cpu", BLOCK_SIZE=16)
        heads = x.unflatten(2, (4, 8)).transpose(1, 2)
        return (compiled(heads, heads, heads, block_mask=self.masks[length]).transpose(1, 2).flatten(2),)


def test_a_compiled_wrapper_and_a_cache_of_masks() -> None:
    model = prepared(Wrapped())
    assert isinstance(survey(model).calls[0].pattern, Tabulated)
    # The mask that the survey left in the cache is met by PyTorch itself.
    ours, theirs = both(model, x=texts(2, LENGTH))
    assert float((ours[0] - theirs[0]).abs().max()) < TOLERANCE


def test_nothing_stays_intercepted() -> None:
    before = flex_attention.__code__, create_block_mask.__code__, flex_attention.__kwdefaults__
    model = made("window")
    with pytest.raises(ZeroDivisionError), FLEX_ATTENTION.intercept(model, UNCHANGED):
        raise ZeroDivisionError
    assert before == (flex_attention.__code__, create_block_mask.__code__, flex_attention.__kwdefaults__)


def test_a_model_without_flex_attention_is_left_alone() -> None:
    model = prepared(nn.Linear(CHANNELS, CHANNELS))
    assert FLEX_ATTENTION.sites(model, UNCHANGED) == []
    assert find_family(nn.Linear(2, 2), UNCHANGED) is None


class Late(nn.Module):
    """Its block mask was made before, for one length."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = create_block_mask(models.causal, None, None, LENGTH, LENGTH, "cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, C) in and out."""
        heads = x.unflatten(2, (4, 8)).transpose(1, 2)
        return flex_attention(heads, heads, heads, block_mask=self.mask)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "positions": (
        lambda: Attention(None, of(lambda s, b, h, q, k: s + 0.1 * q)),
        "depends on q_idx beyond the distance k - q",
    ),
    "heads scale": (
        lambda: Attention(None, lambda layer: lambda s, b, h, q, k: s * layer.slopes[h]),
        "changes scores in a way that depends on the head",
    ),
    "cap after bias": (
        lambda: Attention(
            None, lambda layer: lambda s, b, h, q, k: 9 * torch.tanh((s + layer.slopes[h] * (k - q)) / 9)
        ),
        "changes scores in a way that depends on",
    ),
    "relu": (lambda: Attention(None, of(lambda s, b, h, q, k: torch.relu(s))), "neither a multiple of the score nor"),
    "batch bias": (lambda: Attention(None, of(lambda s, b, h, q, k: s + b)), "depends on the batch index"),
    "large negative": (
        lambda: Attention(None, of(lambda s, b, h, q, k: torch.where(q >= k, s, -1e9))),
        "changes scores in a way that depends on",
    ),
    "no rule": (lambda: Attention(of(lambda b, h, q, k: k <= q // 2)), "follows no rule that holds at every length"),
    "of the length": (
        lambda: Attention(lambda layer: lambda b, h, q, k: (q - k).abs() * 8 < layer.length),
        "seen in a text of one length and hidden in another",
    ),
    "heads untold": (lambda: Attention(of(models.per_head)), "create_block_mask with H=4"),
    "largest scores": (lambda: Attention(return_aux=AuxRequest(max_scores=True)), "largest scores"),
    "made before": (Late, "its BlockMask is for 75 queries and 75 keys"),
}


FIXED = {"x": {0: torch.export.Dim("batch")}}


def test_a_mask_that_was_made_before_is_for_its_length() -> None:
    model = prepared(Late(), FIXED)
    assert str(survey(model).calls[0].pattern) == "causal"
    ours, theirs = both(model, x=texts(3, LENGTH))
    assert float((ours - theirs).abs().max()) < TOLERANCE


def test_a_mask_without_a_rule_is_for_one_length(tmp_path: Path, kernel_library: str) -> None:
    model = prepared(Attention(of(lambda b, h, q, k: k <= q // 2)), FIXED)
    double = float64_copy(model)
    ours, theirs = both(double, x=texts(3, LENGTH))
    assert float((ours[0] - theirs[0]).abs().max()) < TOLERANCE
    graph = export_graph(dataclasses.replace(source_of(model), dynamic_shapes=FIXED), FLEX_ATTENTION)
    session = session_of(graph, tmp_path / "model.onnx", kernel_library)
    error = (run_session(session, {"x": texts(3, LENGTH).float()}) - theirs[0]).abs().max()
    assert float(error) < FLOAT32
    assert session.get_inputs()[0].shape == ["batch", LENGTH, CHANNELS]


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_operator_computes_is_refused(name: str) -> None:
    make, words = REFUSED[name]
    model = make()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: setattr(module, "length", kwargs["x"].shape[1]), with_kwargs=True
    )
    with pytest.raises(ExportFailed, match=words) as failure:
        FLEX_ATTENTION.sites(prepared(model), UNCHANGED)
    assert "next step: " in str(failure.value)
    assert "\n" not in str(failure.value)


DATA_REFUSED: dict[str, Callable[[Attention], Any]] = {
    "a prefix": lambda layer: lambda b, h, q, k: (k <= q) | (k < layer.padding[b, 0]),
    "neighbours": lambda layer: lambda b, h, q, k: (layer.padding[b, q] - layer.padding[b, k]).abs() <= 1,
    "heads": lambda layer: lambda b, h, q, k: (layer.padding[b, q] == layer.padding[b, k]) & ((q - k) % (h + 1) == 0),
}


@pytest.mark.parametrize("name", DATA_REFUSED)
def test_other_masks_of_the_inputs_are_refused(name: str) -> None:
    numbers = torch.arange(LENGTH).expand(2, -1) // 20
    model = prepared(Attention(DATA_REFUSED[name], told=4), padding=numbers)
    with pytest.raises(ExportFailed, match="reads a tensor that is computed from the model's inputs") as failure:
        FLEX_ATTENTION.sites(model, UNCHANGED)
    assert "next step: " in str(failure.value)


def test_a_refusal_ends_the_export(tmp_path: Path) -> None:
    file = tmp_path / "refused.py"
    file.write_text(
        "import torch\n"
        "from torch import nn\n"
        "from torch.nn.attention.flex_attention import flex_attention\n"
        "class Model(nn.Module):\n"
        "    def forward(self, x):\n"
        "        heads = x.unflatten(2, (4, 8)).transpose(1, 2)\n"
        "        return flex_attention(heads, heads, heads, score_mod=lambda s, b, h, q, k: s * (1 + q))\n"
        "def factory():\n"
        "    return Model(), {'x': torch.randn(2, 40, 32)}\n"
    )
    with pytest.raises(ExportFailed, match="Model: the score_mod changes scores in a way that depends on q_idx"):
        export(SourceRequest(f"{file}:factory"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
