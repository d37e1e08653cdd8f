"""What every command prints with: one console for results, one for progress."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


_WIDTH_OF_LOGS = 120

# What says the same where an encoding lacks the character.
_PLAIN = {"✓": "+", "✗": "x", "–": "-", "×": "x", "…": "...", "²": "^2", "→": "->", "│": "|", "─": "-"}


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: the plain form of what cannot be encoded, or question marks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(character, "?") for character in error.object[error.start : error.end]), error.end


PLAIN = "longspan.plain"
"""Name of an error handler for streams: what an encoding lacks is printed in its plain form."""
codecs.register_error(PLAIN, _plain)


def console() -> Console:
    """Console for results on stdout."""
    from rich.console import Console

    # A log file or a pipe has no width of its own; 80 columns, the usual guess, fold every table.
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_OF_LOGS)


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner with the current stage and the time so far; nothing when stderr is not a terminal.

    Args:
        title: What is being done.

    Yields:
        A function to call with the name of each stage.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    terminal = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(title)
        yield lambda stage: bar.update(task, description=f"{title}: {stage}")
