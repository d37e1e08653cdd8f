"""The library that registers the plugins for programs that open libraries with dlopen alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from longspan.plugins import LibraryMissing, library
from longspan.plugins.tensorrt.headers import find_headers

from .cuda_programs import ROOT, build

HEADERS = find_headers()
MAJORS = sorted(HEADERS)
pytestmark = pytest.mark.skipif(not MAJORS, reason="no headers of TensorRT: install kernel-lens")

OTHER = "libnvinfer.so.11" if MAJORS[:1] == [10] else "libnvinfer.so.10"

BOTH = "longspan::BlockSparseAttention longspan::SlidingWindowAttention "

# A program that opens a library as the server does: for itself alone, after TensorRT, and nothing more.
_HOST = """
import ctypes, os, sys
loader, tensorrt, before = sys.argv[1:4]
registry = ctypes.CDLL(tensorrt, os.RTLD_LOCAL | os.RTLD_NOW) if tensorrt else None
if before:
    ctypes.CDLL(before, os.RTLD_LOCAL | os.RTLD_NOW)
ctypes.CDLL(loader, os.RTLD_LOCAL | os.RTLD_NOW)
if registry is not None:
    registry.Registered.restype = ctypes.c_char_p
    print(registry.Registered().decode())
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugins, their loader, and what stands for TensorRT."""
    folder = tmp_path_factory.mktemp("libraries")
    major = MAJORS[0]
    for target in (f"longspan_trt{major}", f"longspan_trt{major}_loader"):
        shutil.copy(build(target) / f"lib{target}.so", folder)
    folders = [f"-isystem{path}" for path in (ROOT / "plugins" / "tensorrt" / "cuda_types", HEADERS[major])]
    for name in (f"libnvinfer.so.{major}", OTHER):
        command = ["c++", "-std=c++17", "-shared", "-fPIC", "-Wno-deprecated-declarations", *folders,
                   f"-Wl,-soname,{name}", "-o", str(folder / name),
                   str(ROOT / "tests" / "plugins" / "tensorrt" / "registry.cc"), "-ldl"]  # fmt: skip
        subprocess.run(command, check=True)
    return folder


def host(loader: Path, tensorrt: Path | str = "", before: Path | str = "") -> tuple[str, str]:
    command = [sys.executable, "-c", _HOST, str(loader), str(tensorrt), str(before)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.removesuffix("\n"), done.stderr


def test_opening_it_registers_what_lies_beside_it(libraries: Path) -> None:
    major = MAJORS[0]
    printed, complaint = host(libraries / f"liblongspan_trt{major}_loader.so", libraries / f"libnvinfer.so.{major}")
    assert printed == BOTH
    assert complaint == ""


def test_it_says_why_it_registers_nothing(libraries: Path, tmp_path: Path) -> None:
    major = MAJORS[0]
    loader, tensorrt = libraries / f"liblongspan_trt{major}_loader.so", libraries / f"libnvinfer.so.{major}"
    printed, complaint = host(loader)
    assert printed == ""
    assert f"longspan: the TensorRT plugins are not registered: libnvinfer.so.{major} is not loaded yet" in complaint
    alone = Path(shutil.copy(loader, tmp_path))
    printed, complaint = host(alone, tensorrt)
    assert printed == ""
    assert f"TensorRT did not load {tmp_path}/liblongspan_trt{major}.so" in complaint


def test_it_leaves_another_tensorrt_to_that_ones_loader(libraries: Path) -> None:
    assert host(libraries / f"liblongspan_trt{MAJORS[0]}_loader.so", libraries / OTHER) == ("", "")


def test_a_registry_that_has_the_plugins_keeps_them(libraries: Path, tmp_path: Path) -> None:
    major = MAJORS[0]
    loader = libraries / f"liblongspan_trt{major}_loader.so"
    # Opened a second time under another name, since the same file is opened once.
    again = Path(shutil.copytree(libraries, tmp_path / "again")) / loader.name
    printed, complaint = host(again, libraries / f"libnvinfer.so.{major}", loader)
    assert printed == BOTH
    assert "registered already" in complaint


def test_it_is_found_beside_the_plugins(libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = Path(shutil.copy(libraries / f"liblongspan_trt{MAJORS[0]}.so", tmp_path))
    monkeypatch.setattr(library, "tensorrt_library_path", lambda major: str(plugins))
    with pytest.raises(LibraryMissing, match=rf"liblongspan_trt{MAJORS[0]}_loader\.so is not installed beside"):
        library.tensorrt_loader_path(MAJORS[0])
    loader = shutil.copy(libraries / f"liblongspan_trt{MAJORS[0]}_loader.so", tmp_path)
    assert library.tensorrt_loader_path(MAJORS[0]) == str(loader)
