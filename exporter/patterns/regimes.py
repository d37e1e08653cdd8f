"""Patterns whose rule changes with the length of the text, taken apart into rules that do not."""

from __future__ import annotations

from .base import Pattern
from .lengths import Structure
from .operators import Blocked, PerHead, Shifted, UpTo, _Composite


def limits_of(pattern: Pattern) -> tuple[int, ...]:
    """Lengths in tokens, ascending, beyond each of which another rule holds."""
    inner = {limit for part in pattern.parts for limit in limits_of(part)}
    if isinstance(pattern, UpTo):
        inner.add(pattern.limit)
    elif isinstance(pattern, Blocked):
        inner = {pattern.size * limit for limit in inner}
    elif isinstance(pattern, Shifted):
        inner = {pattern.by + limit for limit in inner}
    return tuple(sorted(inner))


def rule_of(pattern: Pattern, text: int) -> Pattern:
    """The pattern without its `UpTo`: what it is for texts of `text` tokens, said of every length.

    Args:
        pattern: The pattern.
        text: `Lengths.text`.
    """
    if not limits_of(pattern):
        return pattern
    if isinstance(pattern, UpTo):
        return rule_of(pattern.short if text <= pattern.limit else pattern.long, text)
    if isinstance(pattern, Blocked):
        text = -(-text // pattern.size)
    elif isinstance(pattern, Shifted):
        text = max(0, text - pattern.by)
    parts = tuple(rule_of(part, text) for part in pattern.parts)
    if isinstance(pattern, PerHead):
        return PerHead(parts)
    assert isinstance(pattern, _Composite), pattern
    return pattern._with(parts)


def rules_of(pattern: Pattern, limits: tuple[int, ...]) -> tuple[Pattern, ...]:
    """The rule up to each limit, and the one beyond them all.

    Args:
        pattern: The pattern.
        limits: Its `limits_of`, or more than these, ascending.
    """
    return (*(rule_of(pattern, limit) for limit in limits), rule_of(pattern, limits[-1] + 1 if limits else 0))


def common_structure(pattern: Pattern) -> Structure | None:
    """What all rules of a pattern depend on together; None where one of them has no structure."""
    joined: Structure | None = Structure()
    for rule in rules_of(pattern, limits_of(pattern)):
        own = rule.structure
        joined = None if own is None or joined is None else joined.joined(own)
    return joined
