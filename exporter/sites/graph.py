"""What a graph itself says about its attention sites: their sizes, and the block lists that it computes.

Block lists are read from the artifact and not from what was asked for: the part of the graph that computes them from
the model's inputs is cut out and run, at any length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...plugins.block_sparse_attention.definition import BLOCK_SPARSE_ATTENTION, Attributes
from ...plugins.errors import InvalidOperands, LibraryMissing
from ..errors import ExporterError
from ..manifest import InputRecord
from ..sources.base import SEQUENCE
from .block_sparse import FIXED
from .kind import Unknown
from .listed_blocks import ListedBlocks
from .record import AttentionSite, longspan_nodes

if TYPE_CHECKING:
    import onnx_ir as ir

Array = npt.NDArray[Any]

_OPTIONAL = ("attn_mask", "nonpad_kv_seqlen", "q_positions", "k_positions", "distance_bias")
"""Inputs that forbid pairs, or say how long the text is; the lists themselves stand between these and Q, K, V."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a site, as far as its attributes and the shapes of its values tell; 0 where they do not.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
        head_size: Channels of a query head.
        v_head_size: Channels of a value head.
    """

    heads: int = 0
    kv_heads: int = 0
    head_size: int = 0
    v_head_size: int = 0

    @property
    def channels(self) -> int:
        """Channels that a pair costs in both matrix products, each a multiplication and an addition; 0 if unknown."""
        return self.head_size + self.v_head_size if self.heads and self.head_size and self.v_head_size else 0


class SiteGraph:
    """The graph of a model's sites."""

    def __init__(self, model: ir.Model, inputs: Sequence[InputRecord]) -> None:
        """Look at a graph.

        Args:
            model: The graph; it is not changed.
            inputs: How to draw its inputs.
        """
        self._model = model
        self._inputs = inputs
        self._nodes = {node.name: node for node in longspan_nodes(model)}
        self._computed: dict[int, dict[str, Array] | Unknown] = {}
        self._found: dict[Hashable, ListedBlocks] = {}

    def sizes(self, site: AttentionSite) -> Sizes:
        """Heads and head sizes of a site."""
        node = self._nodes.get(site.node)
        values = node.inputs[:3] if node is not None else (None, None, None)
        q, k, v = (value.shape if value is not None else None for value in values)
        attributes = site.attributes
        sizes: dict[str, Any] = {
            "heads": attributes.get("q_num_heads", 0),
            "kv_heads": attributes.get("kv_num_heads", 0),
        }
        for name, heads, shape in (("head_size", "heads", q), ("", "kv_heads", k), ("v_head_size", "kv_heads", v)):
            if shape is None or len(shape) not in (3, 4):
                continue
            if len(shape) == 4:
                sizes |= {heads: shape[1], name: shape[3]}
            elif sizes[heads] and isinstance(shape[2], int):
                sizes[name] = shape[2] // sizes[heads]
        return Sizes(**{name: size for name, size in sizes.items() if name and isinstance(size, int)})

    def rows(self, site: AttentionSite, length: int) -> int | None:
        """Query rows of a site for texts of `length` tokens; None where the graph does not record it."""
        node = self._nodes.get(site.node)
        q = node.inputs[0] if node is not None else None
        if q is None or q.shape is None or len(q.shape) not in (3, 4):
            return None
        size = q.shape[len(q.shape) - 2]
        if isinstance(size, int):
            return size
        return length if size.value == SEQUENCE else None

    def listed(self, site: AttentionSite, length: int) -> ListedBlocks:
        """The block lists of a site for one drawn text of `length` tokens without padding.

        Lists that do not depend on the length are for the length that they were made for.

        Raises:
            Unknown: the lists cannot be computed; the text says why.
        """
        node = self._nodes.get(site.node)
        if node is None:
            raise Unknown(f"the graph has no node {site.node}")
        names = [tensor.name for tensor in BLOCK_SPARSE_ATTENTION.inputs]
        given = {name: value for name, value in zip(names, node.inputs, strict=False) if value is not None}
        lists = names[names.index("V") + 1 : names.index("attn_mask")]
        wanted = {name: given[name] for name in (*lists, *_OPTIONAL) if name in given}
        known = {name: constant for name, value in wanted.items() if (constant := _constant(value)) is not None}
        arrays = {**known, **self._run(wanted, known, length)}
        # One text: the first of the batch, where there is a batch.
        first = {
            name: array if name in ("block_masks", "distance_bias") else array[0] for name, array in arrays.items()
        }
        attributes = Attributes.from_mapping(site.attributes)
        made_for = int(first["kv_num_blocks"].shape[-1]) * attributes.q_block_size
        if site.lists == FIXED and length != made_for and not self._fits(site, first, attributes, length):
            return self.listed(site, made_for)
        seq_q, seq_k = self._lengths(site, first, attributes, length)
        found = ListedBlocks(
            attributes,
            seq_q,
            seq_k,
            {name: first[name] for name in lists if name in first},
            {name: first[name] for name in _OPTIONAL if name in first},
        )
        # Layers usually have the same lists, computed once or each for itself; what is said of them is worked out once.
        key = (attributes, seq_q, seq_k, *((name, array.shape, array.tobytes()) for name, array in first.items()))
        if key in self._found:
            return self._found[key]
        try:
            found.check()
        except InvalidOperands as error:
            raise Unknown(f"its lists for {length:,} tokens are wrong: {error}") from error
        return self._found.setdefault(key, found)

    def _lengths(
        self, site: AttentionSite, arrays: Mapping[str, Array], attributes: Attributes, length: int
    ) -> tuple[int, int]:
        """Query rows and keys of the site."""
        fitting = self._fits(site, arrays, attributes, length)
        # A text that the graph fills up to whole blocks has rows that only the lists know of.
        seq_q = fitting[0] if fitting else int(arrays["kv_num_blocks"].shape[-1]) * attributes.q_block_size
        seq_k = next((int(arrays[name].shape[-1]) for name in ("k_positions", "attn_mask") if name in arrays), None)
        if "distance_bias" in arrays:
            return seq_q, int(arrays["distance_bias"].shape[-1]) + 1 - seq_q
        return seq_q, seq_q if seq_k is None else seq_k

    def _fits(self, site: AttentionSite, arrays: Mapping[str, Array], attributes: Attributes, length: int) -> list[int]:
        """Numbers of query rows that have as many rows of blocks as the lists, the most credible one first."""
        named = [int(arrays[name].shape[-1]) for name in ("q_positions",) if name in arrays]
        recorded = [size for size in [self.rows(site, length)] if size is not None]
        alike = [int(arrays[name].shape[-1]) for name in ("k_positions", "attn_mask") if name in arrays]
        rows = int(arrays["kv_num_blocks"].shape[-1])
        return [size for size in (*named, *recorded, *alike, length) if attributes.q_blocks(size) == rows]

    def _run(self, wanted: Mapping[str, ir.Value], known: Iterable[str], length: int) -> dict[str, Array]:
        """Values that the graph computes, for drawn inputs of `length` tokens."""
        missing = {name: value for name, value in wanted.items() if name not in known}
        if not missing:
            return {}
        if length not in self._computed:
            try:
                self._computed[length] = self._run_all(length)
            except Unknown as error:
                self._computed[length] = error
        computed = self._computed[length]
        if isinstance(computed, Unknown):
            raise computed
        return {name: computed[value.name or ""] for name, value in missing.items()}

    def _run_all(self, length: int) -> dict[str, Array]:
        """The list inputs of all sites by value name: one session for all, because layers share what computes them."""
        import onnx_ir as ir

        names = [tensor.name for tensor in BLOCK_SPARSE_ATTENTION.inputs]
        values: dict[str, ir.Value] = {}
        for node in self._nodes.values():
            if node.op_type != BLOCK_SPARSE_ATTENTION.name:
                continue
            for name, value in zip(names, node.inputs, strict=False):
                if name not in ("Q", "K", "V", "sinks") and value is not None and _constant(value) is None:
                    values[value.name or ""] = value
        feed = self._feed(length)
        inputs = {value.name or "": value for value in self._model.graph.inputs}
        direct = {name: feed[name] for name in values if name in inputs}
        computed = [value for name, value in values.items() if name not in inputs]
        if not computed:
            return direct
        used = [inputs[name] for name in _inputs_of(computed) if name in inputs]
        part = ir.convenience.extract(self._model.graph, inputs=used, outputs=computed)
        functions = [function.clone() for function in self._model.functions.values()]
        model = ir.Model(part, ir_version=self._model.ir_version, functions=functions)
        part.opset_imports.update(self._model.opset_imports)
        return {
            **direct,
            **_in_onnxruntime(model, {value.name or "": feed[value.name or ""] for value in used}, length),
        }

    def _feed(self, length: int) -> dict[str, Array]:
        """One drawn text without padding."""
        from ..parity.inputs import draw_inputs

        try:
            return draw_inputs(self._inputs, 1, length)
        except ExporterError as error:
            raise Unknown(f"inputs of {length:,} tokens cannot be drawn: {error}") from error


