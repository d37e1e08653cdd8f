"""Decide, for every node of a float32 graph, whether it computes in the narrow type or stays float32, and why.

Three passes. *Forward*, each value learns what it is: whether it depends on data, or on positions, masks and constants
alone; whether it is a statistic, which may leave the narrow type's range; whether a constant beyond that range went
into it. *Backward*, float32 operators pull the nodes that prepare their operands to float32, so that nothing is rounded
just before it is squared, exponentiated or taken the sine of. Then each node's rule decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ....plugins.definition import DOMAIN
from ...errors import ExportFailed
from . import rules
from .rules import Group, Pull, Rule, rule_of
from .values import (
    Slots,
    adds_to_scores,
    constant_of,
    is_constant,
    is_float,
    is_tensor,
    slots_of,
    touches_floats,
)

_T_ATTENTION = Rule(Group.CONTRACTION)
_REASONS = {Pull.SQUARE: rules.NORM, Pull.ALL: rules.SOFTMAX, Pull.ANGLE: rules.ANGLE}
_SUBGRAPHS = ("then_branch", "else_branch", "body")
_POSITIONS = frozenset((ir.DataType.INT64, ir.DataType.INT32, ir.DataType.UINT32, ir.DataType.UINT64))


@dataclass(frozen=True)
class Traits:
    """What a value is.

    Attributes:
        data: Depends on data or on trained tensors, and not on positions, masks and small constants alone.
        deep: A contraction of data went into it.
        statistic: May leave the narrow type's range by nature.
        huge: A finite constant beyond that range went into it, such as a mask of -3.4e38.
    """

    data: bool = False
    deep: bool = False
    statistic: bool = False
    huge: bool = False

    def __or__(self, other: Traits) -> Traits:
        return Traits(
            self.data or other.data,
            self.deep or other.deep,
            self.statistic or other.statistic,
            self.huge or other.huge,
        )


@dataclass(frozen=True)
class Constant:
    """What the numbers of a constant are to a narrow type.

    Attributes:
        mask: Whether some are a mask's, and beyond its range.
        unfit: Whether it does not hold some: beyond its range, or a scalar too small for it.
        trained: Which numbers beyond its range are no mask's, in words; empty for none.
    """

    mask: bool = False
    unfit: bool = False
    trained: str = ""


@dataclass(frozen=True)
class Plan:
    """What was decided.

    Attributes:
        wide: Why a node stays float32, for those that do.
        traits: What each value is.
        slots: The types of each node's operands.
    """

    wide: dict[ir.Node, str]
    traits: dict[ir.Value, Traits]
    slots: dict[ir.Node, Slots]


@dataclass(frozen=True)
class Range:
    """The finite numbers of a type.

    Attributes:
        dtype: The type.
        largest: Its largest number.
        smallest: Its smallest number of full accuracy.
    """

    dtype: ir.DataType
    largest: float
    smallest: float

    @classmethod
    def of(cls, dtype: ir.DataType) -> Range:
        """The range of a floating-point type."""
        info = ml_dtypes.finfo(dtype.numpy())  # type: ignore[no-untyped-call]
        return cls(dtype, float(info.max), float(info.smallest_normal))

    def beyond(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The finite numbers of an array that this type rounds to infinity."""
        numbers = array[np.isfinite(array)]
        beyond: npt.NDArray[Any] = numbers[np.abs(numbers) > self.largest]
        return beyond


def is_fill(array: npt.NDArray[Any], beyond: npt.NDArray[Any]) -> bool:
    """Whether the numbers `beyond` a range are a mask's: a scalar, or one negative number again and again.

    The weights of a model hardly agree in all their digits; what a program fills in does.
    """
    return array.size == 1 or (beyond.size > 1 and beyond[0] < 0 and bool((beyond == beyond[0]).all()))


def plan_precision(model: ir.Model, dtype: ir.DataType) -> Plan:
    """Decide the type of every node.

    Args:
        model: Its floats are float32, its values have types.
        dtype: The narrow type.

    Raises:
        ExportFailed: nobody says which operands of an operator share a type, or a trained tensor has numbers beyond the
            narrow type's range.
    """
    return _Planner(model, Range.of(dtype)).plan()


def rule_for(node: ir.Node) -> Rule:
    """The rule of a node."""
    if node.domain == DOMAIN:
        return _T_ATTENTION
    reduction = node.attributes.get("reduction")
    return rule_of(node.op_type, reduction.as_string() if reduction is not None else "none")


