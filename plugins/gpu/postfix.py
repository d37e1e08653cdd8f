"""Size expressions in postfix, as kernel packs hold them: tokens separated by a space, evaluated with a stack.

``cdiv(S_q, 128) * H_kv`` is ``S_q 128 cdiv H_kv *``. A launcher needs no parser for it and no recursion. Arithmetic is
int64 and an overflow is an error, so that every program that evaluates an expression finds the same value.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Set

from .expressions import INTEGERS, SYMBOLS, InvalidExpression, names

OPERATORS: dict[str, Callable[[int, int], int]] = {**INTEGERS.operators, **INTEGERS.functions}
"""Every operator takes two values, the left one from below the right."""

MAX_TOKENS = 512
MAX_STACK = 32
LARGEST_NUMBER = 2**62 - 1
"""Bounds that let a launcher work with arrays of fixed size."""

_DIVISIONS = ("//", "%", "cdiv")
_NUMBER = re.compile(r"0|[1-9][0-9]*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def to_postfix(expression: str) -> str:
    """Translate an expression of `longspan.plugins.gpu.expressions`.

    Raises:
        InvalidExpression: it does not follow the grammar, or is beyond the bounds above.
    """
    names(expression)  # checks the grammar
    tokens: list[str] = []
    _append(ast.parse(expression, mode="eval").body, tokens)
    text = " ".join(tokens)
    check(text, names(expression))
    return text


def _append(node: ast.expr, tokens: list[str]) -> None:
    if isinstance(node, ast.Constant):
        tokens.append(str(node.value))
    elif isinstance(node, ast.Name):
        tokens.append(node.id)
    elif isinstance(node, ast.UnaryOp):
        tokens.append("0")
        _append(node.operand, tokens)
        tokens.append("-")
    elif isinstance(node, ast.BinOp):
        _append(node.left, tokens)
        _append(node.right, tokens)
        tokens.append(SYMBOLS[type(node.op)])
    else:
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        _append(node.args[0], tokens)
        for argument in node.args[1:]:
            _append(argument, tokens)
            tokens.append(node.func.id)


def check(text: str, known: Set[str]) -> None:
    """Refuse what could not be evaluated, whatever the sizes are.

    Args:
        text: Postfix expression.
        known: Names of the sizes that it may read.

    Raises:
        InvalidExpression: a token is none, a name is unknown, operands are missing or left over, or a bound is passed.
    """
    tokens = text.split(" ")
    if len(tokens) > MAX_TOKENS:
        raise InvalidExpression(f"an expression of {len(tokens)} tokens; allowed: up to {MAX_TOKENS}")
    depth = 0
    for token in tokens:
        if token in OPERATORS:
            depth -= 1
            if depth < 1:
                raise InvalidExpression(f"{text!r}: {token} lacks an operand")
            continue
        if _NUMBER.fullmatch(token):
            if len(token) > 19 or int(token) > LARGEST_NUMBER:
                raise InvalidExpression(f"{text!r}: {token[:30]} is too large; allowed: up to {LARGEST_NUMBER}")
        elif not _NAME.fullmatch(token):
            raise InvalidExpression(f"{text!r}: {token!r} is no number, name or operator")
        elif token not in known:
            raise InvalidExpression(f"{text!r} needs {token}; known are {', '.join(sorted(known))}")
        depth += 1
        if depth > MAX_STACK:
            raise InvalidExpression(f"{text!r} needs more than {MAX_STACK} values at once")
    if depth != 1:
        raise InvalidExpression(f"{text!r} leaves {depth} values, not one")


def evaluate_postfix(text: str, sizes: Mapping[str, int]) -> int:
    """The value of a postfix expression.

    Raises:
        InvalidExpression: it is malformed, divides by something below 1 or something below 0, or overflows int64.
    """
    check(text, sizes.keys())
    stack: list[int] = []
    for token in text.split(" "):
        if token in OPERATORS:
            right, left = stack.pop(), stack.pop()
            if token in _DIVISIONS and (left < 0 or right < 1):
                raise InvalidExpression(f"{text!r}: {left} {token} {right}; allowed: at least 0, by at least 1")
            stack.append(OPERATORS[token](left, right))
        else:
            stack.append(sizes[token] if token in sizes else int(token))
        if not -(2**63) <= stack[-1] < 2**63:
            raise InvalidExpression(f"{text!r} overflows")
    return stack[0]
