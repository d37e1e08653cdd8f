"""Engines checked like bundles: the same sweep within profiles, tolerances of their type, what ran, and reports."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import onnx
import pytest
from longspan.exporter import check
from longspan.exporter.bundle import MODEL_FILE, Bundle
from longspan.exporter.engines.manifest import NOT_RUN, BuiltSite, Engine
from longspan.exporter.engines.running import runners
from longspan.exporter.engines.running.reach import Reach, profile_for
from longspan.exporter.engines.running.seen import sites_seen
from longspan.exporter.errors import BundleCorrupted, EnvironmentLacks, ExportFailed, FallbackRan, InvalidRequest
from longspan.exporter.parity.cases import BATCHES, Case, sweep_lengths
from longspan.exporter.parity.judging import weak_verdicts
from longspan.exporter.parity.oracle import typed_copy
from longspan.exporter.parity.plan import Wanted, plan
from longspan.exporter.parity.report import CaseReport, OutputReport
from longspan.exporter.parity.saved import load, load_for
from longspan.exporter.parity.tolerances import Overrides, computed_in, unit_roundoff
from longspan.exporter.whole_folders import MANIFEST_FILE

from ...exporter.test_parity import FIRST_CUT
from .hand_made import GPU, make_ort_engine, make_tensorrt_engine, plugin_layers, profile, stand_in

pytestmark = pytest.mark.usefixtures("one_thread")

Copy = Callable[[Path], Path]


@pytest.fixture
def bundle(longformer_bundle: Path, copied: Copy) -> Path:
    return copied(longformer_bundle)


def wrong_model(bundle: Path, folder: Path) -> Path:
    """The bundle's model with a key more on the left of the second window."""
    model = onnx.load(bundle / MODEL_FILE)
    site = [node for node in model.graph.node if node.domain == "longspan"][1]
    next(attribute for attribute in site.attribute if attribute.name == "left_window_size").i += 1
    onnx.save(model, folder / "wrong.onnx")
    return folder / "wrong.onnx"


# What is checked.