class _Planner:
    def __init__(self, model: ir.Model, target: Range) -> None:
        self.model, self.target = model, target
        self.opset = model.opset_imports.get("", 0)
        self.traits: dict[ir.Value, Traits] = {}
        self.slots: dict[ir.Node, Slots] = {}
        self.forced: dict[ir.Node, str] = {}
        self.order: list[ir.Node] = []
        self._constants: dict[ir.Value, Constant] = {}

    def plan(self) -> Plan:
        for value in self.model.graph.inputs:
            self.traits[value] = Traits(data=is_float(value))
        self._forward(self.model.graph)
        pulled = self._backward()
        wide = {}
        for node in self.order:
            reason = self._wide(node, pulled)
            if reason:
                wide[node] = reason
            else:
                self._refuse_overflow(node)
        return Plan(wide, self.traits, self.slots)

    def _forward(self, graph: ir.Graph) -> None:
        for node in graph:
            for name, attribute in node.attributes.items():
                if name in _SUBGRAPHS and attribute.type == ir.AttributeType.GRAPH:
                    body = attribute.as_graph()
                    self._enter(node, body)
                    self._forward(body)
            if touches_floats(node) or rule_for(node).group is Group.CONTROL:
                self.slots[node] = slots_of(node, self.opset) if touches_floats(node) else Slots((), (), frozenset())
                self.order.append(node)
            self._describe(node)

    def _enter(self, node: ir.Node, body: ir.Graph) -> None:
        """What the inputs of a nested graph are: carried values may become anything in the next iteration."""
        if node.op_type not in ("Loop", "Scan", "If"):
            raise ExportFailed(
                f"precision: node {node.name!r} is {node.op_type}, whose graph has types that nothing fixes; allowed "
                "operators with graphs: If, Loop, Scan; next step: export the model without it"
            )
        outer = node.inputs[0 if node.op_type == "Scan" else 2 :]
        inner = body.inputs[0 if node.op_type == "Scan" else 2 :]
        for formal, actual in zip(inner, outer, strict=False):
            known = self._of(actual) if actual is not None else Traits()
            self.traits[formal] = known | Traits(data=is_float(formal), deep=is_float(formal))

    def _of(self, value: ir.Value) -> Traits:
        if value not in self.traits:
            self.traits[value] = Traits(huge=self._constant(value).mask)
        return self.traits[value]

    def _constant(self, value: ir.Value) -> Constant:
        """What a value is as a constant; nothing remarkable where it is none."""
        if not is_constant(value) or not is_float(value):
            return Constant()
        if value not in self._constants:
            array = constant_of(value)
            assert array is not None
            beyond = self.target.beyond(array)
            mask = beyond.size > 0 and is_fill(array, beyond)
            tiny = array.size == 1 and 0 < abs(float(array.reshape(-1)[0])) < self.target.smallest
            trained = ""
            if beyond.size and not mask:
                trained = f"{beyond.size} of {array.size} numbers, up to {np.abs(beyond).max():.4g}"
            self._constants[value] = Constant(mask, tiny or beyond.size > 0, trained)
        return self._constants[value]

    def _describe(self, node: ir.Node) -> None:
        """What a node's results are, and whether its operands force it to float32."""
        rule = rule_for(node)
        inputs = [value for value in node.inputs if value is not None]
        traits = Traits()
        for value in inputs:
            traits = traits | self._of(value)
        floats = [value for value in inputs if is_float(value)]
        moving = [value for value in floats if not is_constant(value)]
        data = traits.data
        if rule.group is Group.MOVEMENT or (rule.group is Group.CONTRACTION and not moving):
            # Rows of a table, a transposed weight: trained numbers.
            data = data or any(is_constant(value) and _is_table(value) for value in floats)
        self._force(node, floats, data)
        deep = traits.deep or (rule.group is Group.CONTRACTION and data)
        result = Traits(data, deep, self._is_statistic(node, floats), traits.huge and rule.keeps_size)
        if rule.group is Group.CONTROL:
            result = self._of_graphs(node) | Traits(data=True, deep=True)
        for value in node.outputs:
            # Indices and truth values made of data carry no rounding: what is computed of them is about positions.
            if node.op_type != "Constant":
                self.traits[value] = result if is_float(value) else Traits()

    def _is_statistic(self, node: ir.Node, floats: list[ir.Value]) -> bool:
        """Whether a node's result may leave the narrow type's range by nature."""
        rule = rule_for(node)
        of_operands = [self._of(value).statistic for value in floats if not is_constant(value)]
        if node.op_type == "Cast" and rule.group is Group.WIDE:
            source = node.inputs[0]
            return is_float(node.outputs[0]) and source is not None and source.dtype in _POSITIONS
        if rule.group is Group.MOVEMENT:
            # An epsilon that was expanded is one still.
            return any(of_operands) or any(self._constant(value).unfit for value in floats)
        if rule.group is Group.ELEMENTWISE:
            # Data times a statistic is data again.
            return bool(of_operands) and all(of_operands) and rule.keeps_size and not normalises(node)
        return rule.statistic

    def _force(self, node: ir.Node, floats: list[ir.Value], data: bool) -> None:
        """Note why a node must be float32, where its operands are the reason."""
        group = rule_for(node).group
        statistic = any(self._of(value).statistic for value in floats if not is_constant(value))
        if group is Group.CONTRACTION and node.domain != DOMAIN:
            if statistic or not data:
                self.forced[node] = rules.UNNORMALISED if statistic else rules.INDEX
        elif group in (Group.ELEMENTWISE, Group.MOVEMENT, Group.COMPARISON):
            unfit = group is not Group.MOVEMENT and any(self._constant(value).unfit for value in floats)
            if unfit or any(self._of(value).huge for value in floats):
                self.forced[node] = rules.CONSTANT
            elif statistic:
                self.forced[node] = rules.STATISTIC if data else rules.POSITION
            elif not data and group is not Group.COMPARISON:
                self.forced[node] = rules.INDEX

    def _of_graphs(self, node: ir.Node) -> Traits:
        traits = Traits()
        for name, attribute in node.attributes.items():
            if name in _SUBGRAPHS and attribute.type == ir.AttributeType.GRAPH:
                for value in attribute.as_graph().outputs:
                    traits = traits | self._of(value)
        return traits

    def _backward(self) -> dict[ir.Node, Pull]:
        """The nodes that float32 operators pull to float32 with them."""
        pulled: dict[ir.Node, Pull] = {}
        for node in reversed(self.order):
            rule = rule_for(node)
            if rule.pull is not Pull.NONE:
                pulled[node] = rule.pull
                continue
            pulls = [
                pulled.get(consumer, Pull.NONE)
                for value in node.outputs
                for consumer in value.consumers()
                if rule_for(consumer).group is not Group.COMPARISON
            ]
            if not pulls or not any(is_float(value) for value in node.outputs):
                continue
            operands = [value for value in node.inputs if is_float(value) and not is_constant(value)]  # type: ignore[arg-type]
            deep = any(self._of(value).deep for value in operands if value is not None)
            if rule.group is Group.CONTRACTION:
                if Pull.ANGLE in pulls and not deep and node.domain != DOMAIN:
                    pulled[node] = Pull.ANGLE
                continue
            if rule.group not in (Group.ELEMENTWISE, Group.MOVEMENT):
                continue
            if Pull.ANGLE in pulls and not deep:
                pulled[node] = Pull.ANGLE
            elif Pull.NONE not in pulls and not any(value.is_graph_output() for value in node.outputs):
                square = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
                if Pull.ALL in pulls:
                    pulled[node] = Pull.ALL
                elif square or rule.group is Group.MOVEMENT:
                    pulled[node] = Pull.SQUARE
        return pulled

    def _wide(self, node: ir.Node, pulled: dict[ir.Node, Pull]) -> str:
        """Why a node stays float32; empty where it does not."""
        rule, slots = rule_for(node), self.slots[node]
        if rule.group is Group.CONTROL:
            return ""
        if rule.group is Group.WIDE:
            return rule.reason
        if any(not is_tensor(value) for value in (*node.inputs, *node.outputs) if is_float(value)):  # type: ignore[arg-type]
            return rules.SEQUENCE
        if node in self.forced:
            return self.forced[node]
        if node in pulled:
            return _REASONS[pulled[node]]
        if self.target.dtype not in slots.allowed:
            return f"opset {self.opset} has no {self.target.dtype.name.lower()} {node.op_type}"
        return ""

    def _refuse_overflow(self, node: ir.Node) -> None:
        for index, (value, slot) in enumerate(zip(node.inputs, self.slots[node].inputs, strict=False)):
            if value is None or slot != "node" or adds_to_scores(node, index) or not is_constant(value):
                continue
            if self._constant(value).trained:
                raise ExportFailed(
                    f"precision: {value.name!r}, an operand of {node.op_type} {node.name!r}, holds numbers that "
                    f"{self.target.dtype.name.lower()} does not: {self._constant(value).trained}; allowed: up to "
                    f"{self.target.largest:.5g}; next step: choose bf16, which has the range of float32, or fp32"
                )


def normalises(node: ir.Node) -> bool:
    """Whether a node divides numbers by a sum of the same numbers, as the last step of a softmax does."""
    if node.op_type == "Div":
        return _is_sum_of(node.inputs[1], node.inputs[0])
    if node.op_type == "Mul":
        first, second = node.inputs
        return any(
            inverse is not None
            and (producer := inverse.producer()) is not None
            and producer.op_type == "Reciprocal"
            and _is_sum_of(producer.inputs[0], numbers)
            for inverse, numbers in ((first, second), (second, first))
        )
    return False


def _is_sum_of(value: ir.Value | None, numbers: ir.Value | None) -> bool:
    """Whether a value is a sum of `numbers`, perhaps copied, bounded or with a constant added."""
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "ReduceSum":
            return producer.inputs[0] is numbers
        moving = [operand for operand in producer.inputs if is_float(operand) and not is_constant(operand)]  # type: ignore[arg-type]
        if len(moving) != 1 or producer.op_type == "Constant":
            return False
        [value] = moving
    return False


def _is_table(value: ir.Value) -> bool:
    return value.shape is not None and any(size != 1 for size in value.shape)


def nested_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that a node holds."""
    for attribute in node.attributes.values():
        if not attribute.is_ref() and attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
