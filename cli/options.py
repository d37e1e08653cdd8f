"""Options that several commands share, and the records they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..exporter.conversion import DEFAULT_ALPHA, Conversion

if TYPE_CHECKING:
    from ..exporter import SourceRequest

_Command = TypeVar("_Command", bound=Callable[..., Any])

_SOURCE = (
    click.option("--random-weights", is_flag=True, help="Same architecture, small, with random weights."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of random weights and example inputs."),
    click.option("--inputs", default="", metavar="NAME,…", help="Forward inputs to trace (Hugging Face models)."),
    click.option("--allow-pickle", is_flag=True, help="Read pickled weights, which can run any code."),
    click.option("--trust-remote-code", is_flag=True, help="Let the model's own Python code run."),
)
_CONVERSION = (
    click.option("--window", type=int, metavar="N", help="Turn dense attention into a window of N neighbours (even)."),
    click.option("--global-tokens", type=int, metavar="N", default=0, show_default=True, help="First tokens, global."),
    click.option("--max-positions", type=int, metavar="N", help="Extend trained absolute positions to N tokens."),
    click.option("--alpha", type=float, default=DEFAULT_ALPHA, show_default=True, help="Extension weight."),
)


def source_options(command: _Command) -> _Command:
    """Add the options of `request_from`."""
    return _add(_SOURCE, command)


def conversion_options(command: _Command) -> _Command:
    """Add the options of `conversion_from`."""
    return _add(_CONVERSION, command)


def request_from(model: str, options: Mapping[str, Any]) -> SourceRequest:
    """The model request that the options of `source_options` describe."""
    from ..exporter import SourceRequest

    return SourceRequest(
        location=model,
        random_weights=options["random_weights"],
        seed=options["seed"],
        allow_pickle=options["allow_pickle"],
        trust_remote_code=options["trust_remote_code"],
        inputs=tuple(name for name in options["inputs"].split(",") if name),
    )


def conversion_from(options: Mapping[str, Any]) -> Conversion:
    """The conversion that the options of `conversion_options` describe.

    Raises:
        InvalidRequest: a value is out of range.
    """
    return Conversion(**{name: options[name] for name in ("window", "global_tokens", "max_positions", "alpha")})


def _add(options: tuple[Callable[[_Command], _Command], ...], command: _Command) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command
