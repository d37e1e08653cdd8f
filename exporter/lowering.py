"""The lowering ladder: standard op, contrib op, longspan kernel, function body, with the reason for every refusal."""

from __future__ import annotations

import dataclasses

from .sites.record import AttentionSite, Rung


def lower(site: AttentionSite) -> AttentionSite:
    """Choose how `site` runs in ONNX Runtime and record why each rung above was refused.

    The kernel and the function body travel together: a session with the longspan library runs the kernel, one without
    runs the body, so both rungs are chosen.
    """
    ladder = (
        Rung("standard op", False, site.kind.standard_refusal(site)),
        Rung("contrib op", False, site.kind.contrib_refusal(site)),
        Rung("longspan kernel", True, "runs wherever the longspan library is registered"),
        Rung("function body", True, f"runs where no kernel is registered: standard ONNX, {site.kind.growth}"),
    )
    return dataclasses.replace(site, ladder=ladder)
