"""What every operator's torch op derives from its definition: the schema and the translation to one ONNX node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from .definition import Attribute, Operator

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
    return f"({', '.join([*tensors, '*', *attributes])}) -> {returns}"


def _torch_attribute(attribute: Attribute) -> str:
    kind, default = _TORCH_TYPES[attribute.kind], attribute.default
    if default is None:
        return f"{kind}? {attribute.name}=None"
    return f"{kind} {attribute.name}={list(default) if isinstance(default, tuple) else default}"


def node_translation(
    operator: Operator, outputs: int, derive: Callable[[ir.Value, dict[str, Any]], dict[str, Any]] | None = None
) -> Callable[..., Any]:
    """Translation function for ``torch.onnx.export(custom_translation_table=...)``: one node of `operator`.

    Absent optional inputs become empty names, and are cut off at the end; attributes at their default are left out.

    Args:
        operator: The definition.
        outputs: How many of the operator's outputs the torch op returns.
        derive: Called with the first input and the attributes given; returns attributes to write on the node besides.
    """
    defaults = {attribute.name: attribute.default for attribute in operator.attributes}

    def translate(*inputs: Any, **keywords: Any) -> Any:
        from onnxscript import evaluator

        values = [*inputs, *[None] * (len(operator.inputs) - len(inputs))]
        for name in [name for name in keywords if name not in defaults]:
            values[[tensor.name.lower() for tensor in operator.inputs].index(name)] = keywords.pop(name)
        while values[-1] is None:
            values.pop()
        if derive is not None:
            keywords |= derive(values[0], keywords)
        node = ir.Node(
            operator.domain,
            operator.name,
            values,
            ir.convenience.convert_attributes(
                {name: _plain(value) for name, value in keywords.items() if _plain(value) != _plain(defaults[name])}
            ),
            num_outputs=outputs,
            version=operator.version,
        )
        # The exporter's evaluator records nodes and moves them into the graph afterwards; torch.onnx.ops.symbolic adds
        # its nodes in the same way.
        recorder: Any = evaluator.default()
        recorder.nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    translate.__name__ = f"{operator.domain}_{operator.name}_{outputs}"
    return translate


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) else value
