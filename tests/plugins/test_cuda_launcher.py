"""The C++ launcher against the Python one: the same packs are read, and every node is launched with the same values."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from longspan.plugins.gpu import launch
from longspan.plugins.gpu.expressions import evaluate
from longspan.plugins.gpu.launch import LaunchPlan
from longspan.plugins.gpu.pack import InvalidPack, Pack
from longspan.plugins.gpu.pack_build import PTX, Target, recipe_for
from longspan.plugins.gpu.variants import KernelSite
from longspan.plugins.registry import operator

from .cuda_programs import build, entry_of, stub_pack
from .packs import INDEX_START, pack, sealed, with_index

MULTIPROCESSORS = 108


class Program:
    """A running `launch_pack`."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen([str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *lines: str) -> list[str]:
        """Send lines, the last of which is answered."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n".join(lines) + "\n")
        self.process.stdin.flush()
        answer = []
        while (line := self.process.stdout.readline()) != "done\n":
            assert line, "the program ended"
            answer.append(line.rstrip("\n"))
        return answer

    def reads(self, data: bytes, file: Path) -> bool:
        """Whether it accepts a pack."""
        file.write_bytes(data)
        return not self.ask("node SlidingWindowAttention float16 0", f"pack {file}")


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    running = Program(build("launch_pack") / "launch_pack")
    yield running
    running.process.kill()
    running.process.wait()


def _cases(name: str) -> list[tuple[Any, str, str]]:
    """Every case of an operator, by turns in both layouts and all types."""
    from . import block_sparse_cases, sliding_window_cases

    cases = sliding_window_cases.CASES if name == "SlidingWindowAttention" else block_sparse_cases.CASES
    dtypes = ("float16", "bfloat16", "float32")
    return [(case, ("bhsd", "bsd")[i % 2], dtypes[i % 3]) for i, case in enumerate(cases)]


def _plan(
    name: str, case: Any, layout: str, dtype: str, target: Target, multiprocessors: int = MULTIPROCESSORS
) -> tuple[LaunchPlan, dict[str, Any]]:
    """What the Python launcher makes of a case, and the node's attributes."""
    from longspan.plugins.block_sparse_attention import definition as lists
    from longspan.plugins.sliding_window_attention import definition as window

    attributes = case.node_attributes(layout)
    given = {key: value.shape for key, value in case.operands(layout).items()}
    inputs = {tensor.name: given[tensor.name] for tensor in operator(name).inputs if tensor.name in given}
    definition: Any = window if name == "SlidingWindowAttention" else lists
    shapes = definition.infer_shapes(inputs, definition.Attributes.from_mapping(attributes))
    site = launch.site_of(name, shapes, dtype, inputs, attributes, lse=case.batch % 2 == 0)
    recipe = recipe_for(site, target)
    return launch.plan(recipe, shapes, inputs, multiprocessors, attributes.get("scale")), attributes


