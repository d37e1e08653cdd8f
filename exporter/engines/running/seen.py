"""What runs at the attention sites of an engine, in the words of reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...parity.report import ENGINE
from ..manifest import Engine, EngineManifest
from .inference_worker import plugin_names

KERNEL, FUNCTION_BODY = "kernel", "function body"

_BUILT = {"plugin": KERNEL}
"""What reports call a lowering of `BuiltSite`; the others keep their name."""


def path_name(engine: Engine) -> str:
    """What reports call the path through an engine."""
    return f"{ENGINE}{engine.name}"


def built_as(manifest: EngineManifest) -> dict[str, str]:
    """What each site was built as, by node."""
    return {site.node: _BUILT.get(site.lowering, site.lowering) for site in manifest.sites}


def sites_seen(manifest: EngineManifest, layers: Iterable[Sequence[str]]) -> dict[str, str]:
    """What runs at each site, by node: `KERNEL` where the engine has a plugin layer of the node's name.

    A site that should be such a layer and is not seen as one is said to be `FUNCTION_BODY`; the others are what they
    were built as.

    Args:
        manifest: The engine's.
        layers: See `inference_worker.layers_of`.
    """
    plugins = plugin_names(layers)
    return {
        node: FUNCTION_BODY if lowering == KERNEL and node not in plugins else lowering
        for node, lowering in built_as(manifest).items()
    }


def fallback(manifest: EngineManifest, sites: dict[str, str]) -> str:
    """Why the kernel does not run at every site, with the first reason of the build; empty where it does.

    Args:
        manifest: The engine's.
        sites: What runs, or was built, at each site.
    """
    others = [node for node, ran in sites.items() if ran != KERNEL]
    if not others:
        return ""
    reasons = {site.node: next((rung.reason for rung in site.ladder if not rung.chosen), "") for site in manifest.sites}
    reason = reasons.get(others[0], "")
    kinds = ", ".join(sorted({sites[node] for node in others}))
    why = f" ({reason})" if reason else ""
    return f"{kinds} at {len(others)} of {len(sites)} sites: {', '.join(others)}{why}"
