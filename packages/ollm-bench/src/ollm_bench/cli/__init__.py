"""The typer app of `ollm bench`. Its commands only read and check arguments; the work is done by `ollm_bench`, imported
when a command runs."""

from __future__ import annotations

import typer

from ollm_bench.cli.kv import kv
from ollm_bench.cli.weights import weights

app = typer.Typer(
    help="Measure ollm on this machine.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)


@app.callback()
def _bench() -> None:
    """Measure ollm on this machine."""


app.command()(kv)
app.command()(weights)
