"""The TensorRT plugins, their builder and runtime played by C++ programs, against the launcher alone."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from longspan.plugins.gpu.pack_build import PTX, Target
from longspan.plugins.tensorrt.headers import find_headers

from .cuda_programs import build, stub_pack
from .test_cuda_launcher import Program, _cases, _plan, _request

MAJORS = sorted(find_headers())
pytestmark = pytest.mark.skipif(not MAJORS, reason="no headers of TensorRT: install kernel-lens")


@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("part", ["build", "runtime"])
def test_a_played_builder_and_runtime(part: str, major: int, tmp_path: Path) -> None:
    program = build(f"trt{major}_plugin_{part}_test") / f"trt{major}_plugin_{part}_test"
    done = subprocess.run([str(program)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("target", "capability"), [(Target(90), 90), (PTX, 120)], ids=str)
@pytest.mark.parametrize("name", ["SlidingWindowAttention", "BlockSparseAttention"])
def test_every_node_is_launched_as_without_tensorrt(name: str, target: Target, capability: int, tmp_path: Path) -> None:
    programs = [Program(build(f"trt{MAJORS[0]}_play_plugin") / f"trt{MAJORS[0]}_play_plugin"),
                Program(build("launch_pack") / "launch_pack")]  # fmt: skip
    different: dict[Any, Any] = {}
    compared = 0
    try:
        for case, layout, dtype in _cases(name):
            plan, attributes = _plan(name, case, layout, dtype, target)
            masks = plan.inputs.get("block_masks")
            if masks is not None and masks[1] * masks[2] % 4:
                continue  # no whole words: there is no such node in a network
            file = tmp_path / "stub.pack"
            file.write_bytes(stub_pack([(plan.recipe, target)]).to_bytes())
            request = _request(plan, attributes)
            answers = []
            for program in programs:
                assert program.ask(f"device {capability} 108 232448", request[0], f"pack {file}") == []
                answers.append(program.ask(*request[1:], "launch"))
            workspace = [int(line.split()[1]) for line in answers[0] if line.startswith("workspace ")]
            played, alone = ([line for line in lines if line.startswith(("memset", "launch", "error"))]
                             for lines in answers)  # fmt: skip
            compared += len(alone)
            if played != alone or not workspace or workspace[0] < _end_of_scratch(plan):
                different[case.name, layout, dtype] = (played, alone, workspace)
    finally:
        for program in programs:
            program.process.kill()
            program.process.wait()
    assert not different
    assert compared > 40


def _end_of_scratch(plan: Any) -> int:
    """Bytes from the start of scratch memory to the end of the last buffer."""
    from longspan.plugins.gpu.expressions import evaluate

    sizes = [max(-(-4 * evaluate(buffer.elements, plan.sizes) // 256) * 256, 256) for buffer in plan.path.buffers]
    return sum(sizes) + (256 if sizes else 0)


def test_the_workspace_of_a_long_profile_is_bounded_closely(tmp_path: Path) -> None:
    """Splits depend on batch, rows and keys in opposite directions; the bound must neither miss nor run away."""
    from longspan.plugins.gpu.pack_build import recipe_for
    from longspan.plugins.gpu.variants import KernelSite

    inputs = ("Q", "K", "V", "global_mask")
    site = KernelSite("SlidingWindowAttention", "float16", 64, 64, 12, 12, inputs,
                      {"left_window_size": 256, "right_window_size": 256, "dilation": (1,)})  # fmt: skip
    file = tmp_path / "stub.pack"
    file.write_bytes(stub_pack([(recipe_for(site, Target(90)), Target(90))]).to_bytes())
    program = Program(build(f"trt{MAJORS[0]}_play_plugin") / f"trt{MAJORS[0]}_play_plugin")
    try:
        assert program.ask("device 90 132 232448", "node SlidingWindowAttention float16 0", f"pack {file}") == []
        shapes = [f"input {name} 16 12 16384 64" for name in "QKV"]
        answer = program.ask("int left_window_size 256", "int right_window_size 256", "dilation 1", *shapes,
                             "input global_mask 16 16384", "launch")  # fmt: skip
    finally:
        program.process.kill()
        program.process.wait()
    assert not [line for line in answer if line.startswith("error")], answer
    workspace = int(re.sub("[^0-9]", "", answer[0]))
    assert 16 * 16384 * 8 < workspace < 64 << 20
