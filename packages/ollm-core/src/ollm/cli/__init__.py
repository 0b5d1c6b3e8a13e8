"""The command `ollm`. Data goes to stdout, everything else to stderr. Importing it imports no torch and asks no plugin.

Core's own commands and those of plugins are imported when they are run: see `ollm.cli.commands`.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ollm import __version__
from ollm.cli.commands import Commands
from ollm.errors import OllmError

app = typer.Typer(
    name="ollm",
    cls=Commands,
    help="Run Hugging Face language models whose context or weights do not fit in memory.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},  # those of all commands, too
    add_completion=False,
    rich_markup_mode=None,  # help in plain text: rich's boxes take 0.15 s to import
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ollm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run Hugging Face language models whose context or weights do not fit in memory."""


def main() -> None:
    """Entry point: an error that ollm raised on purpose is one line on stderr and exit code 1."""
    try:
        app()
    except OllmError as error:
        print(f"ollm: {error}", file=sys.stderr)
        sys.exit(1)
