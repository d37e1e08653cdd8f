"""What is made of a check: sites, saved results judged again, smallest tolerances, JUnit XML and the page."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from longspan.exporter import check
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.parity import CheckReport, Overrides, judge, minimum_tolerances
from longspan.exporter.parity.errors_between import Error
from longspan.exporter.parity.junit import to_junit
from longspan.exporter.parity.report import Judged, describe_first_off
from longspan.exporter.parity.saved import load, load_for, to_json
from longspan.exporter.reports.check_page import check_page

from .test_parity import change_window, fix_hash

pytestmark = pytest.mark.usefixtures("one_thread")

PATHS = ("kernel", "function body")


@pytest.fixture(scope="module")
def good(longformer_bundle: Path, tmp_path_factory: pytest.TempPathFactory, kernel_library: str) -> CheckReport:
    bundle = shutil.copytree(longformer_bundle, tmp_path_factory.mktemp("good") / "bundle")
    return check(bundle, lengths=[9, 40], sites=True)


@pytest.fixture(scope="module")
def bad(longformer_bundle: Path, tmp_path_factory: pytest.TempPathFactory, kernel_library: str) -> CheckReport:
    """The second site's window is too wide by one."""
    bundle = shutil.copytree(longformer_bundle, tmp_path_factory.mktemp("bad") / "bundle")
    return check(change_window(Path(bundle), site=1, change=1), lengths=[9, 40, 60])


def test_the_first_site_off_is_named(bad: CheckReport) -> None:
    comparison = bad.site_comparison
    assert comparison is not None and comparison.notes == {}
    # The shortest case that fails: 9 tokens hide what is wrong.
    assert comparison.case.length == 40
    first, second = comparison.outputs
    for path in PATHS:
        assert first.lowering[path].passed and first.lowering[path].error.max_abs > 0
        assert comparison.first_off(path) == second and second.lowering[path].error.max_abs > 1e-2
        line = describe_first_off(bad, path)
        assert "encoder.layer.1.attention.self" in line and "8 left, 8 right" in line
        assert f"{second.lowering[path].error.max_abs:.3g}" in line and "every site before it (1)" in line


def test_sites_of_a_right_bundle_are_compared_when_asked_for(good: CheckReport, longformer_bundle: Path) -> None:
    comparison = good.site_comparison
    assert comparison is not None and len(comparison.outputs) == 2
    for site in comparison.outputs:
        for path in PATHS:
            judged = site.lowering[path]
            assert judged.tolerance is not None and 0 < judged.error.max_abs <= judged.tolerance < 1e-4
            assert describe_first_off(good, path) == ""
    # Each site's own tolerance: the second carries the errors of the first.
    assert comparison.outputs[1].depth == 2 > comparison.outputs[0].depth


def test_sites_are_left_out_unless_called_for(bad: CheckReport) -> None:
    assert check(bad.bundle, lengths=[9]).site_comparison is None
    assert check(bad.bundle, lengths=[40], sites=False).site_comparison is None


def test_an_error_behind_the_last_site_blames_no_site(longformer_bundle: Path, tmp_path: Path) -> None:
    import onnx
    from longspan.exporter.bundle import MODEL_FILE

    bundle = Path(shutil.copytree(longformer_bundle, tmp_path / "bundle"))
    model = onnx.load(bundle / MODEL_FILE)
    # The pooler's tanh turned into another function of the same values.
    (tanh,) = [node for node in model.graph.node if node.op_type == "Tanh" and node.output[0] == "pooler_output"]
    tanh.op_type = "Sigmoid"
    onnx.save(model, bundle / MODEL_FILE)
    report = check(fix_hash(bundle), lengths=[9])
    assert report.site_comparison is not None and set(report.site_comparison.notes) >= {"function body"}
    assert all("behind the last one" in note for note in report.site_comparison.notes.values())
    assert "behind the last one" in describe_first_off(report, "function body")


def test_weights_beside_the_model_are_found(longformer_bundle: Path, tmp_path: Path) -> None:
    import onnx
    from longspan.exporter.bundle import MODEL_FILE
    from longspan.exporter.manifest import sha256_of
    from longspan.exporter.whole_folders import MANIFEST_FILE

    bundle = Path(shutil.copytree(longformer_bundle, tmp_path / "bundle"))
    model = onnx.load(bundle / MODEL_FILE)
    onnx.save_model(
        model, bundle / MODEL_FILE, save_as_external_data=True, location="model.onnx.data", size_threshold=1024
    )
    data = json.loads((bundle / MANIFEST_FILE).read_text())
    data["files"] = {name: sha256_of(bundle / name) for name in (MODEL_FILE, "model.onnx.data")}
    (bundle / MANIFEST_FILE).write_text(json.dumps(data))
    report = check(bundle, lengths=[40], sites=True)
    assert report.passed and report.site_comparison is not None
    assert report.site_comparison.notes == {} and len(report.site_comparison.outputs) == 2


