"""The lowering ladder: standard op, contrib op, longspan kernel, function body, with the reason for every refusal."""

from __future__ import annotations

import dataclasses

from .sites import AttentionSite, Rung


def lower(site: AttentionSite) -> AttentionSite:
    """Choose how `site` runs in ONNX Runtime and record why each rung above was refused.

    The kernel and the function body travel together: a session with the longspan library runs the kernel, one without
    runs the body, so both rungs are chosen.
    """
    ladder = (
        Rung("standard op", False, _standard_refusal(site)),
        Rung("contrib op", False, _contrib_refusal(site)),
        Rung("longspan kernel", True, "runs wherever the longspan library is registered"),
        Rung("function body", True, "runs where no kernel is registered: standard ONNX, linear in the length"),
    )
    return dataclasses.replace(site, ladder=ladder)


def _standard_refusal(site: AttentionSite) -> str:
    beyond = [name for name in site.inputs if name not in ("Q", "K", "V", "attn_mask", "nonpad_kv_seqlen")]
    if beyond:
        return f"ONNX Attention has no {', '.join(beyond)}"
    if max(site.attributes.get("dilation", [1])) > 1:
        return "ONNX Attention has no dilation"
    return "Attention-25's windows are rejected by ONNX Runtime 1.31; Attention-24 needs an S x S mask instead"


def _contrib_refusal(site: AttentionSite) -> str:
    if not site.attributes.get("is_causal", 0):
        return "GroupQueryAttention is causal only; LongformerAttention runs on CUDA only, with its weights inside"
    return "GroupQueryAttention's CPU kernel scores the keys left of the window as well"
