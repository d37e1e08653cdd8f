"""Adversarial SlidingWindowAttention sites, each with random operands, for every execution of the operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from longspan.plugins.attention.operands import SIZE_LIMIT
from longspan.plugins.sliding_window_attention.definition import Attributes
from longspan.plugins.sliding_window_attention.reference import sliding_window_attention

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """Sizes, attributes and optional inputs of one site; `features` names the inputs besides Q, K, V.

    With `garbage` the keys and values that `attn_mask` and `nonpad_kv_seqlen` forbid are NaN and infinite.
    `forbidden` names inputs, `band_bias` or `sinks`, some of whose values are -inf.
    """

    name: str
    attributes: dict[str, Any]
    features: tuple[str, ...] = ()
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    seq_q: int = 19
    seq_k: int | None = None
    size: int = 8
    v_size: int | None = None
    lengths: tuple[int, ...] = ()
    global_tokens: tuple[tuple[int, ...], ...] = ()
    padded: tuple[tuple[int, int], ...] = ()
    bias_shape: tuple[int, int, int] = (1, 1, 1)
    garbage: bool = False
    forbidden: tuple[str, ...] = ()

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.seq_q if self.seq_k is None else self.seq_k

    def node_attributes(self, layout: str) -> dict[str, Any]:
        """Attributes of the node in `layout`."""
        heads = {"q_num_heads": self.heads, "kv_num_heads": self.kv_heads} if layout == "bsd" else {}
        return self.attributes | heads

    def operands(self, layout: str) -> dict[str, Array]:
        """Random float64 inputs by formal name; values are multiples of 1/64, exact in float16 and float32."""
        rng = np.random.default_rng([*self.name.encode()])

        def normal(*shape: int) -> Array:
            return np.round(rng.standard_normal(shape) * 64) / 64

        def rows(heads: int, length: int, size: int) -> Array:
            values = normal(self.batch, heads, length, size)
            return (
                values if layout == "bhsd" else values.transpose(0, 2, 1, 3).reshape(self.batch, length, heads * size)
            )

        v_size = self.size if self.v_size is None else self.v_size
        shapes = {
            "Q": (self.heads, self.seq_q, self.size),
            "K": (self.kv_heads, self.keys, self.size),
            "V": (self.kv_heads, self.keys, v_size),
        }
        given = {name: rows(*shape) for name, shape in shapes.items()}
        if "global_Q" in self.features:
            given |= {f"global_{name}": rows(*shape) for name, shape in shapes.items()}
        if "attn_mask" in self.features:
            mask = np.ones((self.batch, self.keys), bool)
            for b, (begin, end) in enumerate(self.padded):
                mask[b, begin:end] = False
            given["attn_mask"] = mask
        if "nonpad_kv_seqlen" in self.features:
            given["nonpad_kv_seqlen"] = np.array(self.lengths, np.int64)
        if "global_mask" in self.features:
            flags = np.zeros((self.batch, self.keys), bool)
            for b, tokens in enumerate(self.global_tokens):
                flags[b, list(tokens)] = True
            given["global_mask"] = flags
        if "band_bias" in self.features:
            width = self.attributes["left_window_size"] + self.attributes["right_window_size"] + 1
            given["band_bias"] = normal(*self.bias_shape, width)
        if "sinks" in self.features:
            given["sinks"] = normal(self.heads)
        if "spans" in self.features:
            given["spans"] = np.round(rng.uniform(-2, 8, self.heads) * 64) / 64
        if "sinks" in self.forbidden:
            given["sinks"][0] = -np.inf
        if "band_bias" in self.forbidden:
            given["band_bias"][..., 1] = -np.inf  # one key of every row, and two rows whole
            given["band_bias"][:, :, 3:5] = -np.inf
        if self.garbage:
            masked = ~given.get("attn_mask", np.ones((self.batch, self.keys), bool))
            if self.lengths:
                masked |= np.arange(self.keys) >= np.array(self.lengths)[:, None]
            for name in given.keys() & {"K", "V", "global_K", "global_V"}:
                by_key = given[name].swapaxes(1, 2) if layout == "bhsd" else given[name]
                by_key[masked] = np.nan
                by_key[masked, ..., ::2] = np.inf
        return given


def expected(case: Case, layout: str, operands: dict[str, Array] | None = None) -> tuple[Array, Array]:
    """(Y, lse) of the float64 reference, for the case's own operands or those given."""
    given = {name.lower(): array for name, array in (operands or case.operands(layout)).items()}
    return sliding_window_attention(**given, attributes=Attributes.from_mapping(case.node_attributes(layout)))


