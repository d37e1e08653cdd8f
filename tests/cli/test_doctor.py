"""``longspan doctor``: what is here, what is missing or broken, and that nothing of it makes the command fail."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from longspan.cli.main import run
from longspan.exporter import environment, probe
from longspan.plugins import library
from longspan.plugins.registry import operators

Doctor = Callable[..., dict[str, dict[str, object]]]


@pytest.fixture
def few_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing torch and what builds on it takes seconds; two small packages and the runtime show the same."""
    few = [
        package for package in environment._PACKAGES if package.module in ("safetensors", "matplotlib", "onnxruntime")
    ]
    monkeypatch.setattr(environment, "_PACKAGES", tuple(few))


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    def command(*arguments: str, code: int = 0) -> dict[str, dict[str, object]]:
        assert run(["doctor", "--json", *arguments]) == code
        return {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}

    return command


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a package with the given code before the installed one."""

    def put(name: str, code: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return put


def absent(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_what_is_here_is_named_with_its_version(doctor: Doctor, kernel_library: str) -> None:
    found = doctor("--strict")
    for name in ("torch", "onnx", "onnxruntime"):
        assert found[name]["status"] == "present"
        assert str(found[name]["found"]).startswith(importlib.metadata.version(name))
    assert "CPUExecutionProvider" in str(found["execution providers"]["found"])
    kernels = str(found["kernel library"]["found"])
    assert kernel_library in kernels and kernels.split(":")[0].split()[-1] in ("avx512", "avx2", "scalar")
    assert all(entry["cost"] and entry["remedy"] for entry in found.values() if entry["status"] != "present")


def test_a_node_of_every_operator_is_run(kernel_library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(probe._PROBLEMS) == {operator.name for operator in operators()}
    assert [probe._run(kernel_library, operator.name) for operator in operators()] == ["", ""]
    monkeypatch.setenv("LONGSPAN_CPU_ISA", "")
    attributes, integers = probe._PROBLEMS["BlockSparseAttention"]
    wrong = tuple((name, shape, (7,) if values else ()) for name, shape, values in integers)
    monkeypatch.setitem(probe._PROBLEMS, "BlockSparseAttention", (attributes, wrong))
    assert probe.kernel()["error"].startswith("BlockSparseAttention: ")


def test_what_is_missing_says_what_that_costs_and_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, few_packages: None, doctor: Doctor, capsys: pytest.CaptureFixture[str]
) -> None:
    absent(monkeypatch, "onnxruntime", "onnxruntime-gpu", "matplotlib")
    found = doctor()
    assert found["onnxruntime"]["status"] == found["kernel library"]["status"] == "missing"
    doctor("--strict", code=4)
    assert run(["doctor"]) == 0
    lines = " ".join(capsys.readouterr().out.split())
    assert "✗ onnxruntime missing; costs: check and bench do not run; next step: pip install 'longspan[cpu]'" in lines
    assert "– matplotlib missing; costs: bench draws no plot, inspect no picture" in lines
    assert lines.endswith("not ready: export and check need onnxruntime, execution providers")


def test_without_anything_optional_the_machine_is_ready(
    monkeypatch: pytest.MonkeyPatch, few_packages: None, doctor: Doctor, tmp_path: Path
) -> None:
    absent(monkeypatch, "matplotlib")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ONNXRUNTIME_INCLUDE_DIR", str(tmp_path))
    found = doctor("--strict")
    for name in ("matplotlib", "C++ compiler", "NVIDIA GPU", "ONNX Runtime headers"):
        assert found[name]["status"] == "missing"


def test_plugin_libraries_are_found_by_their_files(
    monkeypatch: pytest.MonkeyPatch, few_packages: None, doctor: Doctor, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "_candidates", lambda name: iter((tmp_path / name,)))
    found = doctor()
    assert [found[f"plugin for {major}"]["status"] for major in (10, 11)] == ["missing", "missing"]
    assert "TENSORRT_INCLUDE_DIR=" in str(found["plugin for 11"]["remedy"])
    assert "--plugin-api none" in str(found["plugin for 11"]["cost"])
    monkeypatch.setattr(library, "plugin_library_major", lambda path: 10)
    for major in (10, 11):
        (tmp_path / f"liblongspan_trt{major}.so").touch()
    found = doctor()
    assert found["plugin for 10"]["status"] == "present"
    assert found["plugin for 10"]["found"] == str(tmp_path / "liblongspan_trt10.so")
    assert (found["plugin for 11"]["status"], found["plugin for 11"]["problem"]) == ("broken", "it is for TensorRT 10")


def test_a_plugin_library_that_is_none_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, few_packages: None, doctor: Doctor, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "_candidates", lambda name: iter((tmp_path / name,)))
    (tmp_path / "liblongspan_trt10.so").write_bytes(b"text")
    found = doctor()
    assert found["plugin for 10"]["status"] == "broken"
    assert "is not a 64-bit ELF library" in str(found["plugin for 10"]["problem"])


def test_a_package_that_does_not_import_is_a_finding(
    few_packages: None, doctor: Doctor, package: Callable[[str, str], None]
) -> None:
    package("matplotlib", "print('noise')\nraise ImportError('libfreetype.so: cannot open\\nshared object')")
    package("safetensors", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    found = doctor()
    assert found["matplotlib"]["status"] == found["safetensors"]["status"] == "broken"
    assert found["matplotlib"]["problem"] == "does not import: ImportError: libfreetype.so: cannot open shared object"
    assert found["safetensors"]["problem"] == "does not import: the process ended by signal 11"
    assert found["onnxruntime"]["status"] == "present"
    doctor("--strict", code=4)


def test_an_instruction_set_that_the_machine_lacks_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, few_packages: None, doctor: Doctor, kernel_library: str
) -> None:
    monkeypatch.setenv("LONGSPAN_CPU_ISA", "mmx")
    kernels = doctor()["kernel library"]
    assert kernels["status"] == "broken" and "LONGSPAN_CPU_ISA = mmx: this machine has" in str(kernels["problem"])
    assert "unset LONGSPAN_CPU_ISA" in str(kernels["remedy"])
    monkeypatch.setenv("LONGSPAN_CPU_ISA", "scalar")
    assert "runs with scalar, as LONGSPAN_CPU_ISA says" in str(doctor()["kernel library"]["found"])


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ("echo 'NVIDIA H100, 81559 MiB, 9.0, 580.65'", "present", "NVIDIA H100, 81559 MiB, 9.0, 580.65"),
        ("echo 'no driver' >&2; exit 9", "broken", "fails with code 9: no driver"),
    ],
)
def test_the_gpu_is_asked_of_its_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, status: str, words: str
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    finding = environment._gpu()
    assert finding.status == status and words in (finding.found, finding.problem)


def test_headers_are_never_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from longspan.plugins.ort import headers

    monkeypatch.delenv("ONNXRUNTIME_INCLUDE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(headers, "SYSTEM_FOLDERS", (str(tmp_path),))
    monkeypatch.setattr(headers, "_debian_mirrors", list)
    finding = environment._headers()
    assert finding.status == "missing" and headers.ARCHIVE in finding.cost
    (tmp_path / headers.HEADER).write_text(f"#define ORT_API_VERSION {headers.MINIMUM_API_VERSION}\n")
    assert environment._headers().found == str(tmp_path)
