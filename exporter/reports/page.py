"""What every page shares: the template environment, how numbers are written, and the colours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

COLORS = {
    "kernel": "#0072b2",
    "body": "#aa3377",
    "dense": "#00856a",
    "stock": "#d55e00",
    "engine": "#332288",
    "original": "#5d6d00",
}
"""One colour per way of running a model, from the palettes of Okabe and Ito and of Paul Tol, which stay apart for every
kind of colour vision and are dark enough for text. Markers and words carry the same information."""

_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def render(template: str, **values: Any) -> str:
    """Fill a template of this package: one HTML page with its styles and pictures inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "grouped": grouped, "percent": percent}
    return environment.get_template(template).render(**values)


def markup(svg: str) -> Any:
    """Mark text that this package made as HTML, so that a template does not escape it."""
    from markupsafe import Markup

    return Markup(svg)


def number(value: float | None, digits: int = 2) -> str:
    """A measured value in `digits` significant digits, e.g. ``"1.4 × 10⁻⁶"``; ``"–"`` for none or an infinite one."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    power = int(exponent)
    if -3 <= power < 5:
        return f"{value:,.{max(0, digits - 1 - power)}f}"
    return f"{mantissa} × 10{str(power).translate(_SUPERSCRIPT)}"


def grouped(value: float | None) -> str:
    """A whole number with its thousands apart."""
    return "–" if value is None else f"{value:,.0f}"


def percent(value: float | None, digits: int = 0) -> str:
    """A fraction in percent."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:,.{digits}f} %"
