"""What a run does now, on stderr: one line that changes on a terminal, a line for each new thing elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from ollm.bench.records import Case
from ollm.bench.run import Progress


@contextmanager
def show_progress(total: int, console: Console) -> Iterator[Progress]:
    """A function to call with the index of a case, the case and what it does."""
    if not console.is_terminal:
        last = ""

        def tell(index: int, case: Case, what: str) -> None:
            nonlocal last
            kind = f"{index} {re.sub(r'[0-9]', '', what)}"  # a log needs no line for every percent and step
            if kind != last:
                console.out(_line(index, total, case, what), highlight=False)
            last = kind

        yield tell
        return
    with console.status("starting") as status:
        yield lambda index, case, what: status.update(_line(index, total, case, what))


def _line(index: int, total: int, case: Case, what: str) -> str:
    return f"case {index + 1} of {total}: {case.title}: {what}"
