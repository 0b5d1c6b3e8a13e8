"""Ctrl-C at every line: what an action runs of ollm is interrupted at one line after the other.

A signal is not met where the C implementation of a lock is left, so that no interrupt comes there either.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import ollm
from ollm.testing.case import depth

_OURS = (str(Path(ollm.__file__).parent), *(str(path) for path in Path(ollm.__file__).parents[3].glob("ollm-*/src")))
_OTHERS = {contextlib.__file__}
PLACES = 40
"""About how many of the lines of an action are met; see `depth`."""


def interrupted(action: Callable[[], object], at: int) -> str:
    """Run an action, and raise `KeyboardInterrupt` in this thread before line number `at` of what it runs; which line
    that is, and nothing if it did not come so far."""
    return _run(action, at)[1]


def lines_of(action: Callable[[], object]) -> int:
    """How many lines it runs."""
    return _run(action, None)[0]


def places(count: int) -> Iterator[int]:
    """About so many of these lines as `depth` says, the first and the last among them."""
    step = max(count // depth(PLACES), 1)
    yield from range(0, count - 1, step)
    yield count - 1


def _run(action: Callable[[], object], at: int | None) -> tuple[int, str]:
    met, where = 0, ""

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        return on_line if name.startswith(_OURS) or name in _OTHERS else None

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal met, where
        if event == "line" and frame.f_lasti not in _exits(frame.f_code):
            met += 1
            if at is not None and met > at and not where and not _ignored(frame):
                sys.settrace(None)
                where = f"line {at}: {frame.f_code.co_qualname} {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt(where)
        return on_line

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        action()
    except KeyboardInterrupt:
        if not where:
            raise
    finally:
        sys.settrace(before)
    return met, where


def _ignored(frame: FrameType | None) -> bool:
    """Whether Python does not raise what is raised here: while it collects garbage."""
    while frame is not None:
        collected = frame.f_code is weakref.finalize.__call__.__code__ and frame.f_locals.get("_") is not None
        if collected or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


@functools.cache
def _exits(code: CodeType) -> frozenset[int]:
    """Where a `with` block of this code ends: its line comes once more."""
    found, steps = set(), list(dis.get_instructions(code))
    for index, step in enumerate(steps):
        nones = steps[index : index + 3]
        if len(nones) == 3 and all(one.opname == "LOAD_CONST" and one.argval is None for one in nones):
            found.add(step.offset)
            if index and steps[index - 1].opname == "SWAP":
                found.add(steps[index - 1].offset)
    return frozenset(found)
