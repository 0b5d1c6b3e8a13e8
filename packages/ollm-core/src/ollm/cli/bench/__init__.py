"""`ollm bench`: commands that measure ollm on this machine. They only read and check arguments; the work is in
`ollm.bench`, imported when a command runs."""

from __future__ import annotations

import typer

from ollm.cli.bench.kv import kv
from ollm.cli.bench.weights import weights

bench = typer.Typer(help="Measure ollm on this machine.", no_args_is_help=True)


@bench.callback()
def _bench() -> None:
    """Measure ollm on this machine."""


bench.command()(kv)
bench.command()(weights)