def _window(left: int, right: int, **more: Any) -> dict[str, Any]:
    return {"left_window_size": left, "right_window_size": right, **more}


_EVERYTHING = ("attn_mask", "nonpad_kv_seqlen", "global_mask", "global_Q", "band_bias", "sinks", "spans")

CASES = (
    Case("plain", _window(3, 2)),
    Case("self only", _window(0, 0)),
    Case("length 1", _window(3, 2), seq_q=1),
    Case("window reaches past both ends", _window(40, 40)),
    Case("causal with a right side", _window(3, 2, is_causal=1)),
    Case("default windows are dense", {}),
    Case("unbounded left, causal", _window(-1, 0, is_causal=1), seq_q=150, batch=1),
    Case("unbounded right", _window(2, -1), seq_q=150, batch=1),
    Case("many blocks", _window(17, 5), seq_q=300, batch=1),
    Case("block edges", _window(15, 16), seq_q=129, batch=1),
    Case("more keys than queries", _window(3, 2), seq_q=7, seq_k=19),
    Case("more queries than keys", _window(3, 2), seq_q=19, seq_k=7),
    Case("grouped heads", _window(3, 2), heads=6, kv_heads=2),
    Case("one key head, sizes differ", _window(4, 0), heads=3, kv_heads=1, size=5, v_size=11),
    Case("softcap and scale", _window(3, 3, softcap=1.5, scale=0.75)),
    Case("dilated", _window(2, 3, dilation=3)),
    Case("dilation beyond the length", _window(2, 3, dilation=50)),
    Case("largest dilation", _window(2, 3, dilation=SIZE_LIMIT)),
    Case("largest windows", _window(SIZE_LIMIT, SIZE_LIMIT, dilation=(1, SIZE_LIMIT)), seq_q=40),
    Case("dilation per head", _window(3, 2, dilation=(1, 2, 3, 5)), heads=4, seq_q=67),
    Case("dilated, unbounded", _window(-1, 0, dilation=(2, 3)), seq_q=67),
    Case("padding", _window(3, 2), ("attn_mask",), padded=((12, 19), (0, 0))),
    Case("everything padded", _window(3, 2), ("attn_mask",), padded=((0, 19), (5, 15))),
    Case("everything padded, dense", {}, ("attn_mask",), padded=((0, 19), (5, 15))),
    Case("decode", _window(4, 0, is_causal=1), ("nonpad_kv_seqlen",), seq_q=1, seq_k=23, lengths=(23, 9)),
    Case("offsets", _window(4, 3), ("nonpad_kv_seqlen",), seq_q=6, seq_k=23, lengths=(23, 14)),
    Case("negative offsets", _window(4, 3), ("nonpad_kv_seqlen",), seq_q=19, seq_k=23, lengths=(11, 0)),
    Case(
        "negative offsets, dilated", _window(4, 3, dilation=(2, 3)), ("nonpad_kv_seqlen",), seq_q=19, lengths=(11, 2)
    ),
    Case("unbounded with offsets", _window(-1, 0), ("nonpad_kv_seqlen",), seq_q=6, seq_k=23, lengths=(23, 3)),
    Case("sinks", _window(3, 2), ("sinks",)),
    Case("sink and nothing else", _window(3, 2), ("sinks", "attn_mask"), padded=((0, 19), (5, 15))),
    Case("spans", _window(12, 12, span_ramp=3.5), ("spans",), heads=4, kv_heads=2),
    Case("spans, unbounded", {"span_ramp": 3.5, "dilation": (1, 3)}, ("spans",), seq_q=40),
    Case("bias", _window(3, 2), ("band_bias",)),
    Case("bias for all", _window(3, 2, is_causal=1), ("band_bias",), heads=4, kv_heads=2, bias_shape=(2, 4, 19)),
    Case("bias per row, dilated", _window(3, 2, dilation=(2, 3)), ("band_bias",), bias_shape=(1, 2, 19)),
    Case("bias and softcap", _window(3, 2, softcap=2.0), ("band_bias",), bias_shape=(2, 1, 1)),
    Case("global", _window(2, 2), ("global_mask",), global_tokens=((0,), (3, 4, 18))),
    Case("global, none in one entry", _window(2, 2), ("global_mask",), global_tokens=((), (7,))),
    Case("no global at all", _window(2, 2), ("global_mask",), global_tokens=((), ())),
    Case("all global", _window(2, 2), ("global_mask", "sinks"), global_tokens=((*range(19),), ())),
    Case("causal global", _window(2, 2, is_causal=1), ("global_mask",), global_tokens=((0, 9), (18,))),
    Case(
        "global, padded",
        _window(2, 2),
        ("global_mask", "attn_mask"),
        global_tokens=((0, 15), (3, 4, 18)),
        padded=((12, 19), (0, 4)),
    ),
    Case("global, dilated", _window(2, 2, dilation=(1, 3)), ("global_mask",), global_tokens=((0, 9), (18,))),
    Case("global, unbounded", _window(-1, 1), ("global_mask",), global_tokens=((0, 9), (18,)), seq_q=40),
    Case(
        "global with own projections",
        _window(2, 2),
        ("global_mask", "global_Q"),
        heads=4,
        kv_heads=2,
        v_size=5,
        global_tokens=((0, 1, 2), (18,)),
    ),
    Case(
        "global with offsets",
        _window(2, 2),
        ("global_mask", "nonpad_kv_seqlen", "global_Q"),
        seq_q=9,
        seq_k=23,
        lengths=(23, 4),
        global_tokens=((0, 15, 20), (0, 3, 9)),
    ),
    Case("global, biased", _window(3, 2), ("global_mask", "band_bias"), global_tokens=((0, 9), (18,))),
    Case("global, spans", _window(12, 12, span_ramp=2.0), ("global_mask", "spans"), global_tokens=((0, 9), (18,))),
    Case("garbage in padding", _window(3, 2), ("attn_mask",), padded=((12, 19), (3, 9)), garbage=True),
    Case("garbage in padding, dense", {}, ("attn_mask",), padded=((12, 19), (3, 9)), garbage=True),
    Case(
        "garbage behind the keys",
        _window(4, 3),
        ("nonpad_kv_seqlen",),
        seq_q=5,
        seq_k=12,
        lengths=(8, 0),
        heads=4,
        garbage=True,
    ),
    Case(
        "garbage, global",
        _window(2, 2, softcap=2.0),
        ("global_mask", "global_Q", "attn_mask", "nonpad_kv_seqlen", "spans"),
        global_tokens=((0, 9, 18), (4, 14)),
        padded=((3, 5), (4, 7)),
        lengths=(15, 19),
        garbage=True,
    ),
    Case(
        "sink of -inf",
        _window(3, 2),
        ("sinks", "attn_mask"),
        padded=((0, 19), (5, 15)),
        forbidden=("sinks",),
    ),
    Case("bias of -inf", _window(3, 2), ("band_bias",), bias_shape=(1, 2, 19), forbidden=("band_bias",)),
    Case(
        "bias and sink of -inf",
        _window(3, 2),
        ("band_bias", "sinks", "global_mask"),
        bias_shape=(1, 2, 19),
        global_tokens=((), (7,)),
        forbidden=("band_bias", "sinks"),
    ),
    Case(
        "everything",
        _window(4, 3, dilation=(1, 2, 1, 3), is_causal=1, softcap=3.0, scale=0.4, span_ramp=4.0),
        _EVERYTHING,
        heads=4,
        kv_heads=2,
        seq_q=37,
        seq_k=41,
        v_size=3,
        lengths=(41, 30),
        global_tokens=((0, 20, 40), (2, 3)),
        padded=((33, 36), (0, 2)),
        bias_shape=(2, 4, 37),
    ),
)  # fmt: skip
