"""`Ring`: reads layers ahead of the one that computes, into a few buffers that are used again and again.

The layers come round in one order, over and over. Each read that ends starts the next, so that only a few wait in the
scheduler's queue and keys and values get their turn on the same disk. Knows layers by number and what to read for each;
not modules, not what a forward pass is.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import attrs
from torch import Tensor

from ollm.errors import WeightsError
from ollm.io.scheduler import IOScheduler
from ollm.weights.counters import WeightCounters
from ollm.weights.layout import Read

RING_SLOTS = 3
"""One layer computes, one is ready or nearly, one is being read."""
IN_FLIGHT = 8
"""Requests in the scheduler at a time: as many as it has threads."""


def _nothing() -> None:
    pass


@attrs.define(eq=False)
class _Slot:
    """A buffer, and what to wait for before its bytes may be overwritten."""

    buffer: Tensor
    number: int
    wait_until_free: Callable[[], None] = _nothing


@attrs.define(eq=False)
class _Filling:
    """A layer on its way into a slot."""

    layer: int
    slot: _Slot
    unsent: deque[Read]
    left: int
    flying: int = 0
    dropped: bool = False
    error: BaseException | None = None
    failed: Read | None = None


class Ring:
    """For one thread that takes layers; the reading is done by the scheduler's."""

    def __init__(
        self,
        reads: Mapping[int, Sequence[Read]],
        buffers: Sequence[Tensor],
        scheduler: IOScheduler,
        counters: WeightCounters,
    ) -> None:
        """Nothing is read before the first `take`.

        Args:
            reads: what to read for each streamed layer, in the order in which they compute.
            buffers: slots, each large enough for any of the layers.
            scheduler: of the disk; stays the caller's.
            counters: gets what is read and waited for.
        """
        self._reads = dict(reads)
        self._order = list(reads)
        self._scheduler = scheduler
        self._counters = counters
        self._changed = threading.Condition()
        self._idle = deque(_Slot(buffer, number) for number, buffer in enumerate(buffers))
        self._ahead: deque[_Filling] = deque()
        self._current: _Filling | None = None
        self._next: int | None = None  # place in the order of what is read after `_ahead`
        self._flying = 0
        self._abandoned = False

    def take(self, layer: int) -> int:
        """Wait until a layer is in a slot, and keep it there until `release`. Returns the slot's number.

        Layers that were read ahead and are not asked for are dropped, and reading goes on from the one that is.

        Raises:
            WeightsError: it could not be read; the next `take` tries again.
        """
        self.release()
        began = time.perf_counter()
        with self._changed:
            if not self._ahead or self._ahead[0].layer != layer:
                self._drop_all()
                self._next = self._order.index(layer)
            self._pump()
            while not self._ahead or (self._ahead[0].left and self._ahead[0].error is None):
                self._changed.wait()
            filling = self._ahead[0]
            self._counters.wait_seconds += time.perf_counter() - began
            if filling.error is not None:
                self._drop_all()
                raise _error(filling) from filling.error
            self._current = self._ahead.popleft()
            return filling.slot.number

    def release(self, wait_until_free: Callable[[], None] = _nothing) -> None:
        """The layer that was taken is not needed any more; its slot is read into again.

        Args:
            wait_until_free: called before that, by the reading thread; waits until the bytes are no longer copied.
        """
        with self._changed:
            if self._current is not None:
                self._current.slot.wait_until_free = wait_until_free
                self._idle.append(self._current.slot)
                self._current = None
                self._pump()

    def close(self) -> None:
        """Read nothing more, and wait for what is being read. May be called twice."""
        with self._changed:
            self._drop_all()
            while self._flying:
                self._changed.wait()

    def abandon(self) -> None:
        """Read nothing more, without waiting: whoever collects garbage may be a thread that reads."""
        self._abandoned = True

    def _drop_all(self) -> None:
        """Nothing of what was read ahead is wanted."""
        self._next = None
        for filling in self._ahead:
            filling.dropped = True
            filling.unsent.clear()
            self._give_back(filling)
        self._ahead.clear()

    def _give_back(self, filling: _Filling) -> None:
        if filling.dropped and not filling.flying:
            self._idle.append(filling.slot)

    def _pump(self) -> None:
        """Start layers in idle slots, and requests of started layers, as many as may be under way."""
        while self._idle and self._next is not None and not self._abandoned:
            layer = self._order[self._next]
            self._next = (self._next + 1) % len(self._order)
            reads = self._reads[layer]
            self._ahead.append(_Filling(layer, self._idle.popleft(), deque(reads), len(reads)))
        for filling in self._ahead:
            while filling.unsent and self._flying < IN_FLIGHT:
                read = filling.unsent.popleft()
                filling.flying += 1
                self._flying += 1
                try:
                    self._scheduler.submit(self._run, filling, read)
                except BaseException as error:  # no threads, as when the interpreter ends
                    filling.flying -= 1
                    self._flying -= 1
                    self._fail(filling, read, error)

    def _run(self, filling: _Filling, read: Read) -> None:
        error: BaseException | None = None
        done = 0
        try:
            if not filling.dropped and not self._abandoned:
                filling.slot.wait_until_free()
                read.into(filling.slot.buffer)
                done = read.length
        except BaseException as raised:
            error = raised
        with self._changed:
            filling.flying -= 1
            self._flying -= 1
            self._counters.read_bytes += done
            if error is not None:
                self._fail(filling, read, error)
            else:
                filling.left -= 1
            self._give_back(filling)
            self._pump()
            self._changed.notify_all()

    def _fail(self, filling: _Filling, read: Read, error: BaseException) -> None:
        filling.unsent.clear()
        if filling.error is None:
            filling.error, filling.failed = error, read


def _error(filling: _Filling) -> WeightsError:
    return WeightsError(f"Cannot read {filling.failed}: {filling.error or type(filling.error).__name__}.")