def _pointers(plan: LaunchPlan) -> dict[str, int]:
    """The addresses that `launch_pack` gives operands, and the launcher buffers."""
    names = [tensor.name for tensor in operator(plan.recipe.site.operator).inputs]
    pointers = {f"input:{name}": 4096 * (1 + names.index(name)) for name in plan.inputs}
    pointers |= {"output:Y": 1 << 20, "output:lse": 1 << 21}
    at = 1 << 30
    for buffer in plan.path.buffers:
        pointers[f"buffer:{buffer.name}"] = at
        at += max(-(-4 * evaluate(buffer.elements, plan.sizes) // 256) * 256, 256)
    return pointers


def _expected(plan: LaunchPlan) -> list[str]:
    """Memsets and launches as the stub prints them."""
    pointers = _pointers(plan)
    lines = []
    for buffer in plan.path.buffers:
        size = 4 * evaluate(buffer.elements, plan.sizes)
        if buffer.zeroed and size:
            lines.append(f"memset {pointers[f'buffer:{buffer.name}']:x} 0 {size} stream 7")
    for kernel in plan.path.kernels:
        grid = plan.grid(kernel)
        if 0 in grid:
            continue
        values = []
        for parameter in kernel.parameters:
            value = launch.argument(plan, parameter.meaning, pointers)
            if parameter.type == "fp32":
                (bits,) = struct.unpack("<I", struct.pack("<f", value))
            else:
                bits = value % (1 << (32 if parameter.type == "i32" else 64))
            values.append(f"{bits:x}")
        lines.append(
            f"launch {entry_of(kernel)} grid {','.join(map(str, grid))} block {kernel.num_warps * 32},1,1 shared 4096 "
            f"stream 7 parameters {' '.join(values)} 0 0"
        )
    return lines


def _request(plan: LaunchPlan, attributes: Mapping[str, Any]) -> list[str]:
    """The node as `launch_pack` reads it."""
    site: KernelSite = plan.recipe.site
    lines = [f"node {site.operator} {site.dtype} {int(site.lse)}"]
    for attribute in operator(site.operator).attributes:
        value = attributes.get(attribute.name, attribute.default)
        if attribute.kind == "ints":
            steps = [value] if isinstance(value, int) else value
            lines.append(f"{attribute.name} {' '.join(map(str, steps))}")
        elif value is not None:
            lines.append(f"{attribute.kind} {attribute.name} {int(value) if attribute.kind == 'int' else value!r}")
    return lines + [f"input {name} {' '.join(map(str, shape))}" for name, shape in plan.inputs.items()]


@pytest.mark.parametrize(("target", "capability"), [(Target(90), 90), (Target(80), 86), (PTX, 120)], ids=str)
@pytest.mark.parametrize("name", ["SlidingWindowAttention", "BlockSparseAttention"])
def test_every_node_is_launched_as_in_python(
    name: str, target: Target, capability: int, program: Program, tmp_path: Path
) -> None:
    different = {}
    launches = 0
    multiprocessors = 400 if target == PTX else MULTIPROCESSORS  # more than a launcher counts, and fewer
    for case, layout, dtype in _cases(name):
        plan, attributes = _plan(name, case, layout, dtype, target, multiprocessors)
        file = tmp_path / "stub.pack"
        file.write_bytes(stub_pack([(plan.recipe, target)]).to_bytes())
        request = _request(plan, attributes)
        device = f"device {capability} {multiprocessors} 232448"
        assert program.ask(device, request[0], f"pack {file}") == []
        got = [line for line in program.ask(*request[1:], "launch") if not line.startswith(("load ", "prepare "))]
        launches += sum(line.startswith("launch ") for line in got)
        if got != _expected(plan):
            different[case.name, layout, dtype] = (got, _expected(plan))
    assert not different
    assert launches > 40


def test_both_readers_accept_the_same_packs(program: Program, tmp_path: Path) -> None:
    data = pack().to_bytes()
    index = data[INDEX_START : INDEX_START + struct.unpack_from("<Q", data, 24)[0]]
    generator = random.Random(0)
    forged = [data, sealed(data[:-1]), data + b"\0"]
    fields = sorted({field for line in index.split(b"\n") for field in line.split(b"\t")})
    for _ in range(600):
        lines = index.split(b"\n")
        row = generator.randrange(len(lines) - 1)
        change = generator.randrange(4)
        if change == 0:
            del lines[row]
        elif change == 1:
            lines.insert(row, lines[generator.randrange(len(lines) - 1)])
        else:
            words = lines[row].split(b"\t")
            at = generator.randrange(len(words))
            words[at] = generator.choice(fields) if change == 2 else _nudged(words[at], generator)
            lines[row] = b"\t".join(words)
        forged.append(with_index(data, b"\n".join(lines)))
    for _ in range(200):
        changed = bytearray(data)
        changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        forged.append(sealed(bytes(changed)))
    verdicts = [(_python_reads(one), program.reads(one, tmp_path / "forged.pack")) for one in forged]
    assert [number for number, (python, cpp) in enumerate(verdicts) if python != cpp] == []
    accepted = sum(python for python, _ in verdicts)
    assert 10 < accepted < len(forged) - 100


def _nudged(word: bytes, generator: random.Random) -> bytes:
    """A field with something small about it changed."""
    if word.isdigit() and generator.random() < 0.7:
        number = int(word)
        return str(generator.choice((0, 1, number + 1, max(number - 1, 0), number * 2, 10**18, 2**31))).encode()
    at = generator.randrange(len(word) + 1)
    return word[:at] + generator.choice((b"x", b"0", b" ", b",", b".", b"-", b"", b"B *")) + word[at:]


def _python_reads(data: bytes) -> bool:
    try:
        Pack.from_bytes(data)
    except InvalidPack:
        return False
    return True
