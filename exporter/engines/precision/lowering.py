"""Write the types that were decided into a graph: casts, constants, attributes, and the types of all values."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ....plugins.definition import DOMAIN
from ...errors import ExportFailed
from .plan import Plan, Range, nested_graphs, rule_for
from .record import Clamped, Kept, Precision
from .rules import Group
from .values import FLOAT, GUARD, adds_to_scores, constant_of, graphs_of, is_constant, is_float, set_dtype


class Lowering:
    """The graph while its types are written."""

    def __init__(self, model: ir.Model, plan: Plan, dtype: ir.DataType) -> None:
        self.model, self.plan, self.dtype = model, plan, dtype
        self.range = Range.of(dtype)
        self.native: dict[ir.Value, ir.DataType] = {}  # the type in which a float is computed
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.kept: list[Kept] = []
        self.narrow: collections.Counter[str] = collections.Counter()
        self.double: list[str] = []
        self.clamped: list[Clamped] = []
        self.coarse: dict[str, float] = {}
        self.names = {
            value.name
            for graph in graphs_of(model)
            for value in [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        }

    def run(self, inputs: Sequence[ir.DataType | None], outputs: Sequence[ir.DataType | None]) -> None:
        """Write the types of the whole graph.

        Args:
            inputs: Type that each graph input has in the end.
            outputs: Type that each graph output has in the end.
        """
        graph = self.model.graph
        for value, declared in zip(graph.inputs, inputs, strict=True):
            if is_float(value) and declared is not None:
                self.native[value] = declared
                set_dtype(value, declared)
        self._lower(graph)
        for index, declared in enumerate(outputs):
            self._declare(graph, index, declared)
        self._sweep()

    def result(self, dtype: str) -> Precision:
        """The finished graph."""
        casts = sum(
            node.op_type == "Cast" and is_float(node.inputs[0]) and is_float(node.outputs[0])
            for node in self.model.graph.all_nodes()
        )
        kept = () if self.dtype == FLOAT else tuple(self.kept)
        return Precision(
            self.model,
            dtype,
            dict(self.narrow),
            kept,
            tuple(self.double),
            casts,
            tuple(self.clamped),
            self.coarse,
        )

    def _lower(self, graph: ir.Graph) -> None:
        for node in list(graph):
            if node not in self.plan.slots:
                if any(value is not None and value.dtype == ir.DataType.DOUBLE for value in node.inputs):
                    self.double.append(node.name or node.op_type)
                continue
            if node.op_type in ("Loop", "Scan", "If") and node.domain != DOMAIN:
                self._control(node)
            elif node.op_type != "Constant":
                self._node(node)

    def _node(self, node: ir.Node) -> None:
        slots = self.plan.slots[node]
        own = self._type_of(node)
        for index, (value, slot) in enumerate(zip(node.inputs, slots.inputs, strict=False)):
            if value is not None and slot:
                wanted = own if slot == "node" else FLOAT
                node.replace_input_with(index, self.as_type(value, wanted, clamp=adds_to_scores(node, index)))
        for value, slot in zip(node.outputs, slots.outputs, strict=False):
            if slot and is_float(value):
                self.native[value] = own if slot == "node" else FLOAT
                set_dtype(value, self.native[value])

    def _type_of(self, node: ir.Node) -> ir.DataType:
        """The type that a node computes in."""
        follows = rule_for(node).group is Group.COMPARISON
        if follows or (node.op_type == "Cast" and not is_float(node.outputs[0])):
            natives = {self.native[v] for v in node.inputs if is_float(v) and v in self.native}
            if len(natives) == 1 and natives <= self.plan.slots[node].allowed:
                return natives.pop()
        reason = self.plan.wide.get(node)
        if reason is None:
            self.narrow[node.op_type] += 1
            return self.dtype
        self.kept.append(Kept(node.name or "", node.op_type, reason))
        return FLOAT

    def as_type(self, value: ir.Value, dtype: ir.DataType, clamp: bool = False) -> ir.Value:
        """A value in a type: itself, a constant of its own, or the one cast that there is of it.

        Args:
            value: A float.
            dtype: What it is needed in.
            clamp: Whether numbers of a constant beyond the range become the largest.
        """
        if is_constant(value):
            return self._constant(value, dtype, clamp)
        native = self.native.get(value, FLOAT)
        if native == dtype:
            return value
        if (value, dtype) not in self.casts:
            self.casts[value, dtype] = self._cast(value, native, dtype)
        return self.casts[value, dtype]

    def _cast(self, value: ir.Value, native: ir.DataType, dtype: ir.DataType) -> ir.Value:
        graph = value.graph
        assert graph is not None
        nodes = self._conversion(value, native, dtype, f"{value.name}_{dtype.name.lower()}")
        producer = value.producer()
        if producer is not None:
            graph.insert_after(producer, nodes)
        elif len(graph):
            graph.insert_before(graph.node(0), nodes)
        else:
            graph.extend(nodes)
        return nodes[-1].outputs[0]

    def _conversion(self, value: ir.Value, native: ir.DataType, dtype: ir.DataType, name: str) -> list[ir.Node]:
        """The nodes that cast a value; the last one's result is in that type."""
        traits = self.plan.traits.get(value)
        nodes, source = [], value
        if traits is not None and traits.huge and native == FLOAT and dtype == self.dtype:
            nodes = self._guard(value)
            source = nodes[-1].outputs[0]
            self.clamped.append(Clamped(value.name or "", None, self.range.largest))
        nodes.append(self._make("Cast", [source], value, dtype, name, to=int(dtype)))
        self.native[nodes[-1].outputs[0]] = dtype
        return nodes

    def _guard(self, value: ir.Value) -> list[ir.Node]:
        """Nodes that clamp what is finite: -3e38 would become infinite, and infinity minus infinity is not a number."""
        infinite = self._make("IsInf", [value], value, ir.DataType.BOOL, f"{value.name}_infinite")
        bounds = [self._initializer(f"{self.dtype.name.lower()}_{name}", np.float32(sign * self.range.largest))
                  for name, sign in (("lowest", -1), ("highest", 1))]  # fmt: skip
        clip = self._make("Clip", [value, *bounds], value, FLOAT, f"{value.name}_clipped")
        chosen = [infinite.outputs[0], value, clip.outputs[0]]
        nodes = [infinite, clip, self._make("Where", chosen, value, FLOAT, f"{value.name}_clamped")]
        for node in nodes:
            node.metadata_props[GUARD] = str(value.name)
        return nodes

    def _make(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        like: ir.Value,
        dtype: ir.DataType,
        name: str,
        **attributes: int,
    ) -> ir.Node:
        node = ir.Node("", operator, inputs, ir.convenience.convert_attributes(attributes))
        node.outputs[0].name = node.name = self._unused(name)
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), like.shape
        return node

    def _unused(self, name: str) -> str:
        count = 0
        wanted = name
        while wanted in self.names:
            count += 1
            wanted = f"{name}_{count}"
        self.names.add(wanted)
        return wanted

    def _initializer(self, name: str, array: npt.NDArray[Any] | np.float32) -> ir.Value:
        known = self.model.graph.initializers.get(name)
        there = None if known is None or known.const_value is None else known.const_value.numpy()
        if known is not None and there is not None and there.dtype == array.dtype and np.array_equal(there, array):
            return known
        tensor = ir.tensor(np.asarray(array), name=self._unused(name))
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(np.shape(array)), const_value=tensor
        )
        self.model.graph.register_initializer(value)
        return value

    def _constant(self, value: ir.Value, dtype: ir.DataType, clamp: bool) -> ir.Value:
        if dtype == FLOAT:
            return value
        if (value, dtype) not in self.casts:
            array = constant_of(value)
            assert array is not None
            narrow = self._narrowed(value, array, clamp)
            self.casts[value, dtype] = self._initializer(f"{value.name}_{dtype.name.lower()}", narrow)
        return self.casts[value, dtype]

    def _narrowed(self, value: ir.Value, array: npt.NDArray[Any], clamp: bool) -> npt.NDArray[Any]:
        beyond = self.range.beyond(array)
        if beyond.size and (clamp or array.size == 1):
            if beyond.max() > 0:
                raise ExportFailed(
                    f"precision: {value.name!r} holds {beyond.max():.4g}, which {self.dtype.name.lower()} does not; "
                    f"allowed: up to {self.range.largest:.5g}; next step: choose bf16 or fp32"
                )
            self.clamped.append(Clamped(value.name or "", float(beyond.min()), self.range.largest))
            array = np.where(np.isfinite(array), np.maximum(array, -self.range.largest), array)
        with np.errstate(over="ignore"):
            narrow = array.astype(self.dtype.numpy())
        largest = float(np.abs(array, where=np.isfinite(array), out=np.zeros_like(array)).max(initial=0.0))
        if 0 < largest < self.range.smallest:
            lost = array[np.isfinite(array)] - narrow[np.isfinite(array)].astype(np.float32)
            self.coarse[value.name or ""] = float(np.abs(lost).max()) / largest
        return narrow

    def _control(self, node: ir.Node) -> None:
        """Types of a node with graphs: each carried value and each result has one, float32 where in doubt."""
        bodies = list(nested_graphs(node))
        states = 0
        if node.op_type != "If":
            first = 2 if node.op_type == "Loop" else 0
            scans = node.attributes["num_scan_inputs"].as_int() if node.op_type == "Scan" else 0
            states = len(node.inputs) - first - scans
            for index, formal in enumerate(bodies[0].inputs[first:]):
                actual = node.inputs[first + index]
                if actual is not None and is_float(actual):
                    # A constant that starts a sum has no type that it would need: sums are float32.
                    wanted = FLOAT if is_constant(actual) else self.native.get(actual, FLOAT)
                    node.replace_input_with(first + index, self.as_type(actual, wanted))
                    self.native[formal] = wanted
                    set_dtype(formal, wanted)
        for body in bodies:
            self._lower(body)
        skipped = 1 if node.op_type == "Loop" else 0
        for index, result in enumerate(node.outputs):
            if not is_float(result):
                continue
            inner = [body.outputs[skipped + index] for body in bodies]
            if index < states:
                first = 2 if node.op_type == "Loop" else 0
                wanted = self.native[bodies[0].inputs[first + index]]
            else:
                natives = {FLOAT if is_constant(value) else self.native.get(value, FLOAT) for value in inner}
                wanted = natives.pop() if len(natives) == 1 else FLOAT
            for body in bodies:
                self._declare(body, skipped + index, wanted)
            self.native[result] = wanted
            set_dtype(result, wanted)

    def _declare(self, graph: ir.Graph, index: int, dtype: ir.DataType | None) -> None:
        """Give a graph's output a type, with a cast where it is computed in another; its name stays."""
        value = graph.outputs[index]
        if not is_float(value) or dtype is None or value.is_graph_input():
            return
        native = FLOAT if is_constant(value) else self.native.get(value, FLOAT)
        if native == dtype:
            return
        name = value.name
        value.name = self._unused(f"{name}_{native.name.lower()}")
        known = self.casts.get((value, dtype))
        if known is None or known.graph is not graph or known.is_graph_output():
            nodes = self._conversion(value, native, dtype, f"{name}_cast")
            graph.extend(nodes)
            known = nodes[-1].outputs[0]
        known.name = name
        graph.outputs[index] = known

    def _sweep(self) -> None:
        """Take out constants that nothing reads any more, and give the others the names of those that they replace."""
        for (value, _), narrow in self.casts.items():
            if not is_constant(value) or value.uses() or value.is_graph_output():
                continue
            name, producer, graph = value.name, value.producer(), value.graph
            assert graph is not None and name is not None
            if producer is not None:
                graph.remove(producer, safe=True)
            else:
                del graph.initializers[name]
            if graph is not self.model.graph:
                continue  # the graph beside it may have a constant of that name too
            del self.model.graph.initializers[narrow.name or ""]
            narrow.name = name
            self.model.graph.register_initializer(narrow)
        # In the order in which they are read, which does not depend on what they replace.
        initializers = self.model.graph.initializers
        read = dict.fromkeys(value for node in self.model.graph.all_nodes() for value in node.inputs)
        own = [value for value in read if value is not None and initializers.get(value.name or "") is value]
        rest = [value for value in initializers.values() if value not in read]
        initializers.clear()
        for value in [*own, *rest]:
            self.model.graph.register_initializer(value)
