"""Patterns as JSON, and back; what is read is checked, never executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from ..errors import InvalidRequest
from .base import Pattern
from .tokens import Tokens

_DEEPEST = 64
"""Levels of patterns within patterns that are read."""


def to_json(pattern: Pattern) -> str:
    """One line of JSON from which `from_json` makes an equal pattern."""
    return json.dumps(to_data(pattern), ensure_ascii=False)


def from_json(text: str) -> Pattern:
    """Read a pattern.

    Raises:
        InvalidRequest: the text is no pattern; the message names the part that is not.
    """
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidRequest(f"a pattern is not JSON: {error}") from None
    return from_data(data)


def to_data(pattern: Pattern) -> dict[str, Any]:
    """The pattern as plain JSON values: its ``kind`` and its fields; fields at their default are left out."""
    data: dict[str, Any] = {"kind": type(pattern).__name__}
    return {**data, **_fields(pattern)}


def from_data(data: object) -> Pattern:
    """Make a pattern of what `to_data` returned.

    Raises:
        InvalidRequest: the value is no pattern.
    """
    return _pattern(data, 0)


def _fields(record: Any) -> dict[str, Any]:
    values = ((field, getattr(record, field.name)) for field in fields(record))
    return {field.name: _plain(value) for field, value in values if value != field.default}


def _plain(value: Any) -> Any:
    if isinstance(value, Pattern):
        return to_data(value)
    if isinstance(value, Tokens):
        return {"kind": "Tokens", **_fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def _pattern(data: object, depth: int) -> Pattern:
    found = _value(data, depth)
    if not isinstance(found, Pattern):
        raise InvalidRequest(f'{_shown(data)} is no pattern: must be an object with a kind, e.g. {{"kind": "Causal"}}')
    return found


def _value(data: object, depth: int) -> Any:
    if depth > _DEEPEST:
        raise InvalidRequest(f"a pattern is nested more than {_DEEPEST} levels deep")
    if isinstance(data, list):
        return tuple(_value(item, depth + 1) for item in data)
    if not isinstance(data, Mapping):
        return data
    kinds = {"Tokens": Tokens, **{name: kind for name, kind in Pattern.kinds.items() if is_dataclass(kind)}}
    values = {name: _value(value, depth + 1) for name, value in data.items() if name != "kind"}
    kind: Any = kinds.get(str(data.get("kind")))
    if kind is None:
        raise InvalidRequest(f"{_shown(data)}: kind must be one of {', '.join(sorted(kinds))}")
    try:
        return kind(**values)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{_shown(data)} is no {data['kind']}: {error}") from None


def _shown(data: object) -> str:
    text = json.dumps(data, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:79] + "…"
