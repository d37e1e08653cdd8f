"""Kernel packs as tables and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .terminal import console

if TYPE_CHECKING:
    from ..exporter.kernel_reports import KernelReport
    from ..plugins.gpu.pack import Pack, PackedRecipe

_REQUIRED = ("Q", "K", "V", "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
_FLAGS = ("softcap", "exclude_self", "lists_per_head")


def print_recipes(pack: Pack) -> None:
    """One row for each kind of node, with what it runs on."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, right in (("operator", False), ("T", False), ("D", True), ("group", True), ("features", False),
                         ("kernels", True), ("runs on", False)):  # fmt: skip
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    kinds: dict[tuple[object, ...], list[PackedRecipe]] = {}
    for recipe in pack.recipes:
        kinds.setdefault((recipe.operator, recipe.dtype, recipe.inputs, recipe.outputs, recipe.match), []).append(
            recipe
        )
    for recipes in kinds.values():
        facts = dict(recipes[0].match)
        kernels = {number for recipe in recipes for path in recipe.paths for number in path.launches}
        table.add_row(
            recipes[0].operator, recipes[0].dtype, _size(facts), str(facts["group"][0]),
            ", ".join(features_of(recipes[0])) or "none", str(len(kernels)), ", ".join(map(target_of, recipes)),
        )  # fmt: skip
    terminal = console()
    size = sum(len(kernel.code) for kernel in pack.kernels)
    terminal.print(
        f"{len(pack.kernels)} kernels, {size / 2**20:,.2f} MiB of code, by {pack.compiler}",
        style="bold",
        soft_wrap=True,
    )
    terminal.print(table)


def target_of(recipe: PackedRecipe) -> str:
    """What a recipe's code is for."""
    return f"sm_{recipe.architecture}" if recipe.form == "cubin" else f"PTX (sm_{recipe.architecture} and later)"


def features_of(recipe: PackedRecipe) -> list[str]:
    """Optional inputs and flags of a recipe's nodes."""
    facts = dict(recipe.match)
    found = [name for name in recipe.inputs if name not in _REQUIRED]
    found += ["causal"] if facts["is_causal"][0] else []
    found += [flag for flag in _FLAGS if facts.get(flag, (0,))[0]]
    steps = facts.get("dilation", (1,))
    found += [f"dilation {'/'.join(map(str, steps))}"] if max(steps) > 1 else []
    found += [f"blocks {facts['q_block_size'][0]}x{facts['kv_block_size'][0]}"] if "q_block_size" in facts else []
    return found + (["lse"] if "lse" in recipe.outputs else [])


def recipes_json(pack: Pack) -> str:
    """What `print_recipes` shows, for programs."""
    recipes = [
        {
            "operator": recipe.operator, "dtype": recipe.dtype, "architecture": recipe.architecture,
            "form": recipe.form, "inputs": recipe.inputs, "outputs": recipe.outputs,
            "match": {name: list(values) for name, values in recipe.match},
            "paths": {path.name: [pack.kernels[number].name for number in path.launches] for path in recipe.paths},
        }
        for recipe in pack.recipes
    ]  # fmt: skip
    content = {"compiler": pack.compiler, "kernels": len(pack.kernels), "recipes": recipes}
    return json.dumps(content, indent=2) + "\n"


