"""What of an error has to be kept so that it can be judged later under any tolerance.

A tolerance ``|error| <= atol + rtol * |reference|`` holds for every element when the largest
``|error| - rtol * |reference|`` is at most `atol`. That is a linear function of the points (|reference|, |error|), so
its maximum lies on a corner of their convex hull (the support function of a set is that of its hull; Rockafellar,
1970, "Convex Analysis", section 13), and as rtol is never negative, on the part of the hull that looks up and to the
left. Millions of points leave a few dozen corners, and these answer for every tolerance at once, without a rerun.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Hull = tuple[tuple[float, float], ...]
"""Corners (|reference|, |error|), both strictly ascending; empty where nothing was compared."""


def upper_hull(reference: npt.NDArray[Any], error: npt.NDArray[Any]) -> Hull:
    """Corners of the hull that can hold the maximum of ``error - rtol * reference`` for some ``rtol >= 0``.

    Quickhull (Barber et al. 1996) from the left end to the top: the point farthest above a chord is a corner, and only
    the points above a chord are looked at again, so the time is linear in practice.

    Args:
        reference: 1-D, float64, 0 or more, finite.
        error: The same shape, float64, 0 or more, finite.
    """
    if not reference.size:
        return ()
    # Least reference, and of those the largest error; largest error, and of those the least reference.
    left = np.flatnonzero(reference == reference.min())
    left_end = int(left[np.argmax(error[left])])
    top = np.flatnonzero(error == error.max())
    top_end = int(top[np.argmin(reference[top])])
    first = (float(reference[left_end]), float(error[left_end]))
    last = (float(reference[top_end]), float(error[top_end]))
    if first[1] >= last[1]:
        return (first,)
    corners = [last]
    # Chords whose points are still to be looked at, the rightmost first; all points between lie above the chord.
    stack = [(first, last, reference, error)]
    while stack:
        begin, end, x, y = stack.pop()
        # Both ways are fractions of the chord: a product of two large differences would overflow.
        above = (y - begin[1]) / (end[1] - begin[1]) - (x - begin[0]) / (end[0] - begin[0])
        # Without the bound on x, a point of the chord itself could return by a rounding error, again and again.
        inside = (above > 0) & (x > begin[0]) & (x < end[0])
        if not inside.any():
            corners.append(begin)
            continue
        x, y, above = x[inside], y[inside], above[inside]
        farthest = int(np.argmax(above))
        corner = (float(x[farthest]), float(y[farthest]))
        stack.append((begin, corner, x, y))
        stack.append((corner, end, x, y))
    return tuple(reversed(corners))


def excess(hull: Hull, rtol: float) -> float:
    """Smallest absolute tolerance that passes together with `rtol`; 0 where nothing was compared."""
    return max(0.0, max((error - rtol * reference for reference, error in hull), default=0.0))


def smallest_rtol(hull: Hull) -> float:
    """Smallest relative tolerance that passes without an absolute one; infinite where a zero came out as another."""
    return max((error / reference if reference else math.inf for reference, error in hull if error), default=0.0)


def smallest_common(hull: Hull) -> float:
    """Smallest tolerance that passes as the absolute and the relative one at once."""
    return max((error / (1.0 + reference) for reference, error in hull), default=0.0)


def merge(hulls: Sequence[Hull]) -> Hull:
    """The hull of several hulls together."""
    points = np.array([point for hull in hulls for point in hull], dtype=np.float64).reshape(-1, 2)
    return upper_hull(points[:, 0], points[:, 1])
