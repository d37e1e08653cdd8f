"""Where TensorRT's headers come from, and what a library without them means."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from longspan.plugins import InvalidLibrary, LibraryMissing, library, plugin_library_major, tensorrt_library_path
from longspan.plugins.tensorrt import headers
from longspan.plugins.tensorrt.headers import Unavailable, find_headers


def write_headers(folder: Path, major: int, *, indirect: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / headers.HEADER).write_text("#pragma once\n")
    named = f"#define TRT_MAJOR_ENTERPRISE {major}\n#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< Major.\n"
    (folder / headers.VERSION_HEADER).write_text(named if indirect else f"#define NV_TENSORRT_MAJOR {major}\n")
    return folder


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable, no system headers, no package."""
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    monkeypatch.setattr(headers, "SYSTEM_FOLDERS", (str(tmp_path / "system"),))
    monkeypatch.setattr(headers, "_packaged", lambda: iter((tmp_path / "packaged",)))


def test_without_headers_there_is_none() -> None:
    assert find_headers() == {}


def test_one_folder_for_each_major_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ten, eleven = write_headers(tmp_path / "ten", 10, indirect=False), write_headers(tmp_path / "eleven", 11)
    write_headers(tmp_path / "system", 10)
    assert find_headers() == {10: tmp_path / "system"}
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(eleven))
    assert find_headers() == {10: tmp_path / "system", 11: eleven}
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", f"{ten}:{eleven}:")
    assert find_headers() == {10: ten, 11: eleven}


def test_the_package_is_the_last_choice(tmp_path: Path) -> None:
    write_headers(tmp_path / "packaged", 10)
    assert find_headers() == {10: tmp_path / "packaged"}
    write_headers(tmp_path / "system", 10)
    assert find_headers() == {10: tmp_path / "system"}


def test_tensorrt_rtx_and_old_versions_are_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_headers(tmp_path / "system", 1)
    assert find_headers() == {}
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(write_headers(tmp_path / "old", 8)))
    with pytest.raises(Unavailable, match="has TensorRT 8; allowed: 10, 11"):
        find_headers()


def test_a_folder_that_is_named_is_not_worked_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_headers(tmp_path / "system", 10)
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(Unavailable, match=r"nowhere, which has no NvInferRuntime.h"):
        find_headers()


def test_what_cmake_reads(tmp_path: Path) -> None:
    folder = write_headers(tmp_path / "with space", 11)
    done = subprocess.run([sys.executable, headers.__file__], env={"TENSORRT_INCLUDE_DIR": str(folder)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert f"11 {folder}" in done.stdout.splitlines()
    done = subprocess.run([sys.executable, headers.__file__], env={"TENSORRT_INCLUDE_DIR": "nowhere"},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 1 and "TENSORRT_INCLUDE_DIR names nowhere" in done.stderr


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_candidates", lambda name: iter((tmp_path / name,)))
    with pytest.raises(LibraryMissing, match=r"liblongspan_trt11.so is not installed.*TENSORRT_INCLUDE_DIR=.* pip"):
        tensorrt_library_path(11)
    (tmp_path / "liblongspan_trt11.so").touch()
    assert tensorrt_library_path(11) == str(tmp_path / "liblongspan_trt11.so")
    with pytest.raises(LibraryMissing, match="no plugin library for TensorRT 9; allowed: 10, 11"):
        tensorrt_library_path(9)


def elf(*notes: tuple[bytes, int, bytes]) -> bytes:
    """A file with nothing but notes."""
    content = b""
    for name, kind, description in notes:
        content += struct.pack("<III", len(name), len(description), kind)
        content += name + bytes(-len(name) % 4) + description + bytes(-len(description) % 4)
    head = b"\x7fELF\x02\x01" + bytes(26) + struct.pack("<Q", 64) + bytes(14) + struct.pack("<HH", 56, 1)
    segment = struct.pack("<IIQ", 4, 4, 120) + bytes(16) + struct.pack("<QQQ", len(content), len(content), 4)
    return head + bytes(64 - len(head)) + segment + content


def test_the_version_of_a_library_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "plugins.so"
    ours = (b"longspan\0", 1, struct.pack("<I", 11))
    file.write_bytes(elf((b"GNU\0", 3, b"0123456789"), ours))
    assert plugin_library_major(file) == 11
    whole = file.read_bytes()
    for refused, why in (
        (elf((b"GNU\0", 3, bytes(20))), "does not say which TensorRT it is for"),
        (elf((b"longspan\0", 2, struct.pack("<I", 11))), "does not say which TensorRT it is for"),
        (b"", "is not a 64-bit ELF library"),
        (b"\x7fELF\x01\x01" + whole[6:], "is not a 64-bit ELF library"),
        (whole[:60], "is not a 64-bit ELF library"),
    ):
        file.write_bytes(refused)
        with pytest.raises(InvalidLibrary, match=why):
            plugin_library_major(file)
    for size in range(len(whole)):  # cut anywhere, it is refused or understood, never anything else
        file.write_bytes(whole[:size])
        with pytest.raises(InvalidLibrary):
            plugin_library_major(file)
    with pytest.raises(InvalidLibrary, match="cannot be read: No such file or directory"):
        plugin_library_major(tmp_path / "nowhere.so")
    with pytest.raises(InvalidLibrary, match="cannot be read"):
        plugin_library_major(tmp_path)
