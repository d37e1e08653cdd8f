"""Where ONNX Runtime's headers come from, without touching the network."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest
from longspan.plugins.ort import headers
from longspan.plugins.ort.headers import Unavailable, find_headers


def write_header(folder: Path, version: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / headers.HEADER).write_text(f"#define ORT_API_VERSION {version}\n")
    return folder


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable, no system headers, no mirror, an empty cache, and no network."""
    monkeypatch.delenv("ONNXRUNTIME_INCLUDE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(headers, "SYSTEM_FOLDERS", (str(tmp_path / "system"),))
    monkeypatch.setattr(headers, "_debian_mirrors", list)

    def unreachable(url: str, timeout: float) -> io.BytesIO:
        raise OSError(f"unreachable: {url}")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)


def test_every_way_is_named_when_none_works() -> None:
    with pytest.raises(Unavailable) as refusal:
        find_headers()
    for words in ("ONNXRUNTIME_INCLUDE_DIR: not set", "the system: no onnxruntime_c_api.h", "no Debian mirror",
                  "the official release archive: unreachable", "LONGSPAN_KERNELS=OFF"):  # fmt: skip
        assert words in str(refusal.value)


def test_the_variable_comes_first_and_is_never_worked_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_header(tmp_path / "system", 21)
    monkeypatch.setenv("ONNXRUNTIME_INCLUDE_DIR", str(write_header(tmp_path / "mine", 22)))
    assert find_headers() == tmp_path / "mine"
    monkeypatch.setenv("ONNXRUNTIME_INCLUDE_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(Unavailable, match="nowhere"):
        find_headers()


def test_old_headers_are_refused(tmp_path: Path) -> None:
    write_header(tmp_path / "system", 16)
    with pytest.raises(Unavailable, match="has API 16, older than 17"):
        find_headers()
    write_header(tmp_path / "system", 17)
    assert find_headers() == tmp_path / "system"


def archive(folder: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name in (f"{folder}/{headers.HEADER}", "../outside.h"):
            text = b"#define ORT_API_VERSION 20\n"
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return content.getvalue()


def test_the_release_archive_is_checked_and_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = archive(headers.ARCHIVE_INCLUDE)
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(content))
    with pytest.raises(Unavailable, match="has SHA-256"):
        find_headers()
    monkeypatch.setattr(headers, "ARCHIVE_SHA256", hashlib.sha256(content).hexdigest())
    found = find_headers()
    assert (found / headers.HEADER).is_file()
    assert not list(tmp_path.rglob("outside.h"))
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: pytest.fail("fetched again"))
    assert find_headers() == found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sources.list", "deb http://mirror.example/debian bookworm main\ndeb http://other.example/apt stable main\n"),
        ("debian.sources", "Types: deb\nURIs: http://mirror.example/debian/\nSuites: bookworm\n"),
    ],
)
def test_debian_mirrors_are_read_from_apt(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    etc = tmp_path / "apt"
    folder = etc if name == "sources.list" else etc / "sources.list.d"
    folder.mkdir(parents=True)
    (folder / name).write_text(text)
    monkeypatch.setattr(headers, "APT_FOLDER", etc)
    assert headers._debian_mirrors() == ["http://mirror.example/debian"]
