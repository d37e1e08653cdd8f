"""Write function bodies of standard ONNX operators as Python expressions.

An `Expr` is a value of the graph being built; arithmetic on it adds nodes::

    body = FunctionBuilder(inputs=["X"], opset=18)
    rows = body.dim(body.input("X"), 0)
    body.reshape(body.input("X"), [rows // 4, 4, -1])

Python numbers become constants: int64 for an int, float32 for a float. What was written before, in this graph or one
around it, is not computed again. Every value gets a name that is unique in the function, nested graphs included, since
those see the values of the graphs around them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class Expr:
    """A value of the graph that `builder` builds."""

    builder: FunctionBuilder
    value: ir.Value

    def __add__(self, other: Operand) -> Expr:
        return self.builder.op("Add", self, other)

    def __radd__(self, other: Operand) -> Expr:
        return self.builder.op("Add", other, self)

    def __sub__(self, other: Operand) -> Expr:
        return self.builder.op("Sub", self, other)

    def __rsub__(self, other: Operand) -> Expr:
        return self.builder.op("Sub", other, self)

    def __mul__(self, other: Operand) -> Expr:
        return self.builder.op("Mul", self, other)

    def __rmul__(self, other: Operand) -> Expr:
        return self.builder.op("Mul", other, self)

    def __truediv__(self, other: Operand) -> Expr:
        return self.builder.op("Div", self, other)

    def __rtruediv__(self, other: Operand) -> Expr:
        return self.builder.op("Div", other, self)

    def __floordiv__(self, other: Operand) -> Expr:
        """Integer quotient. ONNX rounds it to zero: use it on non-negative values only."""
        return self.builder.op("Div", self, other)

    def __mod__(self, other: Operand) -> Expr:
        """Integer remainder, with the sign of the divisor as in Python."""
        return self.builder.op("Mod", self, other)

    def __neg__(self) -> Expr:
        return self.builder.op("Neg", self)

    def __lt__(self, other: Operand) -> Expr:
        return self.builder.op("Less", self, other)

    def __le__(self, other: Operand) -> Expr:
        return self.builder.op("LessOrEqual", self, other)

    def __gt__(self, other: Operand) -> Expr:
        return self.builder.op("Greater", self, other)

    def __ge__(self, other: Operand) -> Expr:
        return self.builder.op("GreaterOrEqual", self, other)

    def __and__(self, other: Expr) -> Expr:
        return self.builder.op("And", self, other)

    def __or__(self, other: Expr) -> Expr:
        return self.builder.op("Or", self, other)

    def __invert__(self) -> Expr:
        return self.builder.op("Not", self)


Operand = Expr | int | float
"""What an operator of `Expr` takes; Python numbers become scalar constants."""


class FunctionBuilder:
    """Collects the nodes of one model-local function.

    Args:
        inputs: Names of the function's inputs, in order; a body need not use them all.
        opset: Version of the standard domain that the body is written in.
    """

    def __init__(self, inputs: Sequence[str], opset: int) -> None:
        self._imports = {"": opset}
        self._inputs = {name: ir.Value(name=name) for name in inputs}
        self._attributes: dict[str, ir.Attr] = {}
        self._constants: dict[Any, Expr] = {}
        # Constants stand before all other nodes, so that nested graphs can share them.
        self._constant_nodes: list[ir.Node] = []
        self._scopes: list[list[ir.Node]] = [[]]
        self._known: list[dict[Any, list[Expr]]] = [{}]  # results of the nodes of each scope
        self._count = 0

    def input(self, name: str) -> Expr:
        """The function input called `name`."""
        return Expr(self, self._inputs[name])

    def declare(self, name: str, kind: str, default: int | float | tuple[int, ...] | None) -> None:
        """Declare an attribute of the function, required when `default` is None.

        Args:
            name: Attribute name.
            kind: ``"int"``, ``"ints"`` or ``"float"``.
            default: Value for nodes that do not carry the attribute.
        """
        self._attributes[name] = ir.Attr(name, _ATTRIBUTE_TYPES[kind], default)

    def attribute(self, name: str) -> Expr:
        """The value that the calling node gives to a declared attribute: a scalar, or 1-D for ints."""
        if ("attribute", name) not in self._constants:
            kind = self._attributes[name].type
            field = {ir.AttributeType.INT: "value_int", ir.AttributeType.INTS: "value_ints"}.get(kind, "value_float")
            reference = ir.RefAttr(field, name, kind)
            self._constants["attribute", name] = self._constant(reference, name)
        return self._constants["attribute", name]

    def constant(self, value: bool | int | float | Sequence[int]) -> Expr:
        """A constant: bool, int64 for int, float32 for float; scalar, or 1-D for a sequence."""
        key = (type(value), tuple(value) if isinstance(value, Sequence) else value)
        if key not in self._constants:
            dtype = np.bool_ if isinstance(value, bool) else np.float32 if isinstance(value, float) else np.int64
            self._constants[key] = self._constant(ir.AttrTensor("value", ir.tensor(np.array(value, dtype))), "const")
        return self._constants[key]

    def _constant(self, attribute: ir.Attr, hint: str) -> Expr:
        node = ir.Node("", "Constant", [], [attribute], outputs=[ir.Value(name=self._name(hint))])
        self._constant_nodes.append(node)
        return Expr(self, node.outputs[0])

    def _name(self, hint: str) -> str:
        self._count += 1
        return f"{hint.lower()}_{self._count}"

    def op(self, op_type: str, *inputs: Operand | Sequence[int] | None, domain: str = "", **attributes: Any) -> Expr:
        """Add a node with one output; an attribute may be a `reference`."""
        return self.multi_op(op_type, 1, *inputs, domain=domain, **attributes)[0]

    def multi_op(
        self,
        op_type: str,
        outputs: int,
        *inputs: Operand | Sequence[int] | None,
        domain: str = "",
        **attributes: Any,
    ) -> list[Expr]:
        """Add a node with `outputs` outputs; an attribute may be a `reference`."""
        values = [None if x is None else self._operand(x).value for x in inputs]
        key = domain, op_type, outputs, *values, repr(sorted(attributes.items()))
        for known in self._known:
            if key in known:
                return known[key]
        results = [ir.Value(name=self._name(op_type)) for _ in range(outputs)]
        references = [
            ir.RefAttr(name, attribute.name, attribute.type)
            for name, attribute in attributes.items()
            if isinstance(attribute, ir.Attr)
        ]
        plain = {name: setting for name, setting in attributes.items() if not isinstance(setting, ir.Attr)}
        converted = [*ir.convenience.convert_attributes(plain), *references]
        self._scopes[-1].append(ir.Node(domain, op_type, values, converted, outputs=results))
        self._imports.setdefault(domain, 1)
        self._known[-1][key] = [Expr(self, result) for result in results]
        return self._known[-1][key]

    def reference(self, name: str) -> ir.Attr:
        """A declared attribute, for a node inside to take its own attribute from."""
        return self._attributes[name]

    def _operand(self, x: Operand | Sequence[int]) -> Expr:
        return x if isinstance(x, Expr) else self.constant(x)

    def minimum(self, *values: Operand) -> Expr:
        """Elementwise minimum."""
        return self.op("Min", *values)

    def maximum(self, *values: Operand) -> Expr:
        """Elementwise maximum."""
        return self.op("Max", *values)

    def where(self, condition: Expr, yes: Operand, no: Operand) -> Expr:
        """Elementwise choice."""
        return self.op("Where", condition, yes, no)

    def equal(self, a: Operand, b: Operand) -> Expr:
        """Elementwise equality."""
        return self.op("Equal", a, b)

    def cast(self, x: Expr, to: ir.DataType) -> Expr:
        """Convert the element type."""
        return self.op("Cast", x, to=int(to))

    def arange(self, count: Operand) -> Expr:
        """The integers 0, 1, ... below `count`."""
        return self.op("Range", 0, count, 1)

    def dim(self, x: Expr, axis: int) -> Expr:
        """Size of one axis, a scalar."""
        return self.op("Reshape", self.op("Shape", x, start=axis, end=axis + 1), self.constant([]))

    def vector(self, sizes: Sequence[Operand]) -> Expr:
        """1-D tensor of scalars."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant([int(size) for size in sizes])  # type: ignore[arg-type]
        parts = [self.op("Reshape", s, [1]) if isinstance(s, Expr) else self.constant([int(s)]) for s in sizes]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def reshape(self, x: Expr, sizes: Sequence[Operand]) -> Expr:
        """Reshape; 0 keeps the size of that axis, -1 is derived."""
        return self.op("Reshape", x, self.vector(sizes))

    def expand(self, x: Operand, sizes: Sequence[Operand]) -> Expr:
        """Broadcast to `sizes`; 1 keeps the size of that axis."""
        return self.op("Expand", x, self.vector(sizes))

    def slice(self, x: Expr, begin: Operand, end: Operand, axis: int) -> Expr:
        """Part of one axis."""
        return self.op("Slice", x, self.vector([begin]), self.vector([end]), [axis])

    def concat(self, parts: Sequence[Expr], axis: int) -> Expr:
        """Concatenate along `axis`."""
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=axis)

    def reduce(self, kind: str, x: Expr, axis: int, keepdims: bool = True) -> Expr:
        """Reduce one axis; `kind` is ``"Max"`` or ``"Sum"``."""
        return self.op(f"Reduce{kind}", x, [axis], keepdims=int(keepdims))

    def reduce_all(self, kind: str, x: Expr) -> Expr:
        """Reduce every axis, to a scalar; `kind` is ``"Max"`` or ``"Min"``."""
        return self.op(f"Reduce{kind}", x, keepdims=0)

    def loop(self, trips: Expr, step: Callable[[Expr], Sequence[Expr]]) -> list[Expr]:
        """Run `step` for 0, 1, … below `trips`, and stack each of its results along a new first axis.

        Args:
            trips: Number of iterations, a scalar.
            step: Adds the nodes of one iteration, given its number; sees all values of the graphs around.
        """
        return self._loop(trips, [], lambda number, going: [self.op("Identity", going), *step(number)])

    def loop_while(self, states: Sequence[Expr], step: Callable[..., Sequence[Expr]]) -> list[Expr]:
        """Run `step` on `states`, then on what it returned, for as long as it says; at least once.

        Args:
            states: What is handed on: int64 scalars, and sequences from `sequence`.
            step: Adds the nodes of one iteration, given the states; returns whether to go on, a scalar bool, and the
                new states. It sees all values of the graphs around.

        Returns:
            The last states.
        """
        return self._loop(None, states, lambda number, going, *formal: step(*formal))

    def sequence(self) -> Expr:
        """An empty sequence of float32 tensors."""
        empty = self.op("SequenceEmpty", dtype=int(ir.DataType.FLOAT))
        empty.value.type = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
        return empty

    def append(self, sequence: Expr, x: Expr) -> Expr:
        """A sequence that ends with one more tensor."""
        longer = self.op("SequenceInsert", sequence, x)
        longer.value.type = sequence.value.type
        return longer

    def _loop(self, trips: Expr | None, states: Sequence[Expr], step: Callable[..., Sequence[Expr]]) -> list[Expr]:
        """A Loop; `step` gets number, condition and states, and returns condition, states and what to stack."""
        formal = [self._scalar("trip", ir.DataType.INT64), self._scalar("going", ir.DataType.BOOL)]
        for state in states:
            formal.append(self._scalar("state", ir.DataType.INT64))
            if isinstance(state.value.type, ir.SequenceType):
                formal[-1].type, formal[-1].shape = state.value.type, None
        self._scopes.append([])
        self._known.append({})
        results = [result.value for result in step(*(Expr(self, value) for value in formal))]
        self._known.pop()
        graph = ir.Graph(formal, results, nodes=self._scopes.pop(), name=self._name("loop_body"))
        for result, value in zip(results, formal[1:], strict=False):
            result.type, result.shape = value.type, value.shape
        inputs = [None if trips is None else trips.value, self.constant(True).value, *(x.value for x in states)]
        outputs = [ir.Value(name=self._name("stack")) for _ in results[1:]]
        self._scopes[-1].append(ir.Node("", "Loop", inputs, [ir.AttrGraph("body", graph)], outputs=outputs))
        return [Expr(self, output) for output in outputs]

    def _scalar(self, hint: str, dtype: ir.DataType) -> ir.Value:
        return ir.Value(name=self._name(hint), type=ir.TensorType(dtype), shape=ir.Shape([]))

    def build(self, domain: str, name: str, overload: str, outputs: Mapping[str, Expr]) -> ir.Function:
        """The finished function.

        Args:
            domain: Domain of the function.
            name: Name of the function.
            overload: Its overload.
            outputs: The results, by the name that they get.
        """
        for output, result in outputs.items():
            result.value.name = output
        graph = ir.Graph(
            list(self._inputs.values()),
            [result.value for result in outputs.values()],
            nodes=[*self._constant_nodes, *self._scopes[0]],
            opset_imports=self._imports,
            name=f"{name}_{overload}",
        )
        return ir.Function(domain, name, overload, graph=graph, attributes=list(self._attributes.values()))


_ATTRIBUTE_TYPES = {"int": ir.AttributeType.INT, "ints": ir.AttributeType.INTS, "float": ir.AttributeType.FLOAT}
