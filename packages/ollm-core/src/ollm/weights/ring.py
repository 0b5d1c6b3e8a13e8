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
    dropped: bool = False
    error: BaseException | None = None
    failed: Read | None = None


@attrs.frozen(eq=False)
class _Request:
    """One read that the scheduler was asked for."""

    filling: _Filling
    read: Read
    _turn: list[None] = attrs.field(factory=lambda: [None])

    def take(self) -> bool:
        """Whether it is the caller's: of the worker who runs it, or of who gives it up, but never of both."""
        try:
            self._turn.pop()
        except IndexError:
            return False
        return True


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
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._slots = [_Slot(buffer, number) for number, buffer in enumerate(buffers)]
        # what uses a slot is said in these three, and nowhere else
        self._ahead: deque[_Filling] = deque()
        self._current: _Filling | None = None
        self._flying: set[_Request] = set()
        self._next: int | None = None  # place in the order of what is read after `_ahead`
        self._abandoned = False

    def take(self, layer: int) -> int:
        """Wait until a layer is in a slot, and keep it there until `release`. Returns the slot's number.

        Layers that were read ahead and are not asked for are dropped, and reading goes on from the one that is.

        Raises:
            WeightsError: it could not be read; the next `take` tries again.
        """
        self.release()
        began = time.perf_counter()
        with self._lock:
            try:
                if not self._ahead or self._ahead[0].layer != layer:
                    self._drop_all()
                    self._next = self._order.index(layer)
                self._pump()
                while not self._ahead or (self._ahead[0].left and self._ahead[0].error is None):
                    self._changed.wait()
                filling = self._ahead[0]
                self._counters.wait_seconds += time.perf_counter() - began
                if filling.error is not None:
                    raise _error(filling) from filling.error
                self._current = self._ahead.popleft()
                return filling.slot.number
            except BaseException:  # whatever was interrupted is begun anew
                self._drop_all()
                raise

    def release(self, wait_until_free: Callable[[], None] = _nothing) -> None:
        """The layer that was taken is not needed any more; its slot is read into again.

        Args:
            wait_until_free: called before that, by the reading thread; waits until the bytes are no longer copied.
        """
        with self._lock:
            if self._current is not None:
                self._current.slot.wait_until_free = wait_until_free
                self._current = None
                self._pump()

    def close(self) -> None:
        """Read nothing more, and wait for what is being read. May be called until it has succeeded, and afterwards."""
        with self._lock:
            self._drop_all()
            while self._flying:
                self._changed.wait()

    def abandon(self) -> None:
        """Read nothing more, without waiting: whoever collects garbage may be a thread that reads."""
        self._abandoned = True

    def _drop_all(self) -> None:
        """Nothing of what was read ahead is wanted. What is being read keeps its slot until that is done."""
        self._next = None
        for filling in self._ahead:
            filling.dropped = True
            filling.unsent.clear()
        self._ahead.clear()

    def _idle(self) -> _Slot | None:
        """A slot that nothing is in, nor on its way into."""
        fillings = [*self._ahead, *(request.filling for request in self._flying)]
        used = {filling.slot.number for filling in (*fillings, self._current) if filling is not None}
        return next((slot for slot in self._slots if slot.number not in used), None)

    def _pump(self) -> None:
        """Start layers in idle slots, and requests of started layers, as many as may be under way."""
        try:
            while self._next is not None and not self._abandoned and (slot := self._idle()) is not None:
                layer = self._order[self._next]
                reads = self._reads[layer]
                self._ahead.append(_Filling(layer, slot, deque(reads), len(reads)))
                self._next = (self._next + 1) % len(self._order)
            for filling in self._ahead:
                while filling.unsent and len(self._flying) < IN_FLIGHT:
                    self._ask(filling, filling.unsent.popleft())
        except BaseException:  # perhaps one of the reads is neither asked for nor to be asked for
            self._drop_all()
            raise

    def _ask(self, filling: _Filling, read: Read) -> None:
        request = _Request(filling, read)
        try:
            self._flying.add(request)
            self._scheduler.submit(self._run, request)
        except BaseException as error:
            if request.take():  # else it runs, and ends by itself
                self._flying.discard(request)
            if not isinstance(error, Exception):
                raise
            self._fail(request, error)  # no threads, as when the interpreter ends

    def _run(self, request: _Request) -> None:
        filling, error, done = request.filling, None, 0
        if not request.take():
            return
        try:
            if not filling.dropped and not self._abandoned:
                filling.slot.wait_until_free()
                request.read.into(filling.slot.buffer)
                done = request.read.length
        except BaseException as raised:
            error = raised
        with self._lock:
            self._flying.discard(request)
            self._counters.read_bytes += done
            if error is not None:
                self._fail(request, error)
            else:
                filling.left -= 1
            try:
                self._pump()
            finally:
                self._changed.notify_all()

    def _fail(self, request: _Request, error: BaseException) -> None:
        filling = request.filling
        filling.unsent.clear()
        if filling.error is None:
            filling.error, filling.failed = error, request.read


def _error(filling: _Filling) -> WeightsError:
    reason = str(filling.error) or type(filling.error).__name__
    return WeightsError(f"Cannot read {filling.failed}: {reason.removesuffix('.')}.")
