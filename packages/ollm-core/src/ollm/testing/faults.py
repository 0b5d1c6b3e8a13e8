"""A disk that goes wrong on purpose: operation number `at`, of whatever kind, meets a fault.

`installed` puts it in the place of `ollm.io.shim.disk`. What it knows is how operating systems fail; it knows nothing
of records, folders or stores, so that every store can be tested with it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ollm.io import shim
from ollm.io.shim import Disk

Fault = Callable[[str, tuple[Any, ...]], Any]
"""Takes the name and the arguments of an operation and does what the broken disk does instead."""

OPERATIONS = sorted(name for name in vars(Disk) if not name.startswith("_"))

_MOVES_DATA = {"pread_into", "pwrite"}
_BLOCK = 4096
_disk = Disk()


class FaultyDisk(Disk):
    """Counts the operations, from 0, and lets the one numbered `at` go wrong (with `lasting`, all from there on).

    With `only`, those of these names count, and only those can go wrong. Several threads may use it at once.
    """

    def __init__(
        self, fault: Fault | None = None, at: int = 0, *, lasting: bool = False, only: frozenset[str] | None = None
    ) -> None:
        self.operations: list[str] = []
        self._fault, self._at, self._lasting, self._only = fault, at, lasting, only
        self._lock = threading.Lock()

    def heal(self) -> None:
        """From now on everything works."""
        self._fault = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """It is the disk, for as long as the `with` block."""
        before = shim.disk
        shim.disk = self
        try:
            yield
        finally:
            shim.disk = before

    def _operate(self, name: str, *arguments: Any) -> Any:
        if self._only is not None and name not in self._only:
            return getattr(_disk, name)(*arguments)
        with self._lock:
            index = len(self.operations)
            self.operations.append(name)
        if self._fault and (index == self._at or (self._lasting and index > self._at)):
            return self._fault(name, arguments)
        return getattr(_disk, name)(*arguments)


def _watched(name: str) -> Any:
    def operation(self: FaultyDisk, *arguments: Any) -> Any:
        return self._operate(name, *arguments)

    return operation


for _name in OPERATIONS:
    setattr(FaultyDisk, _name, _watched(_name))


def fails(code: int) -> Fault:
    """The operation does nothing and fails. Only `close` closes all the same, as it does on Linux."""

    def fault(name: str, arguments: tuple[Any, ...]) -> Any:
        if name == "close":
            _disk.close(*arguments)
        raise OSError(code, os.strerror(code))

    return fault


def tears(code: int) -> Fault:
    """A write or read stops in the middle, then fails. Anything else just fails."""

    def fault(name: str, arguments: tuple[Any, ...]) -> Any:
        if name in _MOVES_DATA:
            shortens(name, arguments)
        return fails(code)(name, arguments)

    return fault


def shortens(name: str, arguments: tuple[Any, ...]) -> Any:
    """A write or read moves half of the buffer and says so. Everything else works."""
    if name in _MOVES_DATA:
        fd, data, offset = arguments
        # what is unbuffered moves whole blocks
        half = len(data) // 2 if len(data) < 2 * _BLOCK else len(data) // 2 // _BLOCK * _BLOCK
        arguments = (fd, data[: max(half, 1)], offset)
    return getattr(_disk, name)(*arguments)


def moves_nothing(name: str, arguments: tuple[Any, ...]) -> Any:
    """A write or read moves no byte and reports no error. Everything else works."""
    return 0 if name in _MOVES_DATA else getattr(_disk, name)(*arguments)


def interrupts(error: type[BaseException], *, after: bool) -> Fault:
    """Ctrl-C or exhausted memory: raised in place of the operation, or once it has happened."""

    def fault(name: str, arguments: tuple[Any, ...]) -> Any:
        if after or name == "close":
            getattr(_disk, name)(*arguments)
        raise error(name)

    return fault


FAULTS: dict[str, Fault] = {
    "no room": fails(errno.ENOSPC),
    "input/output error": fails(errno.EIO),
    "file too large, half written": tears(errno.EFBIG),
    "no room, half written": tears(errno.ENOSPC),
    "short": shortens,
    "no progress": moves_nothing,
    "Ctrl-C before": interrupts(KeyboardInterrupt, after=False),
    "Ctrl-C after": interrupts(KeyboardInterrupt, after=True),
    "out of memory": interrupts(MemoryError, after=False),
}
"""Every way to go wrong that a store must survive."""

__all__ = ["FAULTS", "OPERATIONS", "Fault", "FaultyDisk", "fails", "interrupts", "moves_nothing", "shortens", "tears"]
