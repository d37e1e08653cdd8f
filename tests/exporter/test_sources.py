"""What MODEL may be, and what is refused before any of its code runs."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from longspan.exporter.errors import ExportFailed, InvalidRequest
from longspan.exporter.sources import SourceRequest, load_source
from longspan.exporter.sources.program import _is_arithmetic, refuse_code
from transformers import BertConfig, BertModel

from .models import BERT, LONGFORMER, write_config

FACTORY = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
    def forward(self, x):
        return self.linear(x)

def make():
    return Model(), {"x": torch.randn(2, 9, 8)}

def shaped():
    return Model(), {"x": torch.randn(2, 9, 8)}, {"x": {1: torch.export.Dim("sequence")}}

def wrong():
    return Model()

def broken():
    raise RuntimeError("no weights today")
"""


@pytest.fixture
def factory_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(FACTORY)
    return path


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    BertModel(BertConfig(**{k: v for k, v in BERT.items() if k != "architectures"})).save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_is_read_and_hashed(bert_folder: Path) -> None:
    source = load_source(SourceRequest(str(bert_folder)))
    assert source.record.kind == "huggingface"
    assert set(source.record.files) == {"config.json", "model.safetensors"}
    assert list(source.example_inputs) == ["input_ids", "attention_mask", "token_type_ids"]
    assert source.max_length == 64


def test_random_weights_are_the_same_every_time_and_follow_the_seed(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, LONGFORMER))
    first, second, other = (
        load_source(SourceRequest(config, random_weights=True, seed=seed)).model.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_large_configuration_becomes_small_and_keeps_its_kind(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, LONGFORMER, num_hidden_layers=12, hidden_size=768, num_attention_heads=12, vocab_size=50265,
        attention_window=[32] * 12, intermediate_size=3072, sep_token_id=50264,
    )  # fmt: skip
    model = load_source(SourceRequest(str(config), random_weights=True)).model
    assert type(model).__name__ == "LongformerModel"
    assert sum(p.numel() for p in model.parameters()) < 500_000
    assert model.config.attention_window == [32, 32] and model.config.sep_token_id < model.config.vocab_size


@pytest.mark.parametrize(
    ("model_type", "model_class", "encoder", "kept"),
    [
        ("led", "LEDForConditionalGeneration", "LEDEncoder", {"attention_window": [32, 32], "d_model": 64}),
        (
            "longt5",
            "LongT5ForConditionalGeneration",
            "LongT5Stack",
            {"local_radius": 32, "global_block_size": 16, "relative_attention_num_buckets": 32, "d_kv": 16},
        ),
        (
            "bigbird_pegasus",
            "BigBirdPegasusForConditionalGeneration",
            "BigBirdPegasusEncoder",
            {"block_size": 16, "num_random_blocks": 3, "encoder_layers": 2},
        ),
        ("big_bird", "BigBirdModel", "BigBirdModel", {"block_size": 16, "num_random_blocks": 3}),
    ],
)
def test_sizes_of_patterns_become_small_and_counts_stay(
    model_type: str, model_class: str, encoder: str, kept: dict[str, Any], tmp_path: Path
) -> None:
    config = write_config(tmp_path, {"model_type": model_type, "architectures": [model_class]})
    source = load_source(SourceRequest(str(config), random_weights=True))
    model: Any = source.model
    assert type(model).__name__ == encoder
    assert source.record.encoder_of == ("" if encoder == model_class else model_class)
    assert {name: getattr(model.config, name) for name in kept} == kept
    # Tables of positions keep their length; all the rest is small.
    small = (weight.numel() for name, weight in model.named_parameters() if "position" not in name)
    assert sum(small) < 300_000


def test_inputs_can_be_chosen(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, LONGFORMER))
    source = load_source(SourceRequest(config, random_weights=True, inputs=("input_ids", "attention_mask")))
    assert list(source.example_inputs) == ["input_ids", "attention_mask"]
    with pytest.raises(InvalidRequest, match="not among input_ids"):
        load_source(SourceRequest(config, random_weights=True, inputs=("pixels",)))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("no/such/folder/anywhere", "no such file or folder"),
        ("missing.pt2", "no such file"),
        ("missing.py:make", "no such file"),
        ("notes.txt", "no such file or folder"),
    ],
)
def test_locations_that_do_not_exist_are_named(location: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        load_source(SourceRequest(location))


def test_a_configuration_needs_random_weights(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="add --random-weights"):
        load_source(SourceRequest(str(write_config(tmp_path, BERT))))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no config\.json"):
        load_source(SourceRequest(str(tmp_path)))


def test_pickled_weights_need_permission(bert_folder: Path) -> None:
    model = BertModel.from_pretrained(bert_folder)
    (bert_folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), bert_folder / "pytorch_model.bin")
    with pytest.raises(InvalidRequest, match="add --allow-pickle"):
        load_source(SourceRequest(str(bert_folder)))
    source = load_source(SourceRequest(str(bert_folder), allow_pickle=True))
    assert source.record.pickled_weights
    assert torch.equal(source.model.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight)


