"""The models that are timed against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...plugins.errors import LibraryMissing, PluginError
from ...plugins.library import ort_library_path
from ..bundle import Bundle
from ..devices import CPU, kernels_missing
from ..errors import ExporterError, ExportFailed
from ..sites.record import longspan_nodes
from ..sources.reload import Consent, refuse_differing, request_again

TITLES = {
    "kernel": "longspan kernel",
    "body": "function body",
    "dense": "dense SDPA",
    "stock": "stock export",
    "engine": "engine",
}
"""What tables and plots call each variant."""

DENSE_OPERATOR = "MultiHeadAttention"
"""What `dense_function_body` computes a site with."""


@dataclass(frozen=True)
class Variant:
    """One way of running the model.

    Attributes:
        name: A key of `TITLES`.
        model: ONNX file; None where the variant cannot be had.
        library: Operator library to register; None for none.
        kernel_nodes: Calls of longspan kernels that a run must show, no more and no fewer.
        operators: Calls of other operators that a run must show, at least.
        exponent: Power of the length that its attention costs; for predictions before a trial.
        unavailable: Why there is no model; empty where there is one.
        engine: Folder of the engine that `model` is the file of; None for what is no engine.
        module: Python module of its runtime, where that is not ONNX Runtime.
        provider: What must be the first execution provider of its session; empty for that of the settings.
    """

    name: str
    model: Path | None
    library: str | None = None
    kernel_nodes: int = 0
    operators: Mapping[str, int] = field(default_factory=dict)
    exponent: int = 1
    unavailable: str = ""
    engine: Path | None = None
    module: str = ""
    provider: str = ""

    @property
    def title(self) -> str:
        """What tables and plots call it."""
        return TITLES[self.name]


def kernel_variant(bundle: Bundle, device: str = CPU) -> Variant:
    """The bundle with the longspan library registered, for sessions on a device."""
    try:
        library = ort_library_path()
    except LibraryMissing as error:
        return Variant("kernel", None, unavailable=str(error))
    missing = kernels_missing(device, bundle.manifest)
    if missing:
        return Variant("kernel", None, unavailable=missing)
    return Variant("kernel", bundle.model_path, library=library, kernel_nodes=len(bundle.manifest.sites))


def body_variant(bundle: Bundle) -> Variant:
    """The bundle as a runtime without the library runs it."""
    return Variant("body", bundle.model_path)


def dense_variant(bundle: Bundle, folder: Path) -> Variant:
    """The bundle's graph with every site computed as dense attention, written to `folder`.

    Weights, opset and everything around the sites are the bundle's, so the difference is the attention's alone.
    """
    import onnx_ir as ir

    from ...plugins.dense_baseline import dense_function_body
    from ..graph_io import save_model

    path = folder / "dense.onnx"
    try:
        model = ir.load(bundle.model_path)
        for node in longspan_nodes(model):
            model.functions[node.op_identifier()] = dense_function_body(node, model.opset_imports[""])
        save_model(model, path)
    except (PluginError, OSError) as error:
        return Variant("dense", None, unavailable=f"cannot be built: {error}")
    return Variant("dense", path, operators={DENSE_OPERATOR: len(bundle.manifest.sites)}, exponent=2)


def stock_variant(bundle: Bundle, folder: Path, consent: Consent) -> Variant:
    """The unchanged model as the stock exporter traces it, written to `folder`.

    Positions are extended where the bundle's are, so that it accepts the same lengths.

    Args:
        bundle: Whose model to trace again.
        folder: Where to write.
        consent: Where the model is now, and what it may do.
    """
    from ..graph_io import name_dimensions, save_model
    from ..pipeline import prepare
    from ..tracing import trace_stock

    path = folder / "stock.onnx"
    try:
        request = request_again(bundle, consent)
        source = prepare(request, bundle.manifest.conversion).source
        # Once more: the files may have changed between being hashed and being read.
        refuse_differing(request.location, bundle.manifest.source.files, source.record.files)
        model = trace_stock(source)
        if any(True for _ in longspan_nodes(model)):
            raise ExportFailed("the model calls longspan operators itself, so it has no stock export")
        name_dimensions(model)
        save_model(model, path)
    except (ExporterError, PluginError, OSError) as error:
        return Variant("stock", None, unavailable=" ".join(str(error).split()))
    return Variant("stock", path, exponent=2)
