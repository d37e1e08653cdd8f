"""A few corners answer for every tolerance."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from longspan.exporter.parity.hull import excess, merge, smallest_common, smallest_rtol, upper_hull

CASES = {
    "errors that grow with the value": lambda g, n: (np.abs(g.standard_normal(n)), np.abs(g.standard_normal(n)) * 1e-6),
    "relative errors": lambda g, n: ((x := np.abs(g.standard_cauchy(n))), x * g.uniform(0, 1e-6, n)),
    "one value": lambda g, n: (np.full(n, 2.0), g.uniform(0, 1, n)),
    "one error": lambda g, n: (g.uniform(0, 1, n), np.full(n, 0.5)),
    "all zero": lambda g, n: (np.zeros(n), np.zeros(n)),
    "on a line": lambda g, n: ((x := g.integers(0, 9, n).astype(float)), 0.1 * x + 0.3),
    "a grid with many ties": lambda g, n: (g.integers(0, 5, n).astype(float), g.integers(0, 5, n).astype(float)),
    "from tiny to huge": lambda g, n: (10.0 ** g.uniform(-30, 30, n), 10.0 ** g.uniform(-30, 30, n)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [1, 2, 3, 50, 100_000])
def test_the_corners_give_what_all_elements_give(name: str, count: int) -> None:
    reference, error = CASES[name](np.random.default_rng(count), count)
    hull = upper_hull(reference, error)
    assert len(hull) < 60
    for rtol in (0.0, *10.0 ** np.arange(-40.0, 12.0, 0.7)):
        every = max(0.0, float((error - rtol * reference).max()))
        # The same subtraction on the same numbers; two elements may tie but for a rounding.
        assert excess(hull, rtol) == pytest.approx(every, rel=1e-12, abs=1e-15 * float(error.max()))


def test_the_corners_ascend_and_bend_down() -> None:
    generator = np.random.default_rng(0)
    hull = np.array(upper_hull(generator.uniform(0, 1, 5000), generator.uniform(0, 1, 5000)))
    slopes = np.diff(hull[:, 1]) / np.diff(hull[:, 0])
    assert len(hull) > 3 and (np.diff(hull, axis=0) > 0).all() and (np.diff(slopes) < 0).all()


def test_the_smallest_tolerances_pass_and_smaller_ones_do_not() -> None:
    generator = np.random.default_rng(1)
    reference, error = generator.uniform(0.01, 5, 4000), generator.uniform(0, 1e-3, 4000)
    hull = upper_hull(reference, error)

    def passes(atol: float, rtol: float) -> bool:
        return bool((error <= atol + rtol * reference).all())

    atol, rtol, both = excess(hull, 0), smallest_rtol(hull), smallest_common(hull)
    more, less = 1 + 1e-12, 1 - 1e-12
    assert passes(atol, 0) and not passes(atol * less, 0)
    assert passes(0, rtol * more) and not passes(0, rtol * less)
    assert passes(both * more, both * more) and not passes(both * less, both * less)


def test_a_zero_that_is_off_has_no_relative_tolerance() -> None:
    assert smallest_rtol(upper_hull(np.array([0.0, 1.0]), np.array([1e-9, 0.0]))) == math.inf
    assert smallest_rtol(upper_hull(np.array([0.0, 1.0]), np.array([0.0, 1e-3]))) == 1e-3


def test_nothing_compared() -> None:
    hull = upper_hull(np.zeros(0), np.zeros(0))
    assert hull == () and excess(hull, 0.1) == smallest_rtol(hull) == smallest_common(hull) == 0


def test_hulls_of_parts_make_the_hull_of_the_whole() -> None:
    generator = np.random.default_rng(2)
    reference, error = generator.uniform(0, 1, 900), generator.uniform(0, 1, 900)
    parts = [upper_hull(reference[at : at + 300], error[at : at + 300]) for at in (0, 300, 600)]
    assert merge([*parts, ()]) == upper_hull(reference, error)
    assert merge([]) == ()


def test_extreme_values_do_not_overflow() -> None:
    largest = sys.float_info.max
    hull = upper_hull(np.array([0.0, 1e299, 1e300]), np.array([1e290, 9e299, 1e300]))
    assert hull == ((0.0, 1e290), (1e299, 9e299), (1e300, 1e300))
    assert upper_hull(np.array([1.0]), np.array([largest])) == ((1.0, largest),)
