"""``longspan kernels``: compile kernel packs, and say what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..exporter.kernel_costs import Execution
    from ..plugins.gpu.variants import KernelSite


@click.group("kernels")
def command() -> None:
    """Compile GPU kernels ahead of time into kernel packs, and look into packs.

    No GPU is needed for any of it.
    """


def _names(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(word for word in (part.strip() for part in value.split(",")) if word)


@command.command("compile")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--arch", required=True, metavar="sm_80,…", help="Architectures to compile machine code for.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder for the pack.")
@click.option("--name", default="longspan", show_default=True, help="The file is DIR/NAME.pack.")
@click.option("--force", is_flag=True, help="Replace a pack of that name.")
@click.option("--ptx/--no-ptx", default=True, show_default=True, help="Also PTX, for devices of other architectures.")
@click.option(
    "--jobs", type=click.IntRange(min=1), metavar="N", help="Compilers at a time; default: one for each core."
)
@click.option("--operator", "operators", callback=_names, default="", metavar="NAME,…", help="Without BUNDLE: both.")
@click.option("--dtype", "dtypes", callback=_names, default="", metavar="T,…", help="float16, bfloat16, float32.")
@click.option("--head-size", "sizes", callback=_names, default="", metavar="D,…", help="D, or DxD_v where V differs.")
@click.option("--group", "groups", callback=_names, default="", metavar="N,…", help="Query heads per key head.")
@click.option(
    "--features", callback=_names, default="", metavar="NAME,…", help="Optional inputs, and flags like causal."
)
@click.option(
    "--dilation", callback=_names, default="", metavar="N,…", help="SlidingWindowAttention: one, or per head."
)
@click.option(
    "--block", type=click.IntRange(min=1), metavar="N", help="BlockSparseAttention: rows and keys of a block."
)
def compile_command(
    bundle: Path | None, arch: str, out: Path, name: str, force: bool, ptx: bool, jobs: int | None, **described: Any
) -> int:
    """Compile what the sites of BUNDLE need, or what the options describe, into one kernel pack.

    Without BUNDLE every combination of the options is compiled, for nodes that have exactly the inputs and flags of
    --features; window lengths are no part of a kernel. Flags: causal, exclude_self, softcap, lse, lists_per_head, tf32.
    """
    from ..exporter.errors import InvalidRequest
    from ..exporter.kernel_packs import compile_pack, require_triton, targets_of
    from ..plugins.gpu.pack import SUFFIX, write_pack
    from .terminal import console, progress

    targets = targets_of(arch, ptx)
    file = out / f"{name}{SUFFIX}"
    if not name or Path(name).name != name or name.startswith("."):
        raise InvalidRequest(f"--name {name}: must be the name of a file, without a folder")
    if out.exists() and not out.is_dir():
        raise InvalidRequest(f"--out {out}: is not a folder")
    if file.exists() and not force:
        raise InvalidRequest(f"{file}: is there already; choose another --name, or replace it with --force")
    sites, notes = _sites(bundle, described)
    require_triton()
    with progress("kernels") as stage:
        pack = compile_pack(sites, targets, jobs=jobs, progress=stage)
    out.mkdir(parents=True, exist_ok=True)
    write_pack(pack, file)
    terminal = console()
    for note in notes:
        terminal.print(note, soft_wrap=True, markup=False)
    terminal.print(
        f"{file}: {len(pack.kernels)} kernels for {', '.join(map(str, targets))}, "
        f"{file.stat().st_size / 2**20:,.2f} MiB, {pack.compiler}", soft_wrap=True, markup=False,
    )  # fmt: skip
    terminal.print(f"next: longspan kernels show {file}", soft_wrap=True, markup=False)
    return 0


def _sites(bundle: Path | None, described: dict[str, Any]) -> tuple[list[KernelSite], list[str]]:
    """The sites to compile for, and what to say about those that have no kernel."""
    from ..exporter.errors import InvalidRequest
    from ..exporter.kernel_sites import Wanted, graph_sites

    given = [name for name, value in described.items() if value]
    if bundle is not None:
        if given:
            raise InvalidRequest("a bundle says itself what its sites need; allowed with it: no description of sites")
        import onnx_ir as ir

        from ..exporter.bundle import Bundle

        found = graph_sites(ir.load(Bundle.open(bundle).model_path))
        notes = [f"{node}: no GPU kernel: {reason}" for node, reason in found.refused.items()]
        if not found.sites:
            raise InvalidRequest(f"{bundle}: no site has a GPU kernel; {'; '.join(notes) or 'it has no site'}")
        return list(found.sites.values()), notes
    if not described["dtypes"] or not described["sizes"]:
        raise InvalidRequest("what to compile is not said; next step: name a bundle, or give --dtype and --head-size")
    attributes: dict[str, Any] = {}
    if described["dilation"]:
        attributes["dilation"] = [_whole("--dilation", step) for step in described["dilation"]]
    if described["block"]:
        attributes |= {"q_block_size": described["block"], "kv_block_size": described["block"]}
    wanted = Wanted(
        operators=described["operators"] or ("SlidingWindowAttention", "BlockSparseAttention"),
        dtypes=described["dtypes"],
        head_sizes=[_head_sizes(text) for text in described["sizes"]],
        groups=[_whole("--group", text) for text in described["groups"]] or [1],
        features=described["features"],
        attributes=attributes,
    )
    return wanted.sites(), []


def _head_sizes(text: str) -> tuple[int, int]:
    size, by, v_size = text.partition("x")
    return _whole("--head-size", size), _whole("--head-size", v_size if by else size)


def _whole(option: str, text: str) -> int:
    from ..exporter.errors import InvalidRequest

    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise InvalidRequest(f"{option} {text}: must be a whole number from 1")
    return int(text)


@command.command("list")
@click.argument("pack", metavar="PACK|BUNDLE", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(pack: Path, as_json: bool) -> int:
    """List what PACK, or the pack inside a bundle, can execute, and on what."""
    from ..exporter.kernel_reports import open_pack
    from .kernels_table import print_recipes, recipes_json

    opened = open_pack(pack)
    if as_json:
        click.echo(recipes_json(opened), nl=False)
    else:
        print_recipes(opened)
    return 0


def _execution(length: int, batch: int, heads: int, window: int, density: float) -> Execution:
    from ..exporter.kernel_costs import Execution

    return Execution(length, batch, heads, None if window == -1 else window, density)


@command.command("show")
@click.argument("pack", metavar="PACK|BUNDLE", type=click.Path(path_type=Path))
@click.argument("variant", required=False)
@click.option("--length", type=int, default=4096, show_default=True, metavar="N", help="Tokens of a text, for costs.")
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Texts.")
@click.option("--heads", type=int, default=8, show_default=True, metavar="N", help="Key heads.")
@click.option(
    "--window", type=int, default=256, show_default=True, metavar="N", help="Keys to either side; -1 for all."
)
@click.option("--density", type=float, default=0.1, show_default=True, help="Pairs that block lists name, of all.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_command(pack: Path, variant: str | None, as_json: bool, **sizes: Any) -> int:
    """Show the kernels of PACK, or one VARIANT with its parameters: resources, work, and the least time it can take.

    VARIANT is a kernel's name or the beginning of it. Times are roofline bounds from published peak figures of one
    device for each architecture. Nothing was measured.
    """
    from ..exporter.kernel_reports import kernel_reports, open_pack
    from .kernels_table import kernels_json, print_kernel, print_kernels

    reports = kernel_reports(open_pack(pack), _execution(**sizes), variant)
    if as_json:
        click.echo(kernels_json(reports), nl=False)
    elif variant is None:
        print_kernels(reports)
    else:
        for report in reports:
            print_kernel(report)
    return 0
