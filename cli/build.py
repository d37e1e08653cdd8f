"""``longspan build``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..exporter.engines.request import (
    DTYPES,
    HARDWARE_COMPATIBILITY,
    PLUGIN_APIS,
    PROVIDERS,
    TARGETS,
    BuildRequest,
    pool_limits_of,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..exporter.engines import Engine, EngineManifest
    from ..exporter.engines.manifest import PluginRecord
    from ..exporter.engines.profiles import Profile
    from ..exporter.sites.record import Rung


def _capabilities(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """``sm89,sm_120`` and ``8.9`` as names of compute capabilities; what is none stays as it is."""
    capabilities = []
    for word in filter(None, (word.strip().lower() for word in (value or "").split(","))):
        digits = word.removeprefix("sm").replace("_", "").replace(".", "")
        capabilities.append(f"sm{digits}" if digits.isdigit() else word)
    return tuple(capabilities)


@click.command("build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(TARGETS), required=True, help="What the engine is for.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Compute in this type (default: the model's).")
@click.option("--min-shapes", multiple=True, metavar="INPUT:[N,…]", help="Smallest shape of an input (default: 1).")
@click.option("--opt-shapes", multiple=True, metavar="INPUT:[N,…]", help="Shape that kernels are chosen for.")
@click.option("--max-shapes", multiple=True, metavar="INPUT:[N,…]", help="Largest shape of an input.")
@click.option(
    "--compute-capability",
    "compute_capabilities",
    callback=_capabilities,
    metavar="sm89,…",
    help="What the engine runs on (default: the GPU that is here).",
)
@click.option("--graph-only", is_flag=True, help="Write the graph that TensorRT would get, for trtexec or a check.")
@click.option("--name", default="", help="Name of the engine (default: from target, device and type).")
@click.option("--force", is_flag=True, help="Replace an engine of that name.")
@click.option("--plugin-api", type=click.Choice(PLUGIN_APIS), help="TensorRT: how it gets our kernels (v3).")
@click.option("--plugin-library", type=click.Path(path_type=Path), help="TensorRT: this library, not Longspan's own.")
@click.option("--require-kernel", is_flag=True, help="TensorRT: fail with code 5 where a site has no kernel.")
@click.option("--timing-cache", type=click.Path(path_type=Path), help="TensorRT: keep timings of kernels here.")
@click.option(
    "--hardware-compatibility-level",
    "hardware_compatibility",
    type=click.Choice(HARDWARE_COMPATIBILITY),
    default="none",
    help="TensorRT: run on other GPUs too.",
)
@click.option("--version-compatible", is_flag=True, help="TensorRT: let later versions load the engine.")
@click.option("--weight-streaming", is_flag=True, help="Let weights stay in host memory.")
@click.option("--strip", is_flag=True, help="Leave the weights out, to be refitted.")
@click.option("--refit", is_flag=True, help="Let weights be replaced later.")
@click.option("--pool-limit", multiple=True, metavar="POOL:SIZE", help="Limit a memory pool, e.g. workspace:1G.")
@click.option("--optimization-level", type=int, metavar="0-5", help="0 builds fastest, 5 the fastest engine.")
@click.option("--provider", type=click.Choice(PROVIDERS), default="cpu", help="ort: execution provider.")
def command(bundle: Path, force: bool, pool_limit: tuple[str, ...], **options: Any) -> int:
    """Build an engine of BUNDLE, next to its model, in BUNDLE/engines/NAME.

    tensorrt: an engine with the longspan plugin, on the GPU that will run it. tensorrt-rtx: an engine of standard
    layers, also without a GPU (--compute-capability). ort: an optimised model with the options of its session.

    A shape of one input gives the batch and the length, and so the shapes of the others; an input that is named again
    begins the next optimization profile.
    """
    from ..exporter.engines import build
    from .terminal import console, progress

    request = BuildRequest(pool_limits=pool_limits_of(pool_limit), **options)
    warnings: list[str] = []
    with progress("build") as stage:
        engine = build(bundle, request, force=force, progress=stage, warn=warnings.append)
    print_engine(engine, bundle, warnings, console())
    return 0


def print_engine(engine: Engine, bundle: Path, warnings: list[str], terminal: Console) -> None:
    """Print what was built, what it takes, and how its attention sites were lowered."""
    from ..exporter.engines.runtimes import RUNTIMES

    manifest = engine.manifest
    where = f" for {', '.join(manifest.compute_capabilities)}" if manifest.compute_capabilities else ""
    size = sum(file.stat().st_size for file in engine.path.iterdir()) / 2**20
    terminal.print(
        f"[bold]{engine.name}[/]: {RUNTIMES[manifest.target].title}{where}, {manifest.dtype}, {size:,.1f} MiB, made in "
        f"{manifest.build_s:.1f} s",
        soft_wrap=True,
    )
    for number, profile in enumerate(manifest.profiles):
        terminal.print(_profile_table(profile, f"profile {number + 1}" if len(manifest.profiles) > 1 else "input"))
    for line in _lowering_lines(manifest):
        terminal.print(line, soft_wrap=True, markup=False)
    if manifest.kept_in_fp32:
        terminal.print(f"{sum(manifest.kept_in_fp32.values())} nodes stay in fp32:")
    for reason, count in manifest.kept_in_fp32.items():
        terminal.print(f"  {count:4}  {reason}", soft_wrap=True, markup=False)
    if manifest.plugin is not None:
        terminal.print(f"plugin: {_plugin(manifest.plugin)}", soft_wrap=True, markup=False)
    for text in warnings:
        terminal.print(f"warning: {text}", soft_wrap=True, markup=False)
    terminal.print(f"{engine.file}: {manifest.status}", soft_wrap=True, markup=False)
    for line in _next_steps(engine, bundle):
        terminal.print(line, soft_wrap=True, markup=False)


def _next_steps(engine: Engine, bundle: Path) -> list[str]:
    from ..exporter.engines.manifest import NOT_BUILT

    manifest = engine.manifest
    if manifest.status != NOT_BUILT or manifest.plugin is None:
        return [f"next: longspan check {bundle} --engine {engine.name}"]
    words = ["trtexec", f"--onnx={engine.file}", "--stronglyTyped"]
    if manifest.plugin.api == "v3":
        words.append("--dynamicPlugins=liblongspan_trt10.so")
    for bound in ("min", "opt", "max"):
        shapes = manifest.profiles[0].inputs.items()
        named = (f"{name}:{'x'.join(map(str, getattr(shape, bound)))}" for name, shape in shapes)
        words.append(f"--{bound}Shapes={','.join(named)}")
    return [f"next, where TensorRT is: {' '.join(words)}"]


def _profile_table(profile: Profile, title: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (title, "min", "opt", "max"):
        table.add_column(column)
    for name, shapes in profile.inputs.items():
        table.add_row(name, *("×".join(map(str, shape)) for shape in (shapes.min, shapes.opt, shapes.max)))
    return table


def _lowering_lines(manifest: EngineManifest) -> list[str]:
    """The ladder of the sites; sites that share it share its lines."""
    by_ladder: dict[tuple[Rung, ...], list[str]] = {}
    for site in manifest.sites:
        by_ladder.setdefault(site.ladder, []).append(site.node)
    lines = []
    for ladder, nodes in by_ladder.items():
        shown = ", ".join(nodes[:2]) + (f" and {len(nodes) - 2} more" if len(nodes) > 2 else "")
        lines.append(f"{len(nodes)} of {len(manifest.sites)} sites: {shown}")
        lines += [f"  {'✓' if rung.chosen else '✗'} {rung.lowering}: {rung.reason}" for rung in ladder]
    return lines


def _plugin(plugin: PluginRecord) -> str:
    kernels = f"kernels for {', '.join(plugin.kernels)}"
    if plugin.library:
        return f"{plugin.library}; the engine holds the {kernels}"
    if plugin.api == "aot":
        return f"none is needed; the engine holds the {kernels}"
    return f"the library for the TensorRT that builds the engine; the graph holds the {kernels}"
