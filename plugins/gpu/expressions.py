"""Integer expressions over the sizes of an execution, in which grids, buffers and parameters are written.

They are data: a kernel pack carries them as text, and the C++ launcher evaluates the same text that `evaluate` does.

    expression := term (('+' | '-') term)*
    term       := factor (('*' | '//' | '%') factor)*
    factor     := NUMBER | NAME | FUNCTION '(' expression (',' expression)* ')' | '(' expression ')' | '-' factor

Functions: ``cdiv(a, b)`` rounds the quotient up, ``min(a, b, …)`` and ``max(a, b, …)`` of 2 to 16, and the comparisons
``le(a, b)`` (a at most b) and ``both(a, b)`` (neither is 0), which are 1 or 0. ``//`` and ``%`` are for operands of 0
or more. Arithmetic is int64.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import PluginError


class InvalidExpression(PluginError, ValueError):
    """A size expression does not follow the grammar, or names a size that is not there."""


T = TypeVar("T")


@dataclass(frozen=True)
class Arithmetic(Generic[T]):
    """What an expression is computed in: whole numbers, or something that stands for them.

    Attributes:
        number: The value of a literal.
        operators: By their symbols in Python: ``+ - * // %``.
        functions: By name; see the module's docstring.
    """

    number: Callable[[int], T]
    operators: Mapping[str, Callable[[T, T], T]]
    functions: Mapping[str, Callable[..., T]]


INTEGERS: Arithmetic[int] = Arithmetic(
    int,
    {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "//": lambda a, b: a // b,
        "%": lambda a, b: a % b,
    },
    {
        "cdiv": lambda a, b: -(-a // b),
        "min": min,
        "max": max,
        "le": lambda a, b: int(a <= b),
        "both": lambda a, b: int(a != 0 and b != 0),
    },
)
_ARITIES = {"cdiv": (2, 2), "min": (2, 16), "max": (2, 16), "le": (2, 2), "both": (2, 2)}
SYMBOLS: dict[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%",
}  # fmt: skip
"""How the operators of Python's grammar are written."""


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """The value of `expression` for the given sizes.

    Raises:
        InvalidExpression: the text is not an expression, a name is unknown, or a divisor is 0.
    """
    return interpret(expression, sizes, INTEGERS)


def interpret(expression: str, sizes: Mapping[str, T], arithmetic: Arithmetic[T]) -> T:
    """The value of `expression` in an arithmetic of any kind.

    Raises:
        InvalidExpression: the text is not an expression, a name is unknown, or a divisor is 0.
    """
    return _value(_parse(expression), expression, sizes, arithmetic)


def names(expression: str) -> frozenset[str]:
    """The sizes that `expression` reads.

    Raises:
        InvalidExpression: the text is not an expression.
    """
    tree = _parse(expression)
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in functions)


def _parse(expression: str) -> ast.expr:
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise InvalidExpression(f"{expression!r} is not a size expression: {error.msg}") from error
    for node in ast.walk(tree):
        _check_node(node, expression)
    return tree


def _check_node(node: ast.AST, expression: str) -> None:
    if isinstance(node, ast.Constant):
        good = type(node.value) is int
    elif isinstance(node, ast.BinOp):
        good = type(node.op) in SYMBOLS
    elif isinstance(node, ast.UnaryOp):
        good = isinstance(node.op, ast.USub)
    elif isinstance(node, ast.Call):
        arity = _ARITIES.get(node.func.id) if isinstance(node.func, ast.Name) else None
        good = arity is not None and not node.keywords and arity[0] <= len(node.args) <= arity[1]
    else:
        good = isinstance(node, (ast.Name, ast.expr_context, ast.operator, ast.unaryop))
    if not good:
        raise InvalidExpression(
            f"{expression!r} holds a {type(node).__name__}: a size expression has whole numbers, names of sizes, "
            f"+ - * // % and {', '.join(_ARITIES)}"
        )


def _value(node: ast.expr, expression: str, sizes: Mapping[str, T], arithmetic: Arithmetic[T]) -> T:
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int)
        return arithmetic.number(node.value)
    if isinstance(node, ast.Name):
        if node.id not in sizes:
            raise InvalidExpression(f"{expression!r} needs {node.id}; known are {', '.join(sorted(sizes))}")
        return sizes[node.id]
    try:
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Name)
            function = arithmetic.functions[node.func.id]
            return function(*(_value(argument, expression, sizes, arithmetic) for argument in node.args))
        if isinstance(node, ast.UnaryOp):
            zero = arithmetic.number(0)
            return arithmetic.operators["-"](zero, _value(node.operand, expression, sizes, arithmetic))
        assert isinstance(node, ast.BinOp)
        left = _value(node.left, expression, sizes, arithmetic)
        right = _value(node.right, expression, sizes, arithmetic)
        return arithmetic.operators[SYMBOLS[type(node.op)]](left, right)
    except ZeroDivisionError as error:
        raise InvalidExpression(f"{expression!r} divides by zero") from error
