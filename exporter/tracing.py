"""From a loaded model to an ONNX graph whose attention sites are longspan nodes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .conversion import Conversion
from .errors import ExportFailed, NothingReplaced
from .families import Family
from .sites.record import longspan_nodes
from .sources import Source
from .sources.base import BATCH, SEQUENCE

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 20
"""Opset of the traced graph; newer ones turn attention into ops with batch-1 caches or length x length masks."""


def trace(source: Source, family: Family | None, conversion: Conversion) -> ir.Model:
    """Trace a model with its attention intercepted.

    Args:
        source: The loaded model.
        family: The adapter to intercept with; None where the model calls longspan operators itself.
        conversion: What the user asked to change.

    Returns:
        The ONNX graph, optimized, with one longspan node per site and no function bodies yet.

    Raises:
        NothingReplaced: no site became a longspan node.
        ExportFailed: torch.export or torch.onnx failed, or a site was not replaced.
    """
    if family is None and source.record.kind in ("huggingface", "config") and not source.record.remote_code:
        # The code of transformers calls no longspan operator: its trace, which may take minutes, would find none.
        raise _nothing_replaced(source)
    with contextlib.ExitStack() as stack:
        if family is not None:
            stack.enter_context(family.intercept(source.model, conversion))  # type: ignore[arg-type]
        stack.enter_context(_quiet())
        try:
            model = _export(source)
        except Exception as error:
            raise ExportFailed(_explain(source, error)) from error
    replaced = sum(1 for _ in longspan_nodes(model))
    expected = len(family.sites(source.model, conversion)) if family is not None else None  # type: ignore[arg-type]
    if not replaced:
        raise _nothing_replaced(source)
    if expected is not None and replaced != expected:
        raise ExportFailed(
            f"{source.record.location}: {replaced} of {expected} attention sites were replaced; the model does not "
            "call them all, or calls some twice"
        )
    return model


def _nothing_replaced(source: Source) -> NothingReplaced:
    return NothingReplaced(
        f"{source.record.location}: no attention site was replaced in {source.record.model_class}; next step: for a "
        "dense encoder add --window N; docs/families.md says what else is recognised"
    )


def trace_stock(source: Source) -> ir.Model:
    """Trace the unchanged model as a user without Longspan would; the baseline of benchmarks.

    Raises:
        ExportFailed: the stock exporter cannot export the model; the text says why.
    """
    with _quiet():
        try:
            return _export(source)
        except Exception as error:
            raise ExportFailed(_explain(source, error)) from error


def _export(source: Source) -> ir.Model:
    import torch

    from ..plugins.torch_ops import onnx_translation_table

    table = onnx_translation_table()
    if source.record.kind in ("huggingface", "config"):
        from transformers.exporters import exporter_onnx
        from transformers.exporters.configs import OnnxConfig

        config = OnnxConfig(dynamic=True, dynamic_shapes=_dynamic_shapes(source), opset_version=OPSET)
        with _extended(exporter_onnx._ONNX_TRANSLATION_TABLE, table), _own_forward(source.model):
            exported: Any = exporter_onnx.OnnxExporter().export(
                source.model,  # type: ignore[arg-type]  # typed for pretrained models, works on any module
                dict(source.example_inputs),
                config=config,
            )
        graph: ir.Model = exported.program
        return graph
    with torch.no_grad():
        if source.record.kind == "program":
            program = torch.onnx.export(
                source.model, dynamo=True, opset_version=OPSET, custom_translation_table=table, verbose=False
            )
        else:
            program = torch.onnx.export(
                source.model,
                (),
                kwargs=dict(source.example_inputs),
                dynamic_shapes=_dynamic_shapes(source),
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=table,
                verbose=False,
            )
    assert program is not None
    return program.model


def _dynamic_shapes(source: Source) -> Any:
    """The user's specification, else batch and sequence, named, so that torch.export refuses to fix one silently."""
    import torch

    if source.dynamic_shapes is not None:
        return source.dynamic_shapes
    dims = (torch.export.Dim(BATCH), torch.export.Dim(SEQUENCE, max=source.max_length))
    return {name: dict(enumerate(dims[: value.dim()])) for name, value in source.example_inputs.items()}


@contextlib.contextmanager
def _own_forward(model: Any) -> Iterator[None]:
    """Take back the forward that transformers' exporter leaves in a model: the one it found, even an interception's."""
    before = vars(model).get("forward")
    try:
        yield
    finally:
        vars(model).pop("forward", None)
        if before is not None:
            model.forward = before


@contextlib.contextmanager
def _extended(table: dict[Any, Any], entries: dict[Any, Any]) -> Iterator[None]:
    """Lend entries to the table of transformers' exporter, which takes none from its caller."""
    before = dict(table)
    table.update(entries)
    try:
        yield
    finally:
        table.clear()
        table.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporters print and warn about; an exception carries what matters."""
    names = ("torch", "torch.export", "torch.onnx", "onnxscript", "transformers")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # torch.export prints the whole graph to stderr before it raises.
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explain(source: Source, error: Exception) -> str:
    """The stage and the first telling line of a failed trace."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip(" -") for line in str(cause).splitlines() if line.strip()]
    return f"{source.record.location}: tracing failed: {type(cause).__name__}: {' '.join(lines[:2])}"