def test_a_saved_check_is_the_check(good: CheckReport, bad: CheckReport, tmp_path: Path) -> None:
    for report in (good, bad):
        file = tmp_path / "check.json"
        file.write_text(to_json(report))
        assert load(file) == report


@pytest.mark.parametrize(
    ("rtol", "atol"),
    [
        ([], ["0"]),
        (["10"], ["1"]),
        (["1e-3"], ["pooler_output:1"]),
    ],
)
def test_judging_again_equals_running_again(bad: CheckReport, rtol: list[str], atol: list[str]) -> None:
    again = judge(bad, Overrides.parse(rtol, atol))
    anew = check(bad.bundle, lengths=[9, 40, 60], rtol=rtol, atol=atol, sites=False)
    assert again.passed == anew.passed and again.failures == anew.failures
    assert again.cases == anew.cases and again.atol == anew.atol


def test_judging_back_and_forth_loses_nothing(good: CheckReport) -> None:
    strict = judge(good, Overrides.parse([], ["0"]))
    assert not strict.passed
    assert judge(strict, Overrides()) == good


def test_the_smallest_tolerances_pass_and_less_does_not(bad: CheckReport) -> None:
    found = minimum_tolerances(bad)
    assert {(least.output, least.path) for least in found} == {
        (output, path) for output in ("last_hidden_state", "pooler_output") for path in (*PATHS, "original model")
    }
    worst = {
        name: max(least.atol for least in found if least.output == name)
        for name in ("last_hidden_state", "pooler_output")
    }
    enough = [f"{name}:{value!r}" for name, value in worst.items()]
    assert judge(bad, Overrides.parse([], enough)).passed
    for name in worst:
        less = [f"{other}:{(value * 0.999 if other == name else value)!r}" for other, value in worst.items()]
        assert not judge(bad, Overrides.parse([], less)).passed
    both = max(least.common for least in found) * (1 + 1e-9)
    assert judge(bad, Overrides.parse([repr(both)], [repr(both)])).passed
    assert not judge(bad, Overrides.parse([repr(both * 0.99)], [repr(both * 0.99)])).passed
    assert {least.passed for least in found if least.path == "original model"} == {True}
    assert {least.passed for least in found if least.path != "original model"} == {False}


def test_an_output_that_is_not_finite_has_no_tolerance(good: CheckReport) -> None:
    broken = with_kernel_error(good, Error.failure("3 values are not finite"))
    (least,) = [m for m in minimum_tolerances(broken) if (m.output, m.path) == ("last_hidden_state", "kernel")]
    assert math.isinf(least.atol) and math.isinf(least.rtol) and not least.passed
    assert not judge(broken, Overrides.parse(["1e300"], ["1e300"])).passed


def with_kernel_error(report: CheckReport, error: Error) -> CheckReport:
    """The report with another error by the kernel in its first case's first output."""
    case = report.cases[0]
    output = case.outputs[0]
    output = dataclasses.replace(output, lowering=output.lowering | {"kernel": Judged(error, 1e-6)})
    case = dataclasses.replace(case, outputs=(output, *case.outputs[1:]))
    return dataclasses.replace(report, cases=(case, *report.cases[1:]))


def test_saved_reports_that_cannot_be_judged(good: CheckReport, tmp_path: Path, longformer_bundle: Path) -> None:
    with pytest.raises(InvalidRequest, match="no such output; allowed: last_hidden_state, pooler_output"):
        judge(good, Overrides.parse([], ["nothing:1"]))
    nothing = dataclasses.replace(good, cases=())
    with pytest.raises(InvalidRequest, match="no comparison"):
        judge(nothing, Overrides.parse([], ["1"]))
    file = tmp_path / "check.json"
    for text, message in (
        ("x", "is not JSON"),
        ("{}", "schema version None"),
        ('{"schema_version": 3}', "is not a report"),
    ):
        file.write_text(text)
        with pytest.raises(InvalidRequest, match=message):
            load(file)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load(tmp_path / "none.json")
    bundle = Path(shutil.copytree(longformer_bundle, tmp_path / "bundle"))
    (bundle / "reports").mkdir(exist_ok=True)
    (bundle / "reports" / "check.json").write_text(to_json(dataclasses.replace(good, model_sha256="0")))
    with pytest.raises(InvalidRequest, match="of another model than the bundle holds now"):
        load_for(bundle)