def test_without_a_profile_the_sweep_is_the_bundles(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    everything = plan(manifest, Wanted())
    assert everything.outside == () and everything.cases == plan(manifest, Wanted(), ()).cases
    whole = plan(manifest, Wanted(), [profile(bundle, (1, 1), (8, 256))])
    assert whole.cases == everything.cases and whole.outside == ()


def test_a_profile_restricts_the_sweep_and_what_it_leaves_out_is_listed(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    lengths = sweep_lengths(manifest.sites, manifest.max_length)
    planned = plan(manifest, Wanted(), [profile(bundle, (1, 9), (3, 60))])
    inside = {length for length in lengths if 9 <= length <= 60}
    assert {case.length for case in planned.cases} == inside | {9, 60} and {case.batch for case in planned.cases} == {
        1,
        3,
    }
    (line,) = planned.outside
    assert line.startswith(f"lengths {', '.join(str(n) for n in lengths if n not in inside)}: the engine takes 9 to 60")


def test_batches_outside_the_profile_are_stood_in_for_and_listed(bundle: Path) -> None:
    planned = plan(Bundle.open(bundle).manifest, Wanted(lengths=(20,)), [profile(bundle, (2, 1), (2, 256))])
    assert {case.batch for case in planned.cases} == {2}
    assert planned.outside == ("batch 1 and 3: the engine takes 2 rows; checked instead: 2",)
    assert Reach((2, 8), (1, 9)).nearest(BATCHES) == (3, 2)


def test_a_profile_that_admits_nothing_of_the_sweep_gets_its_own_lengths(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    planned = plan(manifest, Wanted(), [profile(bundle, (1, 100), (4, 200))])
    assert {case.length for case in planned.cases} == {100, 150, 200}


def test_every_profile_is_checked(bundle: Path) -> None:
    profiles = [profile(bundle, (1, 1), (1, 30)), profile(bundle, (1, 20), (4, 120))]
    planned = plan(Bundle.open(bundle).manifest, Wanted(), profiles)
    shapes = [{name: array.shape for name, array in planned.feed(index).items()} for index in range(len(planned.cases))]
    assert {profile_for(profiles, one) for one in shapes} == {0, 1}
    assert {1, 20, 30, 120} <= {case.length for case in planned.cases}
    assert any("with 1 to 30 tokens the engine takes 1 rows" in line for line in planned.outside)


def test_the_narrowest_profile_runs(bundle: Path) -> None:
    profiles = [profile(bundle, (1, 1), (8, 256)), profile(bundle, (1, 1), (4, 64))]
    shapes = {record.name: (2, 30) for record in Bundle.open(bundle).manifest.inputs}
    assert profile_for(profiles, shapes) == 1
    assert profile_for(profiles, dict.fromkeys(shapes, (2, 65))) == 0
    assert profile_for(profiles, dict.fromkeys(shapes, (9, 65))) is None and profile_for((), shapes) == 0


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(lengths=(8, 30, 81)), r"--lengths 8, 81: the engine takes 9 to 80 tokens"),
        (Wanted(max_length=8), r"--max-length 8: the engine takes 9 to 80 tokens"),
        (
            Wanted(input_shapes=("input_ids:[2,90]",)),
            r"--input-shapes: input_ids of shape \(2, 90\): .* \(1, 9\) to \(2, 80\)",
        ),
    ],
)
def test_what_the_engine_does_not_take_is_refused_with_its_range(bundle: Path, wanted: Wanted, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        plan(Bundle.open(bundle).manifest, wanted, [profile(bundle, (1, 9), (2, 80))])


# How it is judged.


def test_an_output_bears_the_coarser_roundoff() -> None:
    assert computed_in("float32", "float16") == "float16" and computed_in("float32", "bfloat16") == "bfloat16"
    assert computed_in("float16", "float32") == "float16" and computed_in("float32", "") == "float32"
    assert computed_in("int64", "float16") == "int64"


def test_engines_of_each_type_pass_by_tolerances_of_their_own(bundle: Path, kernel_library: str) -> None:
    make_ort_engine(bundle)
    make_ort_engine(bundle, "half", dtype="fp16")
    tolerances = {}
    for name in ("ort", "half"):
        report = check(bundle, lengths=[20], engine=name)
        assert report.passed, report.failures
        (path,) = report.paths
        assert set(path.sites.values()) == {"kernel"} and path.name == f"engine {name}"
        assert not any("proves little" in note for note in path.notes)
        assert load_for(bundle, name)[0] == report
        for case in report.cases:
            for output in case.outputs:
                judged = output.lowering[path.name]
                assert output.dtype == {"ort": "float32", "half": "float16"}[name]
                assert (output.explained is None) == (name == "ort")
                assert judged.tolerance is not None and 0 < judged.error.max_abs <= judged.tolerance
                tolerances.setdefault(name, []).append(judged.tolerance / output.magnitude)
    # Torch in float16 is about as much worse than in float32 as the roundoffs are apart, a factor of 2^13.
    apart = unit_roundoff("float16") / unit_roundoff("float32")  # type: ignore[arg-type]
    assert apart / 8 < max(tolerances["half"]) / max(tolerances["ort"]) < apart * 8


def judged_case(torch_error: float, explained: float | None, length: int = 20) -> CaseReport:
    output = OutputReport("logits", "float16", 40.0, torch_error, 64, 2, {}, None, explained)
    return CaseReport(Case(1, length, "none", "none"), (output,))


def test_a_tolerance_that_is_torchs_own_failure_is_called_so() -> None:
    # 40 · 2^-11 · sqrt(2) is what the roundoff of float16 makes of two layers of such numbers, 0.028.
    usual = [judged_case(0.1, 0.05), judged_case(0.1, None), judged_case(math.inf, 0.05), judged_case(0.4, 0.0)]
    assert weak_verdicts(usual, Overrides()) == ()
    cases = [*usual, judged_case(0.6, 0.0, 7), judged_case(36.0, 0.05, 17), judged_case(3.0, 0.05, 33)]
    (line,) = weak_verdicts(cases, Overrides())
    assert re.match(
        r"logits at 1 x 17.*off by 36 in float16, where rounding explains 0\.05;.* 72 .*proves little", line
    )
    assert weak_verdicts(cases, Overrides.parse([], ["0.5"])) == ()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_wrong_engine_fails_in_every_type(bundle: Path, tmp_path: Path, kernel_library: str, dtype: str) -> None:
    make_ort_engine(bundle, model=wrong_model(bundle, tmp_path), dtype=dtype)
    assert check(bundle, lengths=[FIRST_CUT - 1], engine="ort").passed
    report = check(bundle, lengths=[FIRST_CUT], engine="ort")
    assert not report.passed and "lowering error by engine ort" in report.failures[0]


def test_a_yardstick_has_the_buffers_that_loading_in_its_type_would_give_it() -> None:
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)
            self.tied = self.layer
            self.register_buffer("saved", torch.full((2,), 1 / 3))
            self.register_buffer("computed", torch.full((2,), 1 / 3), persistent=False)
            self.register_buffer("counts", torch.arange(3))

    model = Model()
    typed = typed_copy(model, torch.float16)
    types = {name: value.dtype for name, value in [*typed.named_parameters(), *typed.named_buffers()]}
    assert types["layer.weight"] == types["saved"] == torch.float16
    assert types["computed"] == torch.float32 and types["counts"] == torch.int64
    assert typed.tied.weight is typed.layer.weight
    assert model.layer.weight.dtype == model.saved.dtype == torch.float32  # type: ignore[union-attr]


