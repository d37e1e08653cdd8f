"""How ONNX Runtime's profile names the nodes of a function that it has expanded; imports nothing heavy, for trials."""

from __future__ import annotations

import re
from collections.abc import Iterable

INLINED = "_inlfunc_"
"""What the names of such nodes begin with; the function's name follows, and a number from its second expansion on."""


def expansions(events: Iterable[str], function: str) -> int:
    """How many calls of a function were expanded and ran.

    Args:
        events: Names of the node events of a profile.
        function: Name of the function.
    """
    pattern = re.compile(rf"{INLINED}{re.escape(function)}_(token_\d+_)?")
    return len({found.group(1) for name in events if (found := pattern.match(name))})
