"""`WriteBehind`: records on their way to the disk. Bounded, and nothing that was accepted is ever lost.

What is being written stays in memory until it is on the disk; what could not be written stays until a later attempt
succeeds or nobody wants it any more. An error of the background is raised once, by the next call, and the call after
that tries again. The caller does not wait for the disk unless all buffers are in use.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait

import attrs
from torch import Tensor

from ollm.contracts.blocks import Location
from ollm.io.buffers import BufferPool, tensor_bytes
from ollm.io.scheduler import IOScheduler, promise
from ollm.storage.options import BUFFER_BYTES, WRITE_BUFFERS


@attrs.define(eq=False)
class _Write:
    """One record on its way."""

    buffer: Tensor
    nbytes: int
    action: Callable[[], None]
    future: Future[None] = attrs.field(factory=promise)
    reported: bool = False

    @property
    def error(self) -> BaseException | None:
        """Why it failed; `None` if it did not, or is not done."""
        return self.future.exception() if self.future.done() and not self.future.cancelled() else None

    def run(self) -> None:
        """What a worker does."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.action()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(None)


class WriteBehind:
    """For one writer; `rescue` may be called from any thread."""

    def __init__(
        self,
        scheduler: IOScheduler,
        explain: Callable[[OSError, int], Exception],
        *,
        count: int = WRITE_BUFFERS,
        pinned: bool = False,
    ) -> None:
        """Nothing is being written.

        Args:
            scheduler: of the disk.
            explain: makes the error to be raised of what the system said to so many bytes.
            count: how many records may wait.
            pinned: whether what is written comes from a CUDA device.

        Raises:
            MemoryLimitError: no memory for the buffers is free.
        """
        self._scheduler = scheduler
        self._explain = explain
        self._buffers = BufferPool("Write buffers", count, BUFFER_BYTES, pinned=pinned)
        self._writes: OrderedDict[Location, _Write] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self._buffers.nbytes

    def buffer(self, nbytes: int) -> Tensor:
        """A buffer of at least `nbytes`, for `submit` or `give_up`. Waits while all are in use.

        Raises:
            StorageError: what the background failed with, if that keeps all buffers in use.
        """
        self._collect()
        while not self._buffers.has_free:
            running = [write.future for write in self._writes.values() if not write.future.done()]
            if running:
                wait(running, return_when="FIRST_COMPLETED")
            else:
                self.raise_failed()
            self._collect()
        return self._buffers.take(nbytes)

    def give_up(self, location: Location, buffer: Tensor) -> None:
        """Take back a buffer for which `submit` was not called, or did not come to its end."""
        self.forget(location)
        self._buffers.give_back(buffer)

    def submit(self, location: Location, buffer: Tensor, nbytes: int, action: Callable[[], None]) -> None:
        """Let a worker run `action`, which writes the first `nbytes` of `buffer` to its location."""
        write = _Write(buffer, nbytes, action)
        with self._lock:  # noted before a worker has it, so that no interrupt leaves one that nobody knows of
            self._writes[location] = write
        self._scheduler.submit(write.run)

    def raise_failed(self) -> None:
        """Raise what the background failed with, the first time; later, try again.

        Raises:
            StorageError: what the disk answered, then or now.
        """
        failed = [write for write in self._writes.values() if write.error is not None]
        news = [write for write in failed if not write.reported]
        for write in failed:
            write.reported = True
        for write in news or failed:
            try:
                if news:
                    raise write.error or OSError()
                write.action()
            except OSError as error:
                raise self._explain(error, write.nbytes) from error
            done: Future[None] = Future()
            done.set_result(None)
            write.future = done  # at once: nobody waits for one that no worker has
        self._collect()

    def flush(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            StorageError: what the disk answered, if it did not take all.
        """
        wait([write.future for write in self._writes.values()])
        self.raise_failed()

    def rescue(self, location: Location, into: memoryview, at: int) -> bool:
        """Wait until a record is written; if that failed, fill `into` with what should be there from byte `at` on."""
        write = self._writes.get(location)
        if write is None:
            return False
        wait([write.future])
        with self._lock:  # until it is dropped, its buffer is not used again
            if self._writes.get(location) is not write or write.error is None:
                return False
            into[:] = tensor_bytes(write.buffer)[at : at + len(into)]
            return True

    def forget(self, location: Location) -> None:
        """Nobody wants this record any more; whatever is being written there is done with afterwards."""
        write = self._writes.get(location)
        if write is not None:
            if not write.future.cancel():
                wait([write.future])
            self._drop(location)

    def close(self) -> None:
        """Give up what is not written yet, and wait for what is being written."""
        for location in list(self._writes):
            self.forget(location)
        self._buffers.close()

    def _collect(self) -> None:
        """Take back the buffers of what is written."""
        for location, write in list(self._writes.items()):
            if write.future.done() and write.error is None:
                self._drop(location)

    def _drop(self, location: Location) -> None:
        with self._lock:
            write = self._writes.pop(location)
        self._buffers.give_back(write.buffer)
