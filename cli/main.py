"""The command group; each command is a module of its own, imported when it is called."""

from __future__ import annotations

import importlib
import io
import sys
import traceback
from typing import Any

import click

from .errors import INTERRUPTED, explain
from .terminal import PLAIN

_COMMANDS = {
    "export": "Trace a model, replace its attention, write a bundle.",
    "check": "Prove that a bundle computes what its model does.",
    "bench": "Time a bundle against the stock export and dense attention.",
    "package": "Write engines of a bundle as a model repository for an inference server.",
    "inspect": "List the attention sites of a model or a bundle.",
    "build": "Build an engine for TensorRT, TensorRT-RTX or ONNX Runtime.",
    "kernels": "Compile GPU kernels ahead of time, and look into kernel packs.",
    "doctor": "Say what this machine has, what it lacks, and what that costs.",
}


class _LazyGroup(click.Group):
    """Lists commands without importing them, so that --help answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f".{name}", __package__).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="longspan")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Export long-context models with sparse attention to ONNX, prove them equal, and time them.

    Exit codes: 0 pass, 1 a threshold failed, 2 usage, 3 export or build failed, or a bug in longspan, 4 the environment
    lacks something, 5 the fallback ran where a kernel was required, 130 interrupted.
    """
    ctx.obj = {"debug": debug}


def main() -> None:
    """Run the command line and exit with one of the codes in `errors`."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    # --debug may stand anywhere, also behind the command that failed.
    arguments = (["--debug"] if debug else []) + [argument for argument in arguments if argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PLAIN)
    sys.exit(run(arguments, debug))


def run(arguments: list[str], debug: bool = False) -> int:
    """Run `arguments` and return the exit code; an error becomes one line on stderr, with `debug` after a traceback."""
    try:
        result: Any = cli.main(arguments, prog_name="longspan", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("longspan: interrupted", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        advice = f"; next step: {context.command_path} --help" if context is not None else ""
        click.echo(f"longspan: error: {_one_line(error.format_message()).rstrip('.')}{advice}", err=True)
        return error.exit_code
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, text = explain(error)
        click.echo(f"longspan: {_one_line(text)}", err=True)
        return code
    return result if isinstance(result, int) else 0


def _one_line(text: str) -> str:
    return " ".join(text.split())
