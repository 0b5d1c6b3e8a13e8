"""What people see without asking for it: log lines where no logging is set up, and how far a prompt is on a terminal.

Knows when to say something, and where; not what is measured.
"""

from __future__ import annotations

import logging
import sys

import attrs
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ollm.kv.state import PrefillProgress
from ollm.units import format_size

_SECONDS = 1.0
"""What takes less needs no line."""


def show_log() -> None:
    """Let what is logged to `ollm` be seen on stderr, unless the program has set logging up: then it is the program's
    business."""
    logger = logging.getLogger("ollm")
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


@attrs.define
class PrefillLine:
    """A line on stderr that says how far a prompt is; gone once it is read. Nothing where stderr is no terminal."""

    _line: Progress | None = None
    _done: float = 0.0

    def __call__(self, progress: PrefillProgress) -> None:
        """As the `progress` callback of a cache."""
        if progress.layers_done < self._done:  # another prompt, after one that failed
            self._end()
        self._done = progress.layers_done
        if self._line is None:
            if progress.seconds + progress.eta_seconds < _SECONDS or not sys.stderr.isatty():
                return
            self._line = _begin(progress)
        said = f"{format_size(progress.saved_bytes)} stored, {progress.eta_seconds:.0f} s left"
        self._line.update(self._line.task_ids[0], completed=progress.layers_done, said=said, refresh=True)
        if progress.layers_done >= progress.layers:
            self._end()

    def _end(self) -> None:
        self._done = 0.0
        if self._line is not None:
            self._line.stop()
            self._line = None


def _begin(progress: PrefillProgress) -> Progress:
    line = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), console=Console(stderr=True),
        transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip
    line.add_task(f"reading {progress.tokens:,} tokens", total=progress.layers, said="")
    line.start()
    return line
