"""``longspan export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import conversion_from, conversion_options, request_from, source_options

if TYPE_CHECKING:
    from ..plugins.gpu.pack_build import Target


@click.command("export")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@conversion_options
@source_options
@click.option("--gpu-arch", metavar="sm_80,…", help="Put GPU kernels for these architectures into the model.")
@click.option("--ptx/--no-ptx", default=True, show_default=True, help="With --gpu-arch, PTX for other devices too.")
@click.option("--force", is_flag=True, help="Replace the bundle that stands at OUT.")
def command(model: str, out: Path, gpu_arch: str | None, ptx: bool, force: bool, **options: object) -> int:
    """Trace MODEL, replace its attention by longspan operators, and write a bundle to OUT.

    MODEL is a Hugging Face folder or hub id, a config.json with --random-weights, file.py:factory whose function
    returns (module, example_inputs[, dynamic_shapes]), or a .pt2 file.
    """
    conversion = conversion_from(options)
    from ..exporter import export
    from .sites_table import encoder_lines, lowering_lines, pattern_lines, row_of, sites_table, standard_lines
    from .terminal import console, progress

    gpu: tuple[Target, ...] = ()
    if gpu_arch is not None:
        from ..exporter.kernel_packs import targets_of

        gpu = targets_of(gpu_arch, ptx)
    with progress("export") as stage:
        request = request_from(model, options)
        bundle = export(request, out, conversion=conversion, force=force, gpu=gpu, progress=stage)
    manifest = bundle.manifest
    terminal = console()
    shared, table = sites_table([row_of(site) for site in manifest.sites], manifest.standard_sites, terminal.width)
    for line in [*encoder_lines(manifest.source.encoder_of), *shared]:
        terminal.print(line, soft_wrap=True)
    terminal.print(table)
    lines = [*pattern_lines(manifest.sites), *lowering_lines(manifest.sites)]
    for line in [*lines, *standard_lines(manifest.standard_sites)]:
        terminal.print(line, soft_wrap=True, markup=False)
    count = len(manifest.sites)
    replaced = "1 site" if count == 1 else f"{count} sites"
    limit = f"up to {manifest.max_length:,} tokens" if manifest.max_length else "any length"
    size = sum(file.stat().st_size for file in bundle.path.iterdir()) / 2**20
    terminal.print(f"{bundle.path}: {replaced} replaced, {limit}, {size:,.1f} MiB")
    if manifest.gpu is not None:
        kernels, size = manifest.gpu, manifest.gpu.bytes / 2**20
        terminal.print(f"{kernels.kernels} GPU kernels in the model for {', '.join(kernels.targets)}: {size:,.2f} MiB")
        for node, reason in kernels.refused.items():
            terminal.print(f"{node}: no GPU kernel: {reason}", soft_wrap=True, markup=False)
    if manifest.approximation:
        terminal.print(f"approximates the original: {manifest.approximation}")
    terminal.print(f"next: longspan check {bundle.path}")
    return 0