# What ran.


def test_a_site_is_a_kernel_where_a_plugin_layer_bears_its_name(bundle: Path) -> None:
    manifest = make_tensorrt_engine(bundle).manifest
    first, second = (site.node for site in manifest.sites)
    assert set(sites_seen(manifest, plugin_layers(bundle)).values()) == {"kernel"}
    # TensorRT tells names alone where the engine was built without details.
    assert set(sites_seen(manifest, [[first, ""], [second, ""]]).values()) == {"kernel"}
    fused = [[f"{{ForeignNode[{first}...{second}]}}", "Myelin"], [second, "PLUGIN_V3"]]
    assert sites_seen(manifest, fused) == {first: "function body", second: "kernel"}
    assert sites_seen(manifest, [[first, "MatrixMultiply"]]) == {first: "function body", second: "function body"}


def test_an_engine_of_function_bodies_is_no_kernel_whatever_its_layers_are_called(bundle: Path) -> None:
    nodes = [site.node for site in Bundle.open(bundle).manifest.sites]
    sites = (BuiltSite(nodes[0], "function body", ()), BuiltSite(nodes[1], "native layer", ()))
    manifest = make_tensorrt_engine(bundle, sites=sites).manifest
    assert sites_seen(manifest, plugin_layers(bundle)) == {nodes[0]: "function body", nodes[1]: "native layer"}


def test_a_required_kernel_that_was_not_built(bundle: Path) -> None:
    make_ort_engine(bundle, kernel=False)
    with pytest.raises(FallbackRan, match=r"function body at 2 of 2 sites: .*\(the library was left out\)"):
        check(bundle, engine="ort", require_kernel=True)
    report = load(bundle / "reports" / "engines" / "ort" / "check.json")
    assert not report.passed and report.fallback and report.cases == ()
    assert check(bundle, engine="ort", lengths=[20]).paths[0].what_ran == "function body at 2 of 2 sites"


# TensorRT, by its stand-in.


