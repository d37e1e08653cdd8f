"""The benchmark program at a tiny size: whether it works and checks what it times, not how fast anything is."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from longspan.plugins import ort_library_path
from longspan.plugins.errors import LibraryMissing

pytestmark = pytest.mark.bench
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "cpu_attention.py"

try:
    ort_library_path()
except LibraryMissing as error:
    pytest.skip(str(error), allow_module_level=True)


def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cpu_attention", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(PROGRAM.parent))  # it imports its neighbours
    monkeypatch.setitem(sys.modules, "cpu_attention", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("case", "peers"),
    [
        ("tiny", {"GroupQueryAttention", "longspan, causal"}),
        ("tiny-blocks", set()),
        ("tiny-layout", {"SparseAttention"}),
    ],
)
def test_checks_every_kernel_and_prints_ratios(case: str, peers: set[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(PROGRAM), "--case", case, "--quick", "--repetitions", "1", "--threads", "1"]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())[case]
    assert set(results["errors"]) == {"longspan", *peers} == set(results["timings"]) - {"sgemm", "sgemm, 1 thread"}
    assert all(error < 1e-5 for error in results["errors"].values())
    for peer in peers - {"longspan, causal"}:
        assert re.search(rf"^[\d.]+x {peer}, medians [\d.]+x( \(must [\d.]+x\))?$", done.stdout, re.MULTILINE)
    assert re.search(r"\d+% of the floor", done.stdout)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = program(monkeypatch)
    site = module.SITES["tiny"]
    operands = site.operands()
    right = module.kernel(operands, site.attributes(), 1)
    assert module.check(site, operands, {"right": right})["right"] < 1e-5
    with pytest.raises(SystemExit, match=r"wrong: error .* nothing was timed"):
        module.check(site, operands, {"wrong": lambda: right() + np.float32(1e-3)})


def test_a_wrong_block_sparse_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = program(monkeypatch).cpu_block_sparse
    site = module.SITES["tiny-layout"]
    operands = site.operands()
    right = site.run(operands, 1)
    assert module.check(site, operands, {"right": right})["right"] < 1e-5
    with pytest.raises(SystemExit, match=r"wrong: error .* nothing was timed"):
        module.check(site, operands, {"wrong": lambda: right()[:, ::-1]})
