"""A check as JUnit XML, the way pytest writes it and GitLab, Jenkins and GitHub's actions read it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.etree import ElementTree

from ..sites.groups import in_words
from .judging import ORIGINAL
from .report import CaseReport, CheckReport, Judged, OutputReport, PathReport

# XML 1.0 has no way to write these, not even escaped; an error text from a runtime may hold one.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(report: CheckReport) -> str:
    """One suite per path and one for the original model; one test per case and output.

    The verdict is the report's: a test fails where and only where `CheckReport.passed` is false.
    """
    root = ElementTree.Element("testsuites", name="longspan check")
    for path in report.paths:
        suite = _suite(root, path.name, report)
        _path(suite, path, report)
    suite = _suite(root, ORIGINAL, report)
    for case in report.cases:
        for output in case.outputs:
            test = _test(suite, case, output.name)
            judged = output.approximation
            if judged is None:
                _skip(test, case.original)
            elif judged.tolerance is None:
                _skip(test, f"approximated ({report.approximation}): {judged}, cosine {judged.error.cosine:.9f}")
            else:
                _judge(test, judged, output)
    if not report.cases or not any(case.outputs for case in report.cases):
        test = ElementTree.SubElement(suite, "testcase", classname=ORIGINAL, name="something was compared")
        if report.fallback:
            _skip(test, "the kernel was required and did not run, so nothing was compared")
        else:
            _fail(test, report.failures[0], "NothingCompared", "\n".join(report.failures))
    for element in [*root, root]:
        _count(element)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _path(suite: ElementTree.Element, path: PathReport, report: CheckReport) -> None:
    """What ran at each site, then every case and output."""
    test = ElementTree.SubElement(suite, "testcase", classname=path.name, name="ran at every site")
    others = list(path.others)
    if path is report.paths[0] and report.fallback:
        _fail(test, report.fallback, "FallbackRan", "\n".join(f"{node}: {ran}" for node, ran in path.sites.items()))
    elif not path.ran:
        _skip(test, path.reason)
    elif others:
        _skip(test, f"not required; something else ran at {', '.join(others)}")
    for case in report.cases:
        for output in case.outputs:
            test = _test(suite, case, output.name)
            judged = output.lowering.get(path.name)
            if judged is None:
                _skip(test, path.reason or "not run")
            else:
                _judge(test, judged, output)
        if case.skipped:
            _skip(_test(suite, case, "all outputs"), case.skipped)
    for line in report.engine.outside if report.engine is not None else ():
        test = ElementTree.SubElement(suite, "testcase", classname=path.name, name="outside the engine's profiles")
        _skip(test, line)


def _suite(root: ElementTree.Element, name: str, report: CheckReport) -> ElementTree.Element:
    suite = ElementTree.SubElement(root, "testsuite", name=name, timestamp=report.created.partition("+")[0])
    properties = ElementTree.SubElement(suite, "properties")
    values = {
        "bundle": report.bundle,
        "model.sha256": report.model_sha256,
        "model.class": report.source.model_class,
        "attention": in_words(report.sites),
        "seed": "" if report.seed is None else str(report.seed),
        **{f"version.{package}": version for package, version in report.versions.items()},
        **{f"runtime.{path.name}": f"{path.runtime}, {path.provider}" for path in report.paths if path.ran},
        **{f"note.{path.name}.{index}": note for path in report.paths for index, note in enumerate(path.notes)},
        **_engine(report),
        **{f"rtol.{output or 'every output'}": f"{value:g}" for output, value in report.rtol.items()},
        **{f"atol.{output or 'every output'}": f"{value:g}" for output, value in report.atol.items()},
    }
    for key, value in values.items():
        ElementTree.SubElement(properties, "property", name=_clean(key), value=_clean(value))
    return suite


def _engine(report: CheckReport) -> dict[str, str]:
    if report.engine is None:
        return {}
    values = {name: getattr(report.engine, name) for name in ("name", "target", "dtype", "sha256", "plugin")}
    return {f"engine.{name}": value for name, value in values.items() if value}


def _test(suite: ElementTree.Element, case: CaseReport, what: str) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", classname=suite.attrib["name"], name=_clean(f"{case.case}: {what}")
    )


def _judge(test: ElementTree.Element, judged: Judged, output: OutputReport) -> None:
    details = (
        f"largest error {judged.error.max_abs:.6g}\nroot mean square error {judged.error.rms:.6g}\n"
        f"cosine {judged.error.cosine:.12f}\nlargest value {output.magnitude:.6g}\n"
        f"torch's own error in {output.dtype} {output.torch_error:.6g}"
    )
    if judged.passed:
        ElementTree.SubElement(test, "system-out").text = details
    else:
        _fail(test, str(judged), "OutputMissing" if judged.error.note else "BeyondTolerance", details)


def _fail(test: ElementTree.Element, message: str, kind: str, details: str) -> None:
    ElementTree.SubElement(test, "failure", message=_clean(message), type=kind).text = _clean(details)


def _skip(test: ElementTree.Element, reason: str) -> None:
    ElementTree.SubElement(test, "skipped", message=_clean(reason))


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("�", text)


def _count(element: ElementTree.Element) -> None:
    """Write the totals that readers expect on a suite and on the whole."""
    tests = list(element.iter("testcase"))

    def having(tag: str) -> str:
        return str(sum(1 for test in tests if test.find(tag) is not None))

    totals: Iterable[tuple[str, str]] = (
        ("tests", str(len(tests))),
        ("failures", having("failure")),
        ("errors", "0"),
        ("skipped", having("skipped")),
    )
    for name, value in totals:
        element.set(name, value)
