"""What a run does now, on stderr: one line that changes on a terminal, a line for each new thing elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

_HOW_FAR = re.compile(r"[0-9]+(%| of [0-9]+)$")
"""A log needs no line for every percent and step."""


@contextmanager
def show_progress(console: Console) -> Iterator[Callable[[str], None]]:
    """A function to call with what is done now."""
    if not console.is_terminal:
        last = ""

        def tell(what: str) -> None:
            nonlocal last
            kind = _HOW_FAR.sub("", what)
            if kind != last:
                console.out(what, highlight=False)
            last = kind

        yield tell
        return
    with console.status("starting") as status:
        yield status.update
