"""`IOScheduler`: the worker threads of one disk, shared by everything that reads from or writes to it.

Requests start in the order in which they were made, several at a time. Bounding what is in flight is the business of
those who ask: they own the buffers.

A forked child has none of its parent's threads. So everything that they were to do ends there at once, with an error:
nobody ever waits for a thread that its process never had.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

from ollm.errors import CacheForkedError, StorageError
from ollm.io import shim

WORKERS = 8
"""Threads per disk. On an idle machine four requests of 4 MiB keep a flash disk as busy as eight do (measured: 2.38 and
2.42 GB/s). The other four are for when attention computes on all cores and a worker must wait for one before it can ask
for more; runs varied too much to say by how much they help."""

_NAME = "ollm-io"

P = ParamSpec("P")
T = TypeVar("T")


def check_process(owner: int) -> None:
    """Whether this is the process of that number, whose threads and files something uses.

    Raises:
        CacheForkedError: it is a child of that.
    """
    if os.getpid() != owner:
        raise CacheForkedError("This cache was made before the process was forked: make a new one in the child.")


def promise() -> Future[Any]:
    """A future that one of the threads here is to end. In a forked child it ends with `CacheForkedError`."""
    return _promised(Future())


class IOScheduler:
    """What one user runs requests with, on the `WORKERS` threads of a disk: first come, first served, whoever asks. Use
    `scheduler_of` to get one.

    Because requests start in order, one that waits for an earlier one never waits for something that cannot start.
    """

    def __init__(self, workers: _Workers) -> None:
        """One user more."""
        self._workers = workers
        self._number = workers.join()
        weakref.finalize(self, workers.leave, self._number).atexit = False  # then threads end with the interpreter

    def submit(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `action` on a worker as soon as one is free. If this fails it will not be run, unless it is running by
        then: what it uses may only be dropped.

        Raises:
            StorageError: there is no thread, and the system starts none.
            CacheForkedError: the threads are those of another process.
        """
        check_process(self._workers.process)
        request = _Request(functools.partial(action, *args, **kwargs))
        try:
            return _promised(self._workers.executor.submit(request))
        except BaseException as error:
            request.give_up()
            if isinstance(error, RuntimeError):
                raise StorageError(
                    f"No thread reads or writes here: {error}. Raise the limit of threads (ulimit -u, pids.max), or "
                    "end other programs."
                ) from error
            raise

    def release(self) -> None:
        """One user less. The last one ends the threads, after what they are doing; whoever has requests running
        cancels or awaits them first. May be called again, as after an interrupt."""
        self._workers.leave(self._number)


class _Workers:
    """The threads of one disk, and the numbers of those who use them."""

    def __init__(self, key: tuple[int, int | None]) -> None:
        self.executor = _Executor(WORKERS, thread_name_prefix=_NAME)
        self.process, _ = self._key = key
        self._users: set[int] = set()
        self._numbers = itertools.count()

    def join(self) -> int:
        number = next(self._numbers)
        self._users.add(number)
        return number

    def leave(self, number: int) -> None:
        if os.getpid() != self.process:  # none of the threads is here
            return
        with _lock:
            self._users.discard(number)
            if self._users:
                return
            if _schedulers.get(self._key) is self:
                del _schedulers[self._key]
        # a cache that is dropped may be collected on a worker, which cannot wait for itself
        self.executor.shutdown(wait=not threading.current_thread().name.startswith(_NAME), cancel_futures=True)


class _Executor(ThreadPoolExecutor):
    """Goes on with the threads that it has where the system starts no more."""

    def _adjust_thread_count(self) -> None:
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            if not self._threads:
                raise


class _Request(Generic[T]):
    """What a worker runs; nothing, once it was given up."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work: Callable[[], T] | None = work
        self._lock = threading.Lock()  # held while it runs

    def __call__(self) -> T:
        with self._lock:
            if self._work is None:
                raise StorageError("this request was given up")  # to nobody
            return self._work()

    def give_up(self) -> None:
        """It is not to begin any more."""
        if self._lock.acquire(blocking=False):
            self._work = None
            self._lock.release()


_lock = threading.RLock()  # a cache may be collected, and give its scheduler back, while another asks for one
_schedulers: dict[tuple[int, int | None], _Workers] = {}
_open: set[Future[Any]] = set()  # what is promised and not done


def _promised(future: Future[T]) -> Future[T]:
    _open.add(future)
    future.add_done_callback(_open.discard)
    return future


def _begin_child() -> None:
    """Right behind a fork, in the child: locks that a thread of the parent held would never be given back."""
    global _lock
    _lock = threading.RLock()
    _schedulers.clear()
    while _open:
        future = _open.pop()
        Future.__init__(future)  # its lock is one of them
        future.set_exception(CacheForkedError("A thread of the parent process was at this: it is not here."))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)


def scheduler_of(folder: Path | None) -> IOScheduler:
    """A scheduler of the disk that `folder` is on; `None` stands for all that is on no disk. Give it back with
    `release`, or drop it.

    Raises:
        OSError: as the system says of the folder.
    """
    key = (os.getpid(), shim.disk.stat(folder).st_dev if folder is not None else None)  # a forked child has no threads
    with _lock:
        while True:
            workers = _schedulers.setdefault(key, _Workers(key))
            scheduler = IOScheduler(workers)
            if _schedulers.get(key) is workers:  # else the last user was collected meanwhile, in this very thread
                return scheduler
