"""`attention`: a pattern declared in one line, against dense attention whose mask is the pattern's own definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from longspan.exporter import InvalidRequest, attention
from longspan.exporter.pattern_attention import choose_block_size
from longspan.exporter.patterns import (
    All,
    Blocked,
    Causal,
    Columns,
    Empty,
    Explicit,
    Global,
    Lengths,
    Pattern,
    PerHead,
    RandomBlocks,
    Rows,
    Strided,
    Tokens,
    Window,
    from_json,
    systems,
)
from longspan.plugins.torch_ops import onnx_translation_table

# Two float64 computations of O(1) values differ by the rounding of sums over some hundred keys.
TOLERANCE = 1e-13

PATTERNS: dict[str, Pattern] = {
    "window": Window(20, 3),
    "causal window": Window(20, -1) & Causal(),
    "dilation per head": PerHead((Window(5, 5, 3), Window(5, 5, 1))),
    "global": Window(9, 9) | Global(Tokens(first=2, at=(7,), period=40, residues=(11,), last=3)),
    "strided": systems.sparse_transformer_strided(16),
    "two groups": systems.sparse_transformer_strided(16, heads=4),
    "three groups": PerHead((Window(3, 0), Causal() & Columns(Tokens(first=4)), Rows(Tokens(last=2)), Window(9, 0))),
    "big bird": systems.big_bird(16, 3),
    "full": All(),
    "nothing": Empty(),
    "random": RandomBlocks(16, 2, 5) | Window(3, 3),
}


def operands(
    length: int, keys: int | None = None, *, heads: int = 4, key_heads: int = 2, batch: int = 2, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steep queries, keys, and values of another head size, float64."""
    draw = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, length, 12), (batch, key_heads, keys or length, 12), (batch, key_heads, keys or length, 9)
    q, k, v = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return 2 * q, k, v


