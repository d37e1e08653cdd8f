"""ONNX Runtime's own graph optimisation, done once and written to a file that still runs everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....plugins import LibraryMissing, ort_library_path
from ....plugins.definition import DOMAIN
from ...errors import ExportFailed
from ...graph_io import EXTERNAL_DATA_BYTES, save_model
from ...sites.record import longspan_nodes
from ..request import BuildRequest
from .session import CPU_PROVIDER, LEVELS

if TYPE_CHECKING:
    import onnx_ir as ir

_SIXTEEN_BITS = ("FLOAT16", "BFLOAT16")


def offline_level(model: ir.Model, request: BuildRequest) -> tuple[str, str]:
    """How far a graph is optimised before it is written, and why.

    ONNX Runtime's levels build on each other: *basic* rewrites keep to standard operators and are made before nodes are
    given to providers; *extended* ones fuse nodes of one provider into operators that this provider has kernels for;
    *layout* ones depend on the processor that the session is on.

    Args:
        model: The graph that will be written.
        request: What is built.

    Returns:
        A key of `LEVELS`, and the reason.
    """
    if request.provider == "tensorrt":
        return "disabled", "TensorRT optimises the graph itself, and parses standard operators only"
    try:
        ort_library_path()
    except LibraryMissing as error:
        return "disabled", (
            f"{error}; without the library ONNX Runtime would expand the attention sites for good, and the file could "
            "not use the kernels"
        )
    if request.provider == "cpu":
        return "extended", (
            "fusions for the CPU provider, the same on every processor; layouts depend on the processor, so they are "
            "left to the session"
        )
    sixteen = {value.dtype.name for value in _values(model) if value.dtype is not None} & set(_SIXTEEN_BITS)
    if sixteen:
        return "disabled", (
            "the graph would be written by a session on the CPU, which puts casts around 16-bit nodes; the session on "
            "the GPU optimises it when it is loaded"
        )
    return "basic", (
        "rewrites within standard ONNX, the same for all providers; fusions are made for the provider that has the "
        "node, so they are left to the session on the GPU"
    )


def _values(model: ir.Model) -> list[ir.Value]:
    outputs = [value for node in model.graph.all_nodes() for value in node.outputs]
    return [*model.graph.inputs, *model.graph.initializers.values(), *outputs]


def optimised(model: ir.Model, level: str, work: Path, progress: Callable[[str], None]) -> ir.Model:
    """Let ONNX Runtime optimise a graph, and give it back its function bodies.

    With the operator library registered the attention nodes have kernels, so ONNX Runtime leaves them as they are. It
    writes no functions, though, without which a runtime that lacks the library could not read the file.

    Args:
        model: The graph; it is not changed.
        level: A key of `LEVELS` other than ``"disabled"``.
        work: A folder for what lies between; its files hold weights of the result until that is written.
        progress: Told each stage.

    Raises:
        ExportFailed: ONNX Runtime cannot load the graph, or changed an attention site or the graph's inputs or outputs.
    """
    import onnx_ir as ir
    import onnxruntime

    source, target = work / "source.onnx", work / "optimised.onnx"
    save_model(model, source)
    progress(f"optimise the graph ({level})")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[level])
    options.optimized_model_filepath = str(target)
    if sum(file.stat().st_size for file in work.iterdir()) > EXTERNAL_DATA_BYTES:
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.register_custom_ops_library(ort_library_path())
    try:
        onnxruntime.InferenceSession(str(source), options, providers=[CPU_PROVIDER])
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        raise ExportFailed(f"ONNX Runtime cannot optimise the model: {_first_line(error)}") from error
    result = ir.load(target)
    for identifier, function in model.functions.items():
        if function.domain == DOMAIN:
            result.functions[identifier] = function.clone()
    used = {node.domain for node in result.graph.all_nodes()}
    for domain in [domain for domain in result.opset_imports if domain and domain not in used]:
        del result.opset_imports[domain]
    _refuse_changes(model, result)
    return result


def _refuse_changes(before: ir.Model, after: ir.Model) -> None:
    """Compare what must survive.

    Raises:
        ExportFailed: it did not.
    """
    old, new = ({node.name: _site(node) for node in longspan_nodes(model)} for model in (before, after))
    lost = sorted(str(name) for name in old.keys() ^ new.keys())
    changed = sorted(str(name) for name in old.keys() & new.keys() if old[name] != new[name])
    if lost or changed:
        raise ExportFailed(
            f"ONNX Runtime's optimisation changed attention sites: {', '.join(lost + changed)}; next step: report it "
            "with the versions that longspan doctor prints"
        )
    if _interface(before) != _interface(after):
        raise ExportFailed(
            f"ONNX Runtime's optimisation changed the graph's inputs or outputs: {_interface(before)} became "
            f"{_interface(after)}; next step: report it with the versions that longspan doctor prints"
        )


def _site(node: ir.Node) -> tuple[Any, ...]:
    # Attributes are compared as they are written: tensors hold kernel packs.
    import onnx_ir as ir

    attributes = {
        name: ir.to_proto(attribute).SerializeToString(deterministic=True)
        for name, attribute in node.attributes.items()
        if isinstance(attribute, ir.Attr)
    }
    present = [value is not None for value in node.inputs]
    while present and not present[-1]:
        present.pop()
    return node.op_type, node.overload, present, attributes


def _interface(model: ir.Model) -> list[tuple[str | None, str, str]]:
    return [(value.name, str(value.dtype), str(value.shape)) for value in [*model.graph.inputs, *model.graph.outputs]]


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