def test_an_engine_in_its_own_process_passes_and_says_where_it_ran(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tensorrt_engine(bundle, profiles=(profile(bundle, (1, 1), (4, 60)),))
    stand_in(monkeypatch, layers=plugin_layers(bundle))
    report = check(bundle, engine="trt", lengths=[9, 40], require_kernel=True)
    (path,) = report.paths
    assert report.passed and path.runtime == "TensorRT 10.14.1.48" and path.provider == GPU.name
    assert path.what_ran == "kernel at 2 of 2 sites"
    engine = Engine.open(Bundle.open(bundle), "trt")
    assert engine.manifest.status.startswith("ran on Stand-in GPU, 20")
    # Once is enough, and nothing but the status changes.
    before = (engine.path / MANIFEST_FILE).read_bytes()
    check(bundle, engine="trt", lengths=[9])
    assert (engine.path / MANIFEST_FILE).read_bytes() == before


def test_a_plugin_layer_that_is_not_there_fails_where_it_is_required(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tensorrt_engine(bundle)
    stand_in(monkeypatch, layers=plugin_layers(bundle)[:2])
    with pytest.raises(FallbackRan, match="function body at 1 of 2 sites"):
        check(bundle, engine="trt", require_kernel=True)


def test_a_crash_at_one_length_is_that_cases_failure(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tensorrt_engine(bundle)
    stand_in(monkeypatch, layers=plugin_layers(bundle), fault="crash at 20")
    report = check(bundle, engine="trt", lengths=[9, 20, 40])
    broken = {case.case.length for case in report.cases if case.failures()}
    assert broken == {20} and len({case.case.length for case in report.cases}) == 3
    assert "ended by SIGABRT: cudaErrorIllegalAddress" in report.failures[0]
    assert Engine.open(Bundle.open(bundle), "trt").manifest.status == NOT_RUN


@pytest.mark.parametrize(
    ("facts", "kind", "message"),
    [
        ({"fault": "corrupted"}, BundleCorrupted, "model.onnx: is not a whole engine: .*magicTag.*; next step: build"),
        ({"fault": "crash at open"}, ExportFailed, "TensorRT cannot load it: .*SIGABRT: Assertion `engine` failed"),
        ({"version": "11.1.0.106"}, EnvironmentLacks, r"built with TensorRT 10\.14\.1\.48, here is 11\.1\.0\.106"),
        ({"fault": "no module"}, EnvironmentLacks, "No module named"),
    ],
)
def test_what_cannot_be_opened_is_one_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str], kind: type[Exception], message: str
) -> None:
    make_tensorrt_engine(bundle)
    stand_in(monkeypatch, **facts)
    with pytest.raises(kind, match=message) as caught:
        check(bundle, engine="trt", lengths=[9])
    assert "\n" not in str(caught.value)


def test_an_engine_that_lacks_an_output(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(bundle / MODEL_FILE)
    del model.graph.output[1]
    onnx.save(model, tmp_path / "less.onnx")
    make_tensorrt_engine(bundle, model=tmp_path / "less.onnx")
    stand_in(monkeypatch, layers=plugin_layers(bundle))
    report = check(bundle, engine="trt", lengths=[9])
    assert not report.passed and "the engine has no output pooler_output" in report.failures[0]


def test_a_status_is_not_written_over_an_engine_that_was_built_again(bundle: Path) -> None:
    engine = make_tensorrt_engine(bundle)
    file = engine.path / MANIFEST_FILE
    newer = file.read_text().replace("2026-01-01", "2026-02-02")
    file.write_text(newer)
    runners.mark_as_run(engine, "a GPU")
    assert file.read_text() == newer


# Reports.


def test_reports_of_an_engine_stand_apart_and_say_what_it_is(bundle: Path, kernel_library: str) -> None:
    make_ort_engine(bundle, profiles=(profile(bundle, (1, 9), (2, 60)),))
    report = check(bundle, engine="ort", max_length=20)
    folder = bundle / "reports" / "engines" / "ort"
    assert {file.name for file in folder.iterdir()} == {"check.json", "check.junit.xml", "check.html"}
    assert not (bundle / "reports" / "check.json").exists()
    assert load(folder / "check.json") == report and load_for(bundle, "ort")[0] == report
    assert report.engine is not None and report.engine.outside
    xml = ElementTree.parse(folder / "check.junit.xml").getroot()
    properties = {found.attrib["name"]: found.attrib["value"] for found in xml.iter("property")}
    assert properties["engine.name"] == "ort" and properties["engine.target"] == "ort"
    skipped = [t for t in xml.iter("testcase") if t.attrib["name"] == "outside the engine's profiles"]
    assert len(skipped) == len(report.engine.outside) > 0 and all(t.find("skipped") is not None for t in skipped)
    page = (folder / "check.html").read_text()
    assert "engine ort" in page and report.engine.sha256 in page and "outside its profiles" in page


def test_a_report_of_an_engine_that_was_built_again_is_refused(bundle: Path, kernel_library: str) -> None:
    engine = make_ort_engine(bundle)
    check(bundle, engine="ort", lengths=[9])
    data = json.loads((engine.path / MANIFEST_FILE).read_text())
    with engine.file.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleCorrupted, match="differs from what was written"):
        load_for(bundle, "ort")
    from longspan.exporter.manifest import sha256_of

    data["files"][MODEL_FILE] = sha256_of(engine.file)
    (engine.path / MANIFEST_FILE).write_text(json.dumps(data))
    with pytest.raises(InvalidRequest, match="is of another engine than is there now"):
        load_for(bundle, "ort")


def test_reports_without_engines_are_still_read(bundle: Path) -> None:
    check(bundle, lengths=[9])
    file = bundle / "reports" / "check.json"
    data = json.loads(file.read_text())
    del data["engine"]
    for path in data["paths"]:
        del path["dtype"], path["notes"]
    file.write_text(json.dumps(data | {"schema_version": 3}))
    assert load(file).paths[0].name == "kernel"
    file.write_text(json.dumps(data | {"schema_version": 2}))
    with pytest.raises(InvalidRequest, match="schema version 2; allowed: 3, 4"):
        load(file)


def test_requests_that_have_no_meaning_for_an_engine(bundle: Path) -> None:
    make_ort_engine(bundle)
    for given in ({"device": "cuda"}, {"sites": True}):
        with pytest.raises(InvalidRequest, match="leave out --device and --sites"):
            check(bundle, engine="ort", **given)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="the bundle has no such engine; it has: ort"):
        check(bundle, engine="other")
