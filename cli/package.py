"""``longspan package``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click


@click.command("package")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--triton-server",
    "out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="Write a model repository of Triton Inference Server to DIR.",
)
@click.option("--name", default="", metavar="MODEL", help="Name of the model; default: the bundle's folder.")
@click.option(
    "--engine",
    "engines",
    multiple=True,
    metavar="NAME",
    help="Serve this engine; again for each further version, in order. Default: all that can be served.",
)
@click.option(
    "--mount",
    default="/longspan",
    show_default=True,
    metavar="PATH",
    help="Where the server will see DIR.",
)
@click.option("--max-batch-size", type=int, metavar="N", help="Rows of a batch at most; 0: requests run alone.")
@click.option(
    "--queue-delay",
    type=int,
    default=1000,
    show_default=True,
    metavar="US",
    help="Longest time that a request waits for others to join its batch, in microseconds.",
)
@click.option(
    "--plugin-library",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="TensorRT plugin library that the engines were built with.",
)
@click.option("--force", is_flag=True, help="Replace the model repository that stands at DIR.")
def command(
    bundle: Path,
    out: Path,
    name: str,
    engines: tuple[str, ...],
    mount: str,
    max_batch_size: int | None,
    queue_delay: int,
    plugin_library: Path | None,
    force: bool,
) -> int:
    """Write engines of BUNDLE, made by longspan build, as a model repository for an inference server.

    Every engine becomes a version of the model, with the plugin libraries that it needs, a configuration and warm-up
    requests; README.md in DIR says how to start and call the server.
    """
    from ..exporter.serving import PackageRequest, package
    from .terminal import console, progress

    request = PackageRequest(
        name=name,
        engines=engines,
        mount=mount,
        max_batch=max_batch_size,
        queue_delay_us=queue_delay,
        plugin_library=plugin_library,
    )
    with progress("package") as stage:
        repository = package(bundle, out, request, force=force, progress=stage)
    terminal = console()
    for model in repository.manifest.models:
        for version in model["versions"]:
            gpus = ", ".join(version["compute_capabilities"])
            terminal.print(
                f"{model['name']} version {version['number']}: {', '.join(version['engines'])}, {version['dtype']}"
                + (f", {gpus}" if gpus else "")
                + f", {', '.join(version['status'])}",
                soft_wrap=True,
                markup=False,
            )
    for reason in repository.manifest.left_out:
        terminal.print(f"left out: {reason}", soft_wrap=True, markup=False)
    terminal.print(f"start: {shlex.join(['tritonserver', *repository.start])}", soft_wrap=True, markup=False)
    terminal.print(f"how to start and call it: {repository.path / 'README.md'}", soft_wrap=True, markup=False)
    return 0