def _constant(value: ir.Value) -> Array | None:
    """What a value holds whatever the input is; None where it depends on it."""
    import onnx_ir as ir

    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def _inputs_of(values: Iterable[ir.Value]) -> Iterator[str]:
    """Names of everything that values are computed from, and that no node computes."""
    seen: set[ir.Value] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is None:
            yield value.name or ""
            continue
        waiting += [given for given in node.inputs if given is not None]
        for attribute in node.attributes.values():
            # A nested graph sees the values around it.
            for graph in _graphs(attribute):
                waiting += [given for inner in graph.all_nodes() for given in inner.inputs if given is not None]


def _graphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    import onnx_ir as ir

    if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return ()
    return (attribute.as_graph(),) if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()


def _in_onnxruntime(model: ir.Model, feed: dict[str, Array], length: int) -> dict[str, Array]:
    """Run a part of a graph; with the longspan kernels, should it hold sites, where they are installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise Unknown(
            "its lists are computed in the model, and onnxruntime is missing to compute them; next step: pip install "
            "'longspan[cpu]'"
        ) from error
    import onnx_ir as ir

    from ...plugins.library import ort_library_path

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with contextlib.suppress(LibraryMissing):
        options.register_custom_ops_library(ort_library_path())
    try:
        content = ir.serde.serialize_model(model).SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, map(np.asarray, session.run(names, feed)), strict=True))
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Unknown(f"its lists cannot be computed for {length:,} tokens: {first}") from error
