"""The command `ollm`. Data goes to stdout, everything else to stderr. Importing it imports no torch."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ollm import __version__
from ollm.cli.bench import bench
from ollm.cli.doctor import doctor
from ollm.cli.plugins import plugins
from ollm.errors import OllmError

app = typer.Typer(
    name="ollm",
    help="Run Hugging Face language models whose context or weights do not fit in memory.",
    no_args_is_help=True,
    add_completion=False,
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


app.command()(plugins)
app.command()(doctor)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point: an error that ollm raised on purpose is one line on stderr and exit code 1."""
    try:
        app()
    except OllmError as error:
        print(f"ollm: {error}", file=sys.stderr)
        sys.exit(1)