def test_junit_has_the_reports_verdict(good: CheckReport, bad: CheckReport) -> None:
    for report in (good, bad):
        root = ElementTree.fromstring(to_junit(report))
        assert root.tag == "testsuites"
        assert [suite.get("name") for suite in root] == ["kernel", "function body", "original model"]
        for element in (root, *root):
            tests = list(element.iter("testcase"))
            assert element.get("tests") == str(len(tests))
            for name, tag in (("failures", "failure"), ("skipped", "skipped")):
                assert element.get(name) == str(sum(1 for test in tests if test.find(tag) is not None))
            # A test has one outcome.
            assert all(len(list(test)) <= 1 for test in tests)
        assert (root.get("failures") == "0") == report.passed
        assert root.get("failures") == str(len(report.failures))
        kernel = root[0]
        assert kernel[0].tag == "properties"
        names = {item.get("name") for item in kernel[0]}
        assert {"version.torch", "version.onnxruntime", "model.sha256", "runtime.kernel"} <= names
        assert len(kernel.findall("testcase")) == 1 + 2 * len(report.cases)
        unique = [(test.get("classname"), test.get("name")) for test in root.iter("testcase")]
        assert len(unique) == len(set(unique))
    failure = ElementTree.fromstring(to_junit(bad)).find(".//failure")
    assert failure is not None and re.fullmatch(r"0\.\d+ \(tolerance \d.*e-\d+\)", str(failure.get("message")))
    assert failure.text is not None and "torch's own error in float32" in failure.text


def test_junit_of_what_was_skipped_or_stopped(good: CheckReport) -> None:
    kernel, body = good.paths
    absent = dataclasses.replace(kernel, ran=False, reason="liblongspan_ort.so is not installed\x00", sites={})
    cases = tuple(
        dataclasses.replace(
            case,
            outputs=tuple(
                dataclasses.replace(o, lowering={"function body": o.lowering["function body"]}) for o in case.outputs
            ),
        )
        for case in good.cases
    )
    root = ElementTree.fromstring(to_junit(dataclasses.replace(good, paths=(absent, body), cases=cases)))
    suite = root[0]
    assert suite.get("skipped") == suite.get("tests") and suite.get("failures") == "0"
    reasons = {str(item.get("message")) for item in suite.iter("skipped")}
    assert reasons == {"liblongspan_ort.so is not installed�"}
    stopped = dataclasses.replace(good, cases=(), require_kernel=True, fallback="the function body ran at 2 of 2 sites")
    root = ElementTree.fromstring(to_junit(stopped))
    assert [item.get("type") for item in root.iter("failure")] == ["FallbackRan"]
    nothing = ElementTree.fromstring(to_junit(dataclasses.replace(good, cases=())))
    assert [item.get("type") for item in nothing.iter("failure")] == ["NothingCompared"]


def test_the_page_stands_alone_and_says_what_the_report_does(good: CheckReport, bad: CheckReport) -> None:
    for report in (good, bad):
        page = check_page(report)
        assert not re.search(r"<script|<link|<img|@import|url\(http|(src|href)=\"http", page)
        assert ("✓ Pass" in page) == report.passed and ("✗ Fail" in page) != report.passed
        # Two errors by length for each of two outputs; one mask for each of two windows.
        assert page.count('<svg class="chart"') == 4 and page.count('<svg class="mask"') == 2
        assert report.model_sha256 in page and "Smallest tolerances" in page and "Every site at" in page
    assert "first site off at" in check_page(bad) and "first site off at" not in check_page(good)
    # What the user did not write must not become HTML.
    evil = with_kernel_error(good, Error.failure("<b>not finite</b>"))
    assert "<b>not" not in check_page(evil) and "&lt;b&gt;not" in check_page(evil)
    stopped = dataclasses.replace(good, cases=(), site_comparison=None, fallback="the function body ran")
    assert "✗ Fail" in check_page(stopped)


def test_hulls_are_small(good: CheckReport) -> None:
    corners = [len(j.error.hull) for case in good.cases for output in case.outputs for j in output.lowering.values()]
    assert 1 < max(corners) < 60
    data = json.loads(to_json(good))
    assert isinstance(data["cases"][0]["outputs"][0]["lowering"]["kernel"]["error"]["hull"], str)
