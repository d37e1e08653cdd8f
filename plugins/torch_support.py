"""What every operator's torch ops derive from its definition: schema, registration, translation to one ONNX node.

Each operator has two ops: ``longspan::name`` returns Y, ``longspan::name_lse`` returns (Y, lse). Besides inputs and
attributes they take `pattern`, a text about where the pattern came from, which the node carries as metadata.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from .definition import DOMAIN, Attribute, Operator

if TYPE_CHECKING:
    import torch

PATTERN = "longspan.pattern"
"""Key of the node's metadata that holds `pattern`."""

_TORCH_TYPES = {"int": "int", "ints": "int[]", "float": "float"}


def torch_schema(operator: Operator, outputs: int) -> str:
    """Torch schema of `operator`: its inputs positional, its attributes keyword-only, all names in lower case.

    Args:
        operator: The definition.
        outputs: How many of the operator's outputs the op returns.
    """
    tensors = [f"Tensor? {t.name.lower()}=None" if t.optional else f"Tensor {t.name.lower()}" for t in operator.inputs]
    attributes = [_torch_attribute(attribute) for attribute in operator.attributes]
    returns = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    return f"({', '.join([*tensors, '*', *attributes])}, str pattern='') -> {returns}"


def _torch_attribute(attribute: Attribute) -> str:
    kind, default = _TORCH_TYPES[attribute.kind], attribute.default
    if default is None:
        return f"{kind}? {attribute.name}=None"
    return f"{kind} {attribute.name}={list(default) if isinstance(default, tuple) else default}"


def register_ops(
    operator: Operator,
    name: str,
    run: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    fake: Callable[..., tuple[torch.Tensor, torch.Tensor]],
) -> tuple[Any, Any]:
    """Register the two torch ops of an operator.

    Args:
        operator: The definition.
        name: Name of the op that returns Y.
        run: Computes (Y, lse) from the inputs by formal name in lower case and the attributes.
        fake: The same without values.

    Returns:
        The op that returns Y and the one that returns (Y, lse).
    """
    return _register_op(operator, name, 1, run, fake), _register_op(operator, f"{name}_lse", 2, run, fake)


def _register_op(operator: Operator, name: str, outputs: int, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    import torch

    names = [tensor.name.lower() for tensor in operator.inputs]

    def calling(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: torch.Tensor | None, pattern: str = "", **keywords: Any) -> Any:
            tensors = dict(zip(names, inputs, strict=False))
            tensors |= {name: keywords.pop(name) for name in names if name in keywords}
            both = function(tensors, keywords)
            return both[0] if outputs == 1 else tuple(both)

        return call

    op = torch.library.custom_op(
        f"{DOMAIN}::{name}", calling(run), mutates_args=(), schema=torch_schema(operator, outputs)
    )
    op.register_fake(calling(fake))
    return op


def translations(operator: Operator, ops: tuple[Any, Any]) -> dict[Any, Callable[..., Any]]:
    """Entries for ``torch.onnx.export(custom_translation_table=...)``: each of an operator's ops becomes one node.

    ``scale`` is always written on the node where the head size is known.
    """
    return {op._opoverload: node_translation(operator, outputs) for outputs, op in enumerate(ops, 1)}


def node_translation(operator: Operator, outputs: int) -> Callable[..., Any]:
    """Translation function of one op: one node of `operator`.

    Absent optional inputs become empty names, and are cut off at the end; attributes at their default are left out.

    Args:
        operator: The definition.
        outputs: How many of the operator's outputs the torch op returns.
    """
    defaults = {attribute.name: attribute.default for attribute in operator.attributes}

    def translate(*inputs: Any, pattern: str = "", **keywords: Any) -> Any:
        from onnxscript import evaluator

        values = [*inputs, *[None] * (len(operator.inputs) - len(inputs))]
        for name in [name for name in keywords if name not in defaults]:
            values[[tensor.name.lower() for tensor in operator.inputs].index(name)] = keywords.pop(name)
        while values[-1] is None:
            values.pop()
        keywords |= _known_scale(values[0], keywords)
        node = ir.Node(
            operator.domain,
            operator.name,
            values,
            ir.convenience.convert_attributes(
                {name: _plain(value) for name, value in keywords.items() if _plain(value) != _plain(defaults[name])}
            ),
            num_outputs=outputs,
            version=operator.version,
            metadata_props={PATTERN: pattern} if pattern else None,
        )
        # The exporter's evaluator records nodes and moves them into the graph afterwards; torch.onnx.ops.symbolic adds
        # its nodes in the same way.
        recorder: Any = evaluator.default()
        recorder.nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    translate.__name__ = f"{operator.domain}_{operator.name}_{outputs}"
    return translate


def _known_scale(q: ir.Value, attributes: dict[str, Any]) -> dict[str, Any]:
    if attributes.get("scale") is not None or q.shape is None or not isinstance(q.shape[-1], int):
        return {}
    heads = 1 if len(q.shape) == 4 else attributes["q_num_heads"]
    return {"scale": 1.0 / math.sqrt(q.shape[-1] // heads)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) else value