def print_kernels(reports: Sequence[KernelReport]) -> None:
    """One row for each kernel."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("kernel", "for", "regs", "spilled", "shared", "per SM", "FLOP/B", "bound"):
        table.add_column(title, justify="left" if title in ("kernel", "for") else "right", overflow="fold")
    for report in reports:
        kernel = report.kernel
        table.add_row(
            kernel.name, f"sm_{kernel.architecture}" + (" PTX" if kernel.form == "ptx" else ""), str(kernel.registers),
            f"{kernel.stack} B", _kib(kernel.shared), str(report.blocks),
            f"{report.intensity:,.0f}" if report.main else "",
            f"{_time(report.bound.seconds)} {report.bound.limited_by}" if report.main else "",
        )  # fmt: skip
    terminal = console()
    terminal.print(table)
    for line in _notes(reports):
        terminal.print(line, soft_wrap=True, markup=False)


def print_kernel(report: KernelReport) -> None:
    """Everything about one kernel."""
    from rich.table import Table

    kernel, terminal = report.kernel, console()
    form = "PTX, resources as compiled for" if kernel.form == "ptx" else "machine code for"
    terminal.print(kernel.name, style="bold", soft_wrap=True, markup=False)
    used = sorted({f"{recipe.operator} of {recipe.dtype}" for recipe in report.recipes})
    lines = [
        f"{form} sm_{kernel.architecture}, {_kib(len(kernel.code))}, entry {kernel.entry}",
        f"from {kernel.function}, for {', '.join(used)}, D {_by(kernel.head_size, kernel.v_head_size)}, "
        f"features: {', '.join(kernel.features) or 'none'}",
        f"{kernel.threads} threads, {kernel.registers} registers each, {kernel.stack} bytes spilled, "
        f"{_kib(kernel.shared)} shared, {kernel.stages} stages; {report.blocks} blocks fit a multiprocessor",
        f"grid (postfix): {'  |  '.join(kernel.grid)}",
        "constants: " + ", ".join(f"{name}={value}" for name, value in kernel.constants if value != "none"),
    ]
    for line in lines:
        terminal.print(line, soft_wrap=True, markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("parameter", "type", "multiple of", "value"):
        table.add_column(title, overflow="fold")
    for parameter in kernel.parameters:
        meaning = parameter.meaning.replace(":", " ", 1).replace("[", "\\[")
        table.add_row(parameter.name, parameter.type, str(parameter.divisor), meaning)
    terminal.print(table)
    if report.main:
        work, bound = report.work, report.bound
        terminal.print(
            f"an execution: {work.flops / 1e9:,.3g} GFLOP, {work.bytes / 2**20:,.3g} MiB, {report.intensity:,.0f} FLOP "
            f"per byte (ridge {bound.ridge:,.0f}); at least {_time(bound.seconds)} on {bound.device}, limited by "
            f"{bound.limited_by}", soft_wrap=True, markup=False,
        )  # fmt: skip
        for line in _notes([report]):
            terminal.print(line, soft_wrap=True, markup=False)


def kernels_json(reports: Sequence[KernelReport]) -> str:
    """What `print_kernel` shows, for programs."""
    return json.dumps([_as_json(report) for report in reports], indent=2) + "\n"


def _as_json(report: KernelReport) -> dict[str, Any]:
    kernel = {
        field.name: getattr(report.kernel, field.name)
        for field in dataclasses.fields(report.kernel)
        if field.name not in ("code", "parameters", "constants")
    }
    kernel["code_bytes"] = len(report.kernel.code)
    kernel["constants"] = dict(report.kernel.constants)
    kernel["parameters"] = [dataclasses.asdict(parameter) for parameter in report.kernel.parameters]
    kernel["blocks_per_multiprocessor"] = report.blocks
    if report.main:
        kernel["execution"] = {
            "flops": report.work.flops, "bytes": report.work.bytes, "flops_per_byte": report.intensity,
            "roofline": dataclasses.asdict(report.bound),
        }  # fmt: skip
    return kernel


def _notes(reports: Sequence[KernelReport]) -> list[str]:
    sources = {report.bound.device: report.bound.source for report in reports if report.main}
    return [
        "bound: no kernel is faster, by the peak figures of " + "; ".join(f"{d} ({s})" for d, s in sources.items()),
        "nothing here was measured",
    ] if sources else []  # fmt: skip


def _size(facts: dict[str, tuple[int, ...]]) -> str:
    return _by(facts["D"][0], facts["D_v"][0])


def _by(size: int, v_size: int) -> str:
    return str(size) if size == v_size else f"{size}x{v_size}"


def _kib(size: int) -> str:
    return f"{size / 1024:,.1f} KiB"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"
