"""`IOScheduler`: the worker threads of one disk, shared by everything that reads from or writes to it.

Requests start in the order in which they were made, several at a time. Bounding what is in flight is the business of
those who ask: they own the buffers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from ollm.io import shim

WORKERS = 8
"""Threads per disk. On an idle machine four requests of 4 MiB keep a flash disk as busy as eight do (measured: 2.38 and
2.42 GB/s). The other four are for when attention computes on all cores and a worker must wait for one before it can ask
for more; runs varied too much to say by how much they help."""

_NAME = "ollm-io"

P = ParamSpec("P")
T = TypeVar("T")


class IOScheduler:
    """Runs requests on `WORKERS` threads, first come, first served. Use `scheduler_of` to get the one of a disk.

    Because requests start in order, one that waits for an earlier one never waits for something that cannot start.
    """

    def __init__(self, key: tuple[int, int | None]) -> None:
        self._key = key
        self._executor = ThreadPoolExecutor(WORKERS, thread_name_prefix=_NAME)
        self.users = 1

    def submit(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `action` on a worker as soon as one is free."""
        return self._executor.submit(action, *args, **kwargs)

    def release(self) -> None:
        """One user less. The last one ends the threads, after what they are doing; whoever has requests running
        cancels or awaits them first."""
        with _lock:
            self.users -= 1
            if self.users:
                return
            _schedulers.pop(self._key, None)
        # a cache that is dropped may be collected on a worker, which cannot wait for itself
        self._executor.shutdown(wait=not threading.current_thread().name.startswith(_NAME), cancel_futures=True)


_lock = threading.RLock()  # a cache may be collected, and give its scheduler back, while another asks for one
_schedulers: dict[tuple[int, int | None], IOScheduler] = {}


def scheduler_of(folder: Path | None) -> IOScheduler:
    """The scheduler of the disk that `folder` is on; `None` stands for all that is on no disk. Give it back with
    `release`.

    Raises:
        OSError: as the system says of the folder.
    """
    key = (os.getpid(), shim.disk.stat(folder).st_dev if folder is not None else None)  # a forked child has no threads
    with _lock:
        found = _schedulers.get(key)
        if found is None:
            found = _schedulers[key] = IOScheduler(key)
        else:
            found.users += 1
        return found
