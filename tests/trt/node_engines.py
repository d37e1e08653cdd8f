"""Engines of one node: how a case of an operator becomes an input of TensorRT, and comes back as arrays."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from longspan.exporter.engines.graphs.body_graph import body_graph
from longspan.exporter.engines.graphs.plugin_graph import plugin_graph
from longspan.exporter.engines.running.inference_process import InferenceProcess
from longspan.exporter.engines.runtimes import RUNTIMES
from longspan.exporter.engines.tensorrt.build_process import build_in_child
from longspan.plugins.functions import attach_function_bodies
from longspan.plugins.gpu.pack_build import Target

from ..plugins import function_sites
from ..plugins.kernel_agreement import Run

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

ELEMENTS = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


def arrays(operands: dict[str, torch.Tensor]) -> dict[str, Array]:
    """Tensors as numpy arrays, bfloat16 ones as ml_dtypes has it."""
    import torch

    return {
        name: tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        if tensor.dtype == torch.bfloat16
        else tensor.numpy()
        for name, tensor in operands.items()
    }


def case_model(run: Run) -> tuple[ir.Model, dict[str, Array]]:
    """The node of a case with its function body, and the arrays of its graph inputs.

    Shapes are those of the case, but of the mask of global tokens, which varies; block masks are constants, as a
    network has no uint8.
    """
    given = arrays(run.operands("cpu"))
    # TensorRT takes an input of fixed shape whose values decide on sizes for one of shapes; its profile needs values.
    fixed = given.keys() - {"global_mask"}
    model = function_sites.site(given, run.attributes, ELEMENTS[run.dtype], 20, op_type=run.operator, static=fixed)
    node = model.graph.node(0)
    node.name = "site"
    node.outputs[0].shape = ir.Shape(_result_shape(run, given))
    masks = given.pop("block_masks", None)
    if masks is not None:
        value = next(value for value in model.graph.inputs if value.name == "block_masks")
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(masks, name="block_masks")
        model.graph.register_initializer(value)
    if "global_mask" in given:
        _widen(model, "global_mask")
        given["global_mask"] = given["global_mask"].astype(np.int64)
    attach_function_bodies(model)
    return model, given


def _widen(model: ir.Model, name: str) -> None:
    """Let an input of truth values be int64, as models have it: a body's sizes follow from it, which bool cannot be."""
    value = next(value for value in model.graph.inputs if value.name == name)
    value.dtype = ir.DataType.INT64
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(ir.DataType.BOOL))], name=f"{name}_cast")
    cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, ir.DataType.BOOL
    node = model.graph.node(0)
    for index, operand in enumerate(node.inputs):
        if operand is value:
            node.replace_input_with(index, cast.outputs[0])
    model.graph.insert_before(node, [cast])


def _result_shape(run: Run, given: dict[str, Array]) -> tuple[int, ...]:
    """Y is as Q, but for the channels of a head, which are V's."""
    q, v = given["Q"].shape, given["V"].shape
    if len(q) == 4:
        return (*q[:3], v[3])
    heads, key_heads = run.attributes["q_num_heads"], run.attributes["kv_num_heads"]
    return (*q[:2], v[2] // key_heads * heads)


def build(
    run: Run, api: str, target: str, architecture: str, folder: Path
) -> tuple[Path, str | None, dict[str, Array]]:
    """Build the engine of a case.

    Args:
        run: The case.
        api: ``"v3"``, ``"aot"`` or ``"none"``.
        target: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        architecture: ``"sm90"``, …
        folder: Where to write.

    Returns:
        The engine, the plugin library that it needs, and its inputs.
    """
    model, feed = case_model(run)
    if api == "none":
        prepared = body_graph(model)
    else:
        kernels = (Target(int(architecture.removeprefix("sm"))),)
        prepared = plugin_graph(model, kernels, aot=api == "aot").model
    ir.save(prepared, folder / "model.onnx")
    request = {
        "target": target,
        "model": str(folder / "model.onnx"),
        "engine": str(folder / "model.engine"),
        "profiles": [{name: dict.fromkeys(("min", "opt", "max"), value.shape) for name, value in feed.items()}],
        "capabilities": [architecture.removeprefix("sm")],
        "plugin": api,
        "library": None,
        "timing_cache": None,
        "hardware_compatibility": "none",
        "version_compatible": False,
        "weight_streaming": False,
        "strip": False,
        "refit": False,
        "pool_limits": {},
        "optimization_level": None,
    }
    built = build_in_child(target, request, lambda stage: None, lambda text: None)
    return folder / "model.engine", built["library"], feed


def execute(engine: Path, library: str | None, feed: dict[str, Array], target: str) -> tuple[Array, Array]:
    """(Y, lse) of an engine, in float64."""
    process = _process(target)
    process.open(engine, None if library is None else Path(library))
    outputs, _ = process.infer(feed)
    return outputs["Y"].astype(np.float64), outputs["lse"].astype(np.float64)


@functools.cache
def _process(target: str) -> InferenceProcess:
    """One process for all cases: starting TensorRT takes longer than a case."""
    return InferenceProcess(RUNTIMES[target].module)
