"""The whole way from MODEL to a bundle."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .bundle import MODEL_FILE, Bundle
from .conversion import UNCHANGED, Conversion
from .errors import InvalidRequest, NothingReplaced
from .families import Family, find_family
from .families.examples import Examples, carry
from .graph_io import name_dimensions, read_interface, save_model
from .kernel_packs import add_kernels, require_triton
from .lowering import lower
from .manifest import KernelsRecord, Manifest
from .sites.record import AttentionSite, StandardSite, find_sites
from .sources import Source, SourceRequest, load_source
from .versions import installed_versions
from .whole_folders import Reservation, reserved

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..plugins.gpu.pack_build import Target

Progress = Callable[[str], None]
"""Called with a stage's name when the stage begins."""

_VERSIONED = ("longspan", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A source with its conversion applied.

    Attributes:
        source: The model to trace.
        family: The adapter that recognises its attention; None where the model calls longspan operators itself.
        trained_length: Longest sequence before positions were extended; None where they were not.
    """

    source: Source
    family: Family | None
    trained_length: int | None

    def faithful(self, conversion: Conversion) -> bool:
        """Whether the sites compute what the model did before its attention was intercepted."""
        return self.family is None or self.family.faithful(self.source.model, conversion)  # type: ignore[arg-type]


def prepare(request: SourceRequest, conversion: Conversion) -> Prepared:
    """Load a model, extend its positions where asked for, and find its family.

    Raises:
        InvalidRequest: the request or the conversion does not fit the model.
        ExportFailed: the model cannot be loaded.
        EnvironmentLacks: a package is missing.
    """
    from torch import nn

    source = load_source(request)
    trained_length = None
    if conversion.max_positions is not None:
        from .long_positions import extend_model

        model, trained_length = extend_model(source.model, conversion.max_positions, conversion.alpha)  # type: ignore[arg-type]
        source = dataclasses.replace(source, model=model, max_length=conversion.max_positions)
    _refuse_beyond(conversion, source.max_length)
    family = None
    if isinstance(source.model, nn.Module):
        carry(source.model, Examples(source.example_inputs, source.dynamic_shapes))
        family = find_family(source.model, conversion)
        limit = family.max_length(source.model) if family is not None else None
        if limit is not None:
            source = dataclasses.replace(source, max_length=min(limit, source.max_length or limit))
    return Prepared(source, family, trained_length)


def _refuse_beyond(conversion: Conversion, limit: int | None) -> None:
    for option, tokens in (("--window", conversion.window), ("--global-tokens", conversion.global_tokens)):
        if limit is not None and tokens is not None and tokens > limit:
            raise InvalidRequest(
                f"{option} {tokens}: the model accepts {limit} tokens; allowed: up to {limit}, or more after "
                "--max-positions N, which extends trained positions"
            )


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A traced graph with its sites lowered, not yet written.

    Attributes:
        prepared: What was traced.
        graph: The ONNX graph with function bodies attached.
        sites: Its attention sites.
        standard: Attention that stays as the stock exporter makes it.
    """

    prepared: Prepared
    graph: ir.Model
    sites: tuple[AttentionSite, ...]
    standard: tuple[StandardSite, ...]


def rewrite(request: SourceRequest, conversion: Conversion, progress: Progress = lambda stage: None) -> Rewritten:
    """Load and trace a model, find its sites and lower them; everything that `export` does but writing.

    Raises:
        InvalidRequest: an argument is wrong.
        NothingReplaced: the model has no site, or none that the conversion applies to.
        ExportFailed: loading or tracing failed.
        EnvironmentLacks: a package is missing.
    """
    from ..plugins.functions import attach_function_bodies
    from .tracing import trace

    progress("load")
    prepared = prepare(request, conversion)
    source, family = prepared.source, prepared.family
    if conversion.window is not None and family is not None and family.name in ("declared-windows", "gpt-neo"):
        raise InvalidRequest(
            f"--window: {source.record.model_class} declares windows of its own, and --window would leave them as they "
            "are; next step: export it without --window"
        )
    if conversion.window is not None and (family is None or family.name != "windowed-encoder"):
        raise NothingReplaced(
            f"--window: {source.record.model_class} has no dense self-attention that a window can replace; allowed: "
            "bidirectional encoders on the transformers attention interface (BERT, RoBERTa, ELECTRA, …)"
        )
    progress("trace")
    graph = trace(source, family, conversion)
    progress("rewrite")
    name_dimensions(graph)
    recognised_by = f"family {family.name}" if family is not None else "longspan operator in the model"
    sites = tuple(lower(site) for site in find_sites(graph, recognised_by))
    standard = family.standard(source.model, conversion) if family is not None else ()  # type: ignore[arg-type]
    attach_function_bodies(graph)
    return Rewritten(prepared, graph, sites, standard)


def export(
    model: str | SourceRequest,
    out: str | os.PathLike[str],
    *,
    conversion: Conversion = UNCHANGED,
    force: bool = False,
    gpu: Sequence[Target] = (),
    progress: Progress = lambda stage: None,
) -> Bundle:
    """Trace a model, replace its attention, and write a bundle.

    Args:
        model: MODEL as the command line takes it, or a request with options.
        out: Folder to write; it must be new, empty, or with `force` a bundle.
        conversion: What to change in the model's mathematics.
        force: Replace a bundle that stands at `out`.
        gpu: What to compile GPU kernels for, from `longspan.exporter.kernel_packs.targets_of`.
        progress: Told each stage.

    Raises:
        InvalidRequest: an argument is wrong; nothing was done.
        ExportFailed: tracing or rewriting failed; `out` is as it was.
        EnvironmentLacks: a package is missing.
    """
    request = SourceRequest(model) if isinstance(model, str) else model
    if gpu:
        require_triton()
    with reserved(Path(out), force) as reservation:
        rewritten = rewrite(request, conversion, progress)
        kernels = add_kernels(rewritten.graph, gpu, progress) if gpu else None
        progress("save")
        return _write(reservation, rewritten, conversion, kernels)


def _write(
    reservation: Reservation, rewritten: Rewritten, conversion: Conversion, kernels: KernelsRecord | None
) -> Bundle:
    prepared, source, family = rewritten.prepared, rewritten.prepared.source, rewritten.prepared.family
    manifest = Manifest(
        source=source.record,
        conversion=conversion,
        family=family.name if family is not None else "",
        faithful=prepared.faithful(conversion),
        approximation=approximation(prepared, conversion),
        max_length=source.max_length,
        trained_length=prepared.trained_length,
        inputs=(),
        outputs=(),
        sites=rewritten.sites,
        standard_sites=rewritten.standard,
        gpu=kernels,
        opset=rewritten.graph.graph.opset_imports[""],
        versions=package_versions(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )

    def write_model(folder: Path) -> Manifest:
        file = folder / MODEL_FILE
        save_model(rewritten.graph, file)
        inputs, outputs = read_interface(file, source.input_records)
        return dataclasses.replace(manifest, inputs=inputs, outputs=outputs)

    return Bundle(reservation.out, reservation.write(write_model))


def approximation(prepared: Prepared, conversion: Conversion) -> str:
    """Where the approximation error of an export comes from; empty where there is none."""
    causes = []
    if prepared.family is not None and not prepared.faithful(conversion):
        causes.append(prepared.family.reason)
    if prepared.trained_length is not None:
        causes.append(f"positions extended beyond {prepared.trained_length}")
    return "; ".join(causes)


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that take part in an export or a check, by name."""
    return installed_versions(_VERSIONED)