def expected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    padding: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    distance_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention head by head, from the formula."""
    batch, heads, queries, size = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=q.dtype)
    for b, h in np.ndindex(batch, heads):
        own = pattern.head(h)
        lengths = Lengths(queries, keys)
        times = torch.from_numpy(own.multiplicity(np.arange(queries)[:, None], np.arange(keys), lengths).copy())
        if padding is not None:
            times = times * padding[b]
        scores = q[b, h] @ k[b, h // group].T * (size**-0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if distance_bias is not None:
            row = distance_bias[h if len(distance_bias) > 1 else 0]
            scores = scores + torch.stack([row[queries - 1 - i :][:keys] for i in range(queries)])
        weights = times * scores.exp()
        total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks[h].exp())
        out[b, h] = torch.where(total > 0, weights / total, 0) @ v[b, h // group]
    return out


def padding_of(batch: int, keys: int) -> torch.Tensor:
    """Padding on the right of the first row, on the left of the second, holes in others."""
    padding = torch.ones(batch, keys, dtype=torch.bool)
    for row in range(batch):
        padding[row, (slice(keys - keys // 3, None), slice(0, keys // 4), slice(1, None, 3))[row % 3]] = False
    return padding


def worst(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("length", [1, 16, 37, 80])
@pytest.mark.parametrize("name", PATTERNS)
def test_it_computes_what_the_pattern_says(name: str, length: int) -> None:
    q, k, v = operands(length, batch=3)
    padding = padding_of(3, length)
    assert worst(attention(q, k, v, PATTERNS[name]), expected(q, k, v, PATTERNS[name])) < TOLERANCE
    found = attention(q, k, v, PATTERNS[name], padding=padding)
    assert worst(found, expected(q, k, v, PATTERNS[name], padding=padding)) < TOLERANCE


@pytest.mark.parametrize("name", PATTERNS)
def test_scores_sinks_and_biases(name: str) -> None:
    q, k, v = operands(45)
    draw = torch.Generator().manual_seed(1)
    options = {
        "padding": padding_of(2, 45),
        "scale": 0.4,
        "softcap": 3.0,
        "sinks": torch.randn(4, generator=draw, dtype=torch.float64),
    }
    found, wanted = (function(q, k, v, PATTERNS[name], **options) for function in (attention, expected))
    assert worst(found, wanted) < TOLERANCE
    for heads in (1, 4):
        options["distance_bias"] = torch.randn(heads, 89, generator=draw, dtype=torch.float64)
        found, wanted = (function(q, k, v, PATTERNS[name], **options) for function in (attention, expected))
        assert worst(found, wanted) < TOLERANCE


@pytest.mark.parametrize("name", PATTERNS)
def test_queries_and_keys_of_different_number(name: str) -> None:
    for queries, keys in ((20, 50), (50, 20)):
        q, k, v = operands(queries, keys)
        options = {"padding": padding_of(2, keys), "distance_bias": torch.linspace(-1, 1, 69, dtype=q.dtype)[None]}
        found, wanted = (function(q, k, v, PATTERNS[name], **options) for function in (attention, expected))
        assert worst(found, wanted) < TOLERANCE


@pytest.mark.parametrize("name", PATTERNS)
def test_gradients(name: str) -> None:
    """Where they are needed the result is the same, and has derivatives, those of padding being zero."""
    q, k, v = operands(24)
    draw = torch.Generator().manual_seed(1)
    sinks = torch.randn(4, generator=draw, dtype=torch.float64)
    bias = torch.randn(4, 47, generator=draw, dtype=torch.float64)
    options: dict[str, Any] = {"padding": padding_of(2, 24), "softcap": 3.0, "sinks": sinks, "distance_bias": bias}
    plain = attention(q, k, v, PATTERNS[name], **options)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v, sinks, bias)]
    with torch.no_grad():
        leaves[1][~options["padding"][:, None].expand(2, 2, 24)] = torch.nan

    def output(*tensors: torch.Tensor) -> torch.Tensor:
        own = {**options, "sinks": tensors[3], "distance_bias": tensors[4]}
        return attention(*tensors[:3], PATTERNS[name], **own)

    found = output(*leaves)
    assert worst(found.detach(), plain) < TOLERANCE
    gradients = torch.autograd.grad(found.square().sum(), leaves, allow_unused=True)
    wanted = [tensor.clone().requires_grad_() for tensor in (q, k, v, sinks, bias)]
    formula = expected(
        *wanted[:3], PATTERNS[name], padding=options["padding"], softcap=3.0, sinks=wanted[3], distance_bias=wanted[4]
    )
    for ours, theirs in zip(gradients, torch.autograd.grad(formula.square().sum(), wanted), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_no_gradient_of_a_row_that_sees_nothing() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in operands(5))
    found = attention(q, k, v, Window(2, 0), padding=torch.zeros(2, 5, dtype=torch.bool))
    found.sum().backward()
    assert not found.any()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types(dtype: torch.dtype) -> None:
    q, k, v = operands(37)
    found = attention(q.to(dtype), k.to(dtype), v.to(dtype), PATTERNS["strided"])
    dense = attention(q.to(dtype).requires_grad_(), k.to(dtype), v.to(dtype), PATTERNS["strided"])
    wanted = expected(q.to(dtype).double(), k.to(dtype).double(), v.to(dtype).double(), PATTERNS["strided"])
    assert found.dtype == dense.dtype == dtype
    largest = float(wanted.abs().max())
    for each in (found, dense):
        # Arithmetic in float32, rounded once at the end.
        assert worst(each.detach().double(), wanted) < largest * (torch.finfo(dtype).eps + 2e-6)


class Attending(torch.nn.Module):
    """Two layers of one pattern."""

    def __init__(self, pattern: Pattern, **options: Any) -> None:
        super().__init__()
        self.pattern, self.options = pattern, options

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            heads = x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2)
            x = attention(heads, heads, heads, self.pattern, padding=mask, **self.options).transpose(1, 2).flatten(2)
        return x


def traced(pattern: Pattern, *, dynamic: bool = True, **options: Any) -> torch.onnx.ONNXProgram:
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    shape = {0: batch, 1: sequence} if dynamic else {0: batch}
    example = torch.randn(2, 150, 32), torch.ones(2, 150, dtype=torch.bool)
    model = Attending(pattern, **options).eval()
    table = onnx_translation_table()
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            example,
            dynamic_shapes={"x": shape, "mask": shape},
            dynamo=True,
            opset_version=20,
            custom_translation_table=table,
            verbose=False,
        )
    assert program is not None
    return program


def longspan_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == "longspan"]


def test_a_model_is_traced_with_an_open_length() -> None:
    program = traced(PATTERNS["strided"], block_size=48)
    nodes = longspan_nodes(program.model)
    assert [node.op_type for node in nodes] == ["BlockSparseAttention"] * 2
    for node in nodes:
        assert from_json(node.metadata_props["longspan.pattern"]) == PATTERNS["strided"]
        assert node.attributes["q_block_size"].as_int() == node.attributes["kv_block_size"].as_int() == 48
    assert [str(size) for size in program.model.graph.inputs[0].shape][:2] == ["batch", "sequence"]
    # The layers share their lists, which are sorted once each.
    assert [value.name for value in nodes[0].inputs[3:9]] == [value.name for value in nodes[1].inputs[3:9]]
    assert sum(node.op_type == "TopK" for node in program.model.graph) == 2


def test_heads_in_groups_are_bands_where_they_can_be() -> None:
    nodes = longspan_nodes(traced(PATTERNS["two groups"]).model)
    assert [node.op_type for node in nodes] == ["SlidingWindowAttention"] * 4
    assert [node.attributes["left_window_size"].as_int() for node in nodes[::2]] == [16, 16]
    assert [node.attributes["dilation"].as_ints() for node in nodes[1::2]] == [(16,), (16,)]
    assert from_json(nodes[0].metadata_props["longspan.pattern"]) == Window(16, 0)


def test_key_heads_are_not_divided() -> None:
    q, k, v = operands(40, key_heads=1)
    pattern = PATTERNS["two groups"]
    assert worst(attention(q, k, v, pattern), expected(q, k, v, pattern)) < TOLERANCE


def test_patterns_without_a_rule_are_traced_for_one_length() -> None:
    program = traced(PATTERNS["random"], dynamic=False)
    nodes = longspan_nodes(program.model)
    assert [node.op_type for node in nodes] == ["BlockSparseAttention"] * 2
    assert program.model.graph.inputs[0].shape[1] == 150
    # Constants, and the same ones for both layers.
    assert all(value.name in program.model.graph.initializers for value in nodes[0].inputs[3:9])
    assert [value.name for value in nodes[0].inputs[3:9]] == [value.name for value in nodes[1].inputs[3:9]]
    with pytest.raises(Exception, match="open") as raised:
        traced(PATTERNS["random"])
    cause: BaseException | None = raised.value
    while cause is not None and not isinstance(cause, InvalidRequest):
        cause = cause.__cause__
    assert "fix the sequence length" in str(cause)
    explicit = Explicit.of(np.ones((5, 5), np.int64))
    q, k, v = operands(6)
    with pytest.raises(InvalidRequest, match="says nothing about 6 and 6"):
        attention(q, k, v, explicit)


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        (Strided(128) & Causal() | Window(128, 0), 16),
        (Blocked(64, Window(1, 1)), 64),
        (All(), 128),
        (Blocked(48, Window(1, 1)), 48),
        (Blocked(250, Window(0, 0)), 125),
    ],
    ids=["lines", "blocks", "all", "odd blocks", "blocks too large"],
)
def test_block_sizes(pattern: Pattern, size: int) -> None:
    assert choose_block_size(pattern) == size


def test_block_size_of_one_length() -> None:
    assert choose_block_size(RandomBlocks(32, 2), Lengths.of(640)) == 32
    with pytest.raises(InvalidRequest, match="fix the sequence length"):
        choose_block_size(RandomBlocks(32, 2))


def test_a_block_size_of_ones_own() -> None:
    q, k, v = operands(100)
    found = attention(q, k, v, PATTERNS["strided"], block_size=48)
    assert worst(found, expected(q, k, v, PATTERNS["strided"])) < TOLERANCE


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, k, v: attention(q, k, v, "causal"), "pattern is a str"),
        (lambda q, k, v: attention(q[0], k, v, All()), r"q has shape \(4, 6, 12\)"),
        (lambda q, k, v: attention(q[:, :3], k, v, All()), "q has 3 heads and k 2"),
        (lambda q, k, v: attention(q, k, v, PerHead((All(), Causal(), Window(1, 1)))), "repeats after 3"),
        (lambda q, k, v: attention(q, k, v, All(), padding=torch.ones(2, 6)), r"padding is torch.float32.*mask != 0"),
        (lambda q, k, v: attention(q, k, v, All(), block_size=0), "block_size = 0"),
    ],
)
def test_errors(call: Callable[..., torch.Tensor], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        call(*operands(6))


@pytest.mark.parametrize("pattern", [Window(3, 2), Window(3, 0) | Strided(4) & Causal()])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"),
    [("k", (1, 2, 9, 8)), ("v", (2, 2, 8, 8)), ("padding", (1, 9)), ("sinks", (1,)), ("distance_bias", (2, 40))],
)
def test_shapes_that_torch_would_broadcast_or_index_elsewhere_are_refused(
    pattern: Pattern, gradient: bool, name: str, shape: tuple[int, ...]
) -> None:
    tensors = {which: torch.zeros(2, 2, 9, 8, requires_grad=gradient) for which in ("q", "k", "v")}
    tensors[name] = torch.zeros(shape, dtype=torch.bool if name == "padding" else torch.float32)
    with pytest.raises(InvalidRequest, match=f"{name} has shape"):
        attention(**tensors, pattern=pattern)