def test_remote_code_needs_permission(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}})
    )
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InvalidRequest, match="add --trust-remote-code"):
        load_source(SourceRequest(str(tmp_path)))
    assert not marker.exists()


def test_missing_weights_are_not_made_up(bert_folder: Path) -> None:
    config = json.loads((bert_folder / "config.json").read_text()) | {"architectures": ["BertForQuestionAnswering"]}
    (bert_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportFailed, match=r"lacks 2 weights of BertForQuestionAnswering: qa_outputs\.bias"):
        load_source(SourceRequest(str(bert_folder)))


def test_a_factory_is_called(factory_file: Path) -> None:
    source = load_source(SourceRequest(f"{factory_file}:make"))
    assert source.record.kind == "factory" and source.dynamic_shapes is None
    assert source.input_records["x"].shape == ("batch", "sequence", 8)
    assert load_source(SourceRequest(f"{factory_file}:shaped")).dynamic_shapes is not None


def test_a_factory_says_which_dimensions_are_open(tmp_path: Path) -> None:
    file = tmp_path / "fixed.py"
    file.write_text(
        "import torch\n"
        "Dim = torch.export.Dim\n"
        "x = {'x': torch.zeros(2, 24, dtype=torch.int64)}\n"
        "def batch(): return torch.nn.Embedding(9, 4), x, {'x': {0: Dim('batch')}}\n"
        "def both(): return torch.nn.Embedding(9, 4), x, {'x': (Dim('batch'), Dim.AUTO)}\n"
        "def static(): return torch.nn.Embedding(9, 4), x, {'x': {0: Dim.STATIC, 1: Dim('n')}}\n"
        "def neither(): return torch.nn.Embedding(9, 4), x, {'x': None}\n"
    )
    found = {}
    for name in ("batch", "both", "static", "neither"):
        source = load_source(SourceRequest(f"{file}:{name}"))
        found[name] = source.input_records["x"].shape, source.max_length
    assert found == {
        "batch": (("batch", 24), 24),
        "both": (("batch", "sequence"), None),
        "static": ((2, "sequence"), None),
        "neither": ((2, 24), 24),
    }


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nothing", InvalidRequest, "has no function 'nothing'"),
        ("wrong", ExportFailed, "must return"),
        ("broken", ExportFailed, "RuntimeError: no weights today"),
    ],
)
def test_a_bad_factory_is_explained(factory_file: Path, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_source(SourceRequest(f"{factory_file}:{name}"))


class Doubler(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture
def program_file(tmp_path: Path) -> Path:
    path = tmp_path / "doubler.pt2"
    torch.export.save(torch.export.export(Doubler(), (torch.randn(2, 3),)), path)
    return path


def test_a_program_without_pickles_is_loaded(program_file: Path) -> None:
    source = load_source(SourceRequest(str(program_file)))
    assert source.record.kind == "program" and list(source.example_inputs) == ["x"]


def test_a_program_with_a_pickle_is_refused_before_it_runs(program_file: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(marker), "w")

    sample = tmp_path / "sample.pt"
    torch.save(((Evil(),), {}), sample)
    evil = tmp_path / "evil.pt2"
    with zipfile.ZipFile(program_file) as source, zipfile.ZipFile(evil, "w") as target:
        for item in source.infolist():
            content = sample.read_bytes() if "/sample_inputs/" in item.filename else source.read(item)
            target.writestr(item.filename, content)
    with pytest.raises(InvalidRequest, match="add --allow-pickle"):
        load_source(SourceRequest(str(evil)))
    assert not marker.exists()


def rewritten(source: Path, target: Path, change: dict[str, Callable[[bytes], bytes]], extra: dict[str, bytes]) -> Path:
    """Copy an archive with some members changed (by the end of their name) and some added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            for end, edit in change.items():
                content = edit(content) if item.filename.endswith(end) else content
            new.writestr(item.filename, content)
        for name, content in extra.items():
            new.writestr(name, content)
    return target


def test_a_program_with_a_compiled_library_is_refused(program_file: Path, tmp_path: Path) -> None:
    evil = rewritten(program_file, tmp_path / "evil.pt2", {}, {"doubler/data/aotinductor/model/m.wrapper.so": b"ELF"})
    with pytest.raises(InvalidRequest, match="is no part of a plain program"):
        load_source(SourceRequest(str(evil)))


def test_a_program_whose_shapes_are_code_is_refused_before_it_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    dims = {"x": {0: torch.export.Dim("n", max=77)}}
    torch.export.save(torch.export.export(Doubler(), (torch.randn(3, 3),), dynamic_shapes=dims), tmp_path / "good.pt2")
    refuse_code(tmp_path / "good.pt2")

    def inject(graph: bytes) -> bytes:
        code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
        changed = re.sub(rb'"expr_str": "[^"]*"', b'"expr_str": ' + json.dumps(code).encode(), graph)
        assert changed != graph
        return changed

    evil = rewritten(
        tmp_path / "good.pt2", tmp_path / "evil.pt2", {"/models/model.json": inject, "/models/good.json": inject}, {}
    )
    with pytest.raises(InvalidRequest, match="more than arithmetic"):
        load_source(SourceRequest(str(evil)))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("expression", "plain"),
    [
        ("s27", True),
        ("2*s27 + 1", True),
        ("Max(1, s0//2)", True),
        ("Eq(Mod(s0, 32), 0)", True),
        ("__import__('os')", False),
        ("s0.real", False),
        ("(lambda: 0)()", False),
        ("[s0]", False),
        ("open", False),
        ("Add(Symbol('s27', positive=True, integer=True), Integer(-3))", True),
        ("Symbol('os.system')", False),
        (None, False),
        ("Max(*s0)", False),
    ],
)
def test_only_arithmetic_passes_for_a_shape(expression: object, plain: bool) -> None:
    assert _is_arithmetic(expression) is plain


def test_a_program_knows_its_longest_input(tmp_path: Path) -> None:
    for name, dim in (("bounded", torch.export.Dim("s", max=77)), ("free", torch.export.Dim("s"))):
        program = torch.export.export(Doubler(), (torch.randn(3, 5),), dynamic_shapes={"x": {1: dim}})
        torch.export.save(program, tmp_path / f"{name}.pt2")
    assert load_source(SourceRequest(str(tmp_path / "bounded.pt2"))).max_length == 77
    assert load_source(SourceRequest(str(tmp_path / "free.pt2"))).max_length is None


@pytest.mark.parametrize("hub_id", ["mistralai/Mistral-7B-v0.1", "Qwen/Qwen2.5-0.5B", "bert-base-uncased"])
def test_hub_ids_may_have_dots(hub_id: str) -> None:
    from longspan.exporter.sources.huggingface import _locate

    assert _locate(SourceRequest(hub_id)) is None


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.pt2"
    path.write_bytes(b"not a zip file")
    with pytest.raises(ExportFailed, match=r"is not a \.pt2 archive"):
        refuse_code(path)


def test_random_weights_keep_a_layer_of_each_kind_and_shrink_windows(tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = write_config(
        tmp_path,
        {"architectures": ["Gemma3TextModel"], "model_type": "gemma3_text", "num_hidden_layers": 12,
         "layer_types": kinds * 2, "sliding_window": 4096, "head_dim": 256, "query_pre_attn_scalar": 256},
    )  # fmt: skip
    shrunk: Any = load_source(SourceRequest(str(config), random_weights=True)).model.config
    assert shrunk.layer_types == ["sliding_attention", "full_attention"] and shrunk.num_hidden_layers == 2
    assert (shrunk.sliding_window, shrunk.head_dim, shrunk.query_pre_attn_scalar) == (32, 16, 16)
    assert shrunk.use_cache is False


def test_random_weights_shrink_the_factors_of_a_rotation_with_the_heads(tmp_path: Path) -> None:
    rotation = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096,
                "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}  # fmt: skip
    config = write_config(
        tmp_path,
        {"architectures": ["Phi3Model"], "model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 32,
         "max_position_embeddings": 131072, "rope_parameters": rotation},
    )  # fmt: skip
    source: Any = load_source(SourceRequest(str(config), random_weights=True))
    assert len(source.model.config.rope_parameters["short_factor"]) == 8
    with torch.no_grad():
        assert torch.isfinite(source.model(**source.example_inputs).last_hidden_state).all()
