"""The checker on whole bundles: what passes, what must fail, and what it says it ran."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from longspan.exporter import SourceRequest, check, export
from longspan.exporter.bundle import MODEL_FILE, Bundle
from longspan.exporter.errors import BundleCorrupted, ExportFailed, FallbackRan, InvalidRequest
from longspan.exporter.families import longformer
from longspan.exporter.manifest import sha256_of
from longspan.exporter.parity import CheckReport
from longspan.exporter.parity.inputs import load_feeds
from longspan.exporter.parity.saved import load, to_json
from longspan.exporter.whole_folders import MANIFEST_FILE

pytestmark = pytest.mark.usefixtures("one_thread")

Copy = Callable[[Path], Path]

# The second window of the Longformer: 8 keys on each side, the first text that loses a pair has 10 tokens.
FIRST_CUT = 10


def change_window(bundle: Path, site: int, change: int) -> Path:
    """Give one site's window another size, in the file and in the hashes, but not in the manifest's sites."""
    model = onnx.load(bundle / MODEL_FILE)
    node = [node for node in model.graph.node if node.domain == "longspan"][site]
    for attribute in node.attribute:
        if attribute.name in ("left_window_size", "right_window_size"):
            attribute.i += change
    onnx.save(model, bundle / MODEL_FILE)
    return fix_hash(bundle)


def fix_hash(bundle: Path) -> Path:
    """Write the hash of the model as it is now into the manifest."""
    data = json.loads((bundle / MANIFEST_FILE).read_text())
    data["files"][MODEL_FILE] = sha256_of(bundle / MODEL_FILE)
    (bundle / MANIFEST_FILE).write_text(json.dumps(data))
    return bundle


@pytest.fixture(scope="module")
def longformer_report(longformer_bundle: Path) -> CheckReport:
    return check(longformer_bundle)


@pytest.fixture(scope="module")
def bert_report(bert_bundle: Path) -> CheckReport:
    return check(bert_bundle)


def test_a_right_bundle_passes_by_both_paths(longformer_report: CheckReport, kernel_library: str) -> None:
    assert longformer_report.passed and not longformer_report.failures
    kernel, body = longformer_report.paths
    assert (kernel.name, set(kernel.sites.values())) == ("kernel", {"kernel"})
    assert (body.name, set(body.sites.values())) == ("function body", {"function body"})
    assert len(kernel.sites) == len(body.sites) == 2
    for case in longformer_report.cases:
        assert {output.name for output in case.outputs} == {"last_hidden_state", "pooler_output"}
        assert all(set(output.lowering) == {"kernel", "function body"} for output in case.outputs)
        assert case.original == case.skipped == ""


def test_errors_are_above_zero_and_far_below_what_a_wrong_key_makes(longformer_report: CheckReport) -> None:
    for case in longformer_report.cases:
        for output in case.outputs:
            for judged in output.lowering.values():
                assert judged.tolerance is not None
                assert 0 < judged.error.max_abs <= judged.tolerance < 1e-4 * output.magnitude


def test_a_faithful_pattern_equals_the_original_to_float64(longformer_report: CheckReport) -> None:
    assert longformer_report.faithful
    for case in longformer_report.cases:
        for output in case.outputs:
            assert output.approximation is not None and output.approximation.tolerance is not None
            # float32 anywhere in either run would leave an error of 1e-8.
            assert output.approximation.error.max_abs <= output.approximation.tolerance < 1e-12


def test_an_approximation_is_measured_and_not_failed(bert_report: CheckReport) -> None:
    assert bert_report.passed and not bert_report.faithful
    assert "window" in bert_report.approximation and "64" in bert_report.approximation
    must_be_equal = {}
    for case in bert_report.cases:
        for output in case.outputs:
            assert output.approximation is not None
            must_be_equal.setdefault(case.case.length, output.approximation.tolerance is not None)
    # The window reaches 8 tokens to each side: 9 tokens are the longest text that it holds.
    assert {length for length, equal in must_be_equal.items() if equal} == {1, 9}
    long = next(case for case in bert_report.cases if case.case.length == 256).outputs[0].approximation
    assert long is not None and long.error.max_abs > 1e-3 and 0.5 < long.error.cosine < 1


def test_the_report_is_kept_in_the_bundle(longformer_bundle: Path, longformer_report: CheckReport) -> None:
    data = json.loads((longformer_bundle / "reports" / "check.json").read_text())
    assert data == json.loads(to_json(longformer_report))
    assert data["schema_version"] == 4 and data["passed"] is True
    output = data["cases"][-1]["outputs"][0]
    assert {"magnitude", "torch_error", "terms", "depth"} <= set(output)
    assert output["lowering"]["function body"]["error"]["max_abs"] > 0
    written = {file.name for file in (longformer_bundle / "reports").iterdir()}
    assert written == {"check.json", "check.junit.xml", "check.html"}
    assert load(longformer_bundle / "reports" / "check.json") == longformer_report
    assert Bundle.open(longformer_bundle).manifest.files.keys() == {MODEL_FILE}


@pytest.mark.parametrize("change", [1, -1])
def test_a_window_that_is_off_by_one_fails_and_names_the_shortest_case(
    longformer_bundle: Path, copied: Copy, change: int
) -> None:
    bundle = change_window(copied(longformer_bundle), site=1, change=change)
    report = check(bundle, max_length=40)
    # A window that is too narrow by one loses its first pair one token earlier.
    shortest = FIRST_CUT if change > 0 else FIRST_CUT - 1
    wrong = {case.case.length for case in report.cases if case.failures()}
    assert not report.passed
    assert wrong == {case.case.length for case in report.cases if case.case.length >= shortest}
    assert f" x {shortest}," in report.failures[0] and "lowering error" in report.failures[0]


def test_short_inputs_prove_nothing(longformer_bundle: Path, copied: Copy) -> None:
    bundle = change_window(copied(longformer_bundle), site=1, change=1)
    assert check(bundle, lengths=[1, 5, FIRST_CUT - 1]).passed
    assert not check(bundle, lengths=[FIRST_CUT]).passed


def test_an_adapter_that_computes_something_else_fails(
    longformer_bundle: Path, copied: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph follows the adapter, so the lowering is right; only the original model shows the mistake."""
    right = longformer.longformer_attention

    def narrower(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.one_sided_attn_window_size -= 1
        try:
            return right(self, *args, **kwargs)
        finally:
            self.one_sided_attn_window_size += 1

    monkeypatch.setattr(longformer, "longformer_attention", narrower)
    source = Bundle.open(longformer_bundle).manifest.source
    bundle = export(SourceRequest.again(source), copied(longformer_bundle), force=True).path
    report = check(bundle, lengths=[4, 40])
    assert report.failures
    assert all("against the original model" in line for line in report.failures)
    assert all("x 40," in line for line in report.failures)


def test_a_model_that_no_longer_runs_by_the_adapter_fails(
    longformer_bundle: Path, copied: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setattr(longformer, "longformer_attention", broken)
    report = check(copied(longformer_bundle), lengths=[4])
    assert not report.passed and "ValueError: no such thing" in report.failures[0]


def test_an_input_that_the_model_itself_refuses_is_skipped_and_proves_nothing(
    longformer_bundle: Path, copied: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.longformer.modeling_longformer import LongformerModel

    right = LongformerModel.forward

    @functools.wraps(right)
    def at_most_ten(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] > 10:
            raise ValueError("too long")
        return right(self, *args, **kwargs)

    monkeypatch.setattr(LongformerModel, "forward", at_most_ten)
    report = check(copied(longformer_bundle), lengths=[4, 20])
    skipped = [case for case in report.cases if case.skipped]
    assert report.passed and {case.case.length for case in skipped} == {20} and "too long" in skipped[0].skipped
    assert report.checked_length == 4
    nothing = check(report.bundle, lengths=[20])
    assert not nothing.passed and "nothing was compared" in nothing.failures[0]


def test_without_the_library_the_function_body_is_checked_alone(
    longformer_bundle: Path, copied: Copy, no_library: None
) -> None:
    report = check(copied(longformer_bundle), lengths=[20])
    kernel, body = report.paths
    assert report.passed
    assert not kernel.ran and "liblongspan_ort.so" in kernel.reason
    assert body.ran and all(set(output.lowering) == {"function body"} for output in report.cases[0].outputs)


def test_a_required_kernel_that_is_not_installed(longformer_bundle: Path, copied: Copy, no_library: None) -> None:
    bundle = copied(longformer_bundle)
    with pytest.raises(FallbackRan, match="liblongspan_ort"):
        check(bundle, require_kernel=True)
    data = json.loads((bundle / "reports" / "check.json").read_text())
    assert data["passed"] is False and "liblongspan_ort.so" in data["fallback"]


def test_what_ran_is_read_from_the_session(
    longformer_bundle: Path, copied: Copy, kernel_library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that was asked to register the library and did not: asking proves nothing."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime.SessionOptions, "register_custom_ops_library", lambda self, path: None)
    bundle = copied(longformer_bundle)
    with pytest.raises(FallbackRan, match="function body ran at 2 of 2 sites"):
        check(bundle, require_kernel=True)
    report = check(bundle, lengths=[20])
    assert set(report.paths[0].sites.values()) == {"function body"}


def test_a_required_kernel_that_ran(longformer_bundle: Path, copied: Copy, kernel_library: str) -> None:
    report = check(copied(longformer_bundle), lengths=[20], require_kernel=True)
    assert report.passed and report.fallback == ""


def test_a_site_that_the_graph_does_not_have(longformer_bundle: Path, copied: Copy) -> None:
    bundle = copied(longformer_bundle)
    model = onnx.load(bundle / MODEL_FILE)
    for node in model.graph.node:
        if node.domain == "longspan":
            node.domain, node.op_type = "", "Identity"
            del node.input[1:], node.attribute[:]
            node.overload = ""
    onnx.save(model, bundle / MODEL_FILE)
    fix_hash(bundle)
    with pytest.raises(ExportFailed, match="neither a kernel nor a function body"):
        check(bundle)


def test_given_tolerances_replace_the_derived_ones(longformer_bundle: Path, copied: Copy) -> None:
    bundle = copied(longformer_bundle)
    strict = check(bundle, lengths=[20], atol=["0"])
    assert not strict.passed
    one = check(bundle, lengths=[20], atol=["0", "last_hidden_state:1"])
    assert one.failures and all("pooler_output" in line for line in one.failures)
    wrong = change_window(bundle, site=1, change=1)
    assert check(wrong, lengths=[20], rtol=["1e3"], atol=["1e3"]).passed
    with pytest.raises(InvalidRequest, match="no such output"):
        check(bundle, atol=["nothing:1"])


def test_inputs_are_saved_and_loaded(longformer_bundle: Path, copied: Copy, tmp_path: Path) -> None:
    bundle, file = copied(longformer_bundle), tmp_path / "inputs.json"
    drawn = check(bundle, input_shapes=["input_ids:[2,40]"], save_inputs=file, seed=3)
    assert {(case.case.batch, case.case.length) for case in drawn.cases} == {(2, 40)}
    feeds = load_feeds(file, Bundle.open(bundle).manifest.inputs)
    assert len(feeds) == len(drawn.cases)
    loaded = check(bundle, load_inputs=file)
    assert loaded.passed and loaded.seed is None
    assert [case.outputs for case in loaded.cases] == [case.outputs for case in drawn.cases]


def test_requests_that_contradict_each_other(longformer_bundle: Path) -> None:
    with pytest.raises(InvalidRequest, match="--lengths and --input-shapes"):
        check(longformer_bundle, lengths=[4], input_shapes=["input_ids:[1,4]"])
    with pytest.raises(InvalidRequest, match="up to 256"):
        check(longformer_bundle, input_shapes=["input_ids:[1,400]"])


def test_the_source_must_be_what_was_exported(longformer_bundle: Path, copied: Copy, tmp_path: Path) -> None:
    bundle = copied(longformer_bundle)
    manifest = Bundle.open(bundle).manifest
    gone = dataclasses.replace(
        manifest, source=dataclasses.replace(manifest.source, location=str(tmp_path / "gone.json"))
    )
    (bundle / MANIFEST_FILE).write_text(gone.to_json())
    with pytest.raises(InvalidRequest, match="--source"):
        check(bundle, lengths=[4])
    moved = tmp_path / "moved" / "config.json"
    moved.parent.mkdir()
    moved.write_text(Path(manifest.source.location).read_text())
    assert check(bundle, lengths=[4], source=str(moved)).passed
    moved.write_text(moved.read_text().replace("[8, 16]", "[8, 32]"))
    with pytest.raises(InvalidRequest, match=r"config.json differ from what was exported"):
        check(bundle, lengths=[4], source=str(moved))


def test_a_damaged_bundle(longformer_bundle: Path, copied: Copy) -> None:
    bundle = copied(longformer_bundle)
    with (bundle / MODEL_FILE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleCorrupted):
        check(bundle)


def test_the_original_is_left_out_beyond_its_limit(bert_bundle: Path, copied: Copy) -> None:
    report = check(copied(bert_bundle), lengths=[9, 100], original_max_length=50)
    short, long = (next(case for case in report.cases if case.case.length == length) for length in (9, 100))
    assert report.passed and short.original == "" and "--original-max-length 50" in long.original
    assert all(output.approximation is None and output.lowering for output in long.outputs)


FACTORY = """
import torch
from longspan.plugins.sliding_window_attention.torch_op import sliding_window_attention


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)

    def forward(self, hidden, attention_mask):
        q, k, v = self.qkv(hidden).chunk(3, dim=-1)
        y = sliding_window_attention(q, k, v, attn_mask=attention_mask.bool(), left_window_size=5, right_window_size=0,
                                     q_num_heads=2, kv_num_heads=2)
        return hidden + torch.nn.functional.layer_norm(y.float(), (32,))


def layer():
    return Layer(), {"hidden": torch.randn(2, 30, 32), "attention_mask": torch.ones(2, 30, dtype=torch.int64)}
"""


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("factory") / "layer_of_my_own.py"
    file.write_text(FACTORY)
    return file


def test_a_model_that_calls_the_operator_itself(factory: Path, tmp_path: Path) -> None:
    bundle = export(f"{factory}:layer", tmp_path / "bundle").path
    report = check(bundle)
    assert report.passed and report.checked_length == 4096
    assert {case.original for case in report.cases} == {"the model calls longspan operators itself"}
    assert all(output.approximation is None for case in report.cases for output in case.outputs)


def test_an_exported_program(factory: Path, tmp_path: Path) -> None:
    from longspan.exporter.sources import load_source

    source = load_source(SourceRequest(f"{factory}:layer"))
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    shapes = {"hidden": {0: batch, 1: sequence}, "attention_mask": {0: batch, 1: sequence}}
    assert isinstance(source.model, torch.nn.Module)
    program = torch.export.export(source.model, (), dict(source.example_inputs), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "layer.pt2")
    bundle = export(str(tmp_path / "layer.pt2"), tmp_path / "bundle").path
    report = check(bundle, lengths=[2, 6, 7, 31])
    assert report.passed, report.failures
