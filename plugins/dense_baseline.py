"""What a site costs without its sparsity: the dense attention that `longspan bench` compares with."""

from __future__ import annotations

import onnx_ir as ir

from .attention.function_body import AttentionSignature, function_builder
from .errors import InvalidOperands
from .functions import signature_of
from .onnx_builder import Expr, FunctionBuilder
from .registry import operator


def dense_function_body(node: ir.Node, opset: int = 18) -> ir.Function:
    """Build a function that computes a site of any operator as dense attention over all keys that are not padding.

    It takes the place of the site's own function, under the same overload. Scale, head layout, causality and padding
    are the site's. What makes the site sparse is left out, and so are biases, sinks, spans, positions and softcap, so
    its *result* is another: a mask of S_q x S_k would only make it slower, and what it costs is all that it is for.

    It is the fastest form found in ONNX Runtime 1.31's CPU provider. Best of 6 runs, in ms, at B = 1, S = 4096, H = 12,
    D = 64 in float32 on two AVX2 cores, without and with a padding mask: com.microsoft::MultiHeadAttention (a flash
    attention, linear memory) 315 and 377; MatMul, Softmax, MatMul 357 and 463; Attention (opset 23) 385. Being a
    contributed operator, it runs in ONNX Runtime alone.

    Args:
        node: The site.
        opset: Version of the standard domain, 18 or later.

    Raises:
        InvalidOperands: the site contradicts its operator's definition, or produces an lse, which the dense operator
            does not.
    """
    signature = signature_of(node)
    if signature.lse:
        raise InvalidOperands(
            "the dense baseline has no lse output; allowed: sites without lse; next step: compare without this baseline"
        )
    definition = operator(node.op_type)
    b = function_builder(definition, signature, opset)
    q, k, v = (b.cast(b.input(name), ir.DataType.FLOAT) for name in "QKV")
    batch = b.dim(q, 0)
    padding = _padding(b, signature, b.dim(k, 2 if signature.layout == "bhsd" else 1))
    more = {"scale": b.reference("scale")} if signature.scale else {}
    if signature.layout == "bhsd":
        # Heads become batch entries: no Transpose, and the number of heads need not be known.
        heads, group = b.dim(q, 1), b.dim(q, 1) // b.dim(k, 1)
        queries = b.reshape(q, [-1, b.dim(q, 2), b.dim(q, 3)])
        keys, values = (_repeat(b, x, group, 2) for x in (k, v))
        keys, values = (b.reshape(x, [-1, b.dim(k, 2), b.dim(x, 4)]) for x in (keys, values))
        if padding is not None:
            padding = b.reshape(b.expand(b.op("Unsqueeze", padding, [1]), [1, heads, 1]), [-1, b.dim(k, 2)])
        count: ir.Attr | int = 1
    else:
        kv_heads = b.attribute("kv_num_heads")
        group = b.attribute("q_num_heads") // kv_heads
        queries = q
        keys, values = (
            b.reshape(_repeat(b, b.reshape(x, [0, 0, kv_heads, -1]), group, 3), [batch, b.dim(k, 1), -1])
            for x in (k, v)
        )
        count = b.reference("q_num_heads")
    y = b.op(
        "MultiHeadAttention",
        *(queries, keys, values, None, padding),
        domain="com.microsoft",
        num_heads=count,
        unidirectional=b.reference("is_causal"),
        **more,
    )
    if signature.layout == "bhsd":
        y = b.reshape(y, [batch, b.dim(q, 1), b.dim(q, 2), -1])
    y = b.op("CastLike", y, b.input("Q"))
    return b.build(definition.domain, definition.name, signature.overload, {"Y": y})


def _repeat(b: FunctionBuilder, x: Expr, group: Expr, axis: int) -> Expr:
    """Insert an axis of size `group` along which every key head stands for its query heads."""
    sizes: list[Expr | int] = [1] * 5
    sizes[axis] = group
    return b.expand(b.op("Unsqueeze", x, [axis]), sizes)


def _padding(b: FunctionBuilder, signature: AttentionSignature, seq_k: Expr) -> Expr | None:
    """Int32 (B, S_k), 1 = attend; None when nothing is padded."""
    seen = b.input("attn_mask") if "attn_mask" in signature.optional_inputs else None
    if "nonpad_kv_seqlen" in signature.optional_inputs:
        valid = b.arange(seq_k) < b.op("Unsqueeze", b.input("nonpad_kv_seqlen"), [1])
        seen = valid if seen is None else seen & valid
    return None if seen is None else b.cast(seen, ir.DataType.INT32)
