"""`BlockReader`: reads what attention will ask for next, so that the disk does not idle while attention computes.

A step visits the layers in order and each layer's extents in order, and the next step does the same again: what comes
after an extent is known. The reader keeps as many reads in flight as it has buffers, across the layers and from one
step into the next. A wrong guess costs a read, never a wrong byte: what was read is known by its extents, which are
pinned until it was used. The idea of reading ahead across layers is FlexGen's (Sheng et al., 2023).
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, wait
from operator import attrgetter
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from ollm.contracts.kv import Extent, KVStore
from ollm.errors import StoreContractError
from ollm.io.buffers import BufferPool
from ollm.io.scheduler import IOScheduler
from ollm.kv.pins import Pins
from ollm.kv.state import KVCounters
from ollm.storage.records import record_span

if TYPE_CHECKING:
    from ollm.storage.segments import SegmentedStorage

READ_BYTES = 4 * 2**20 + 2**16
"""The most that is read at once: an extent of 4 MiB, or several smaller ones that are neighbours."""

Run = tuple[Extent, ...]
Wait = Callable[[], None]


@attrs.define(eq=False)
class _Read:
    """One request, from its submission until its bytes were used."""

    run: Run
    buffer: Tensor | None
    future: Future[list[Tensor]]
    until: Wait | None = None
    """Waits for whoever goes on reading the buffer after it was used."""


class BlockReader:
    """Reads for one cache, on the workers of its disk, into its own buffers. For one thread."""

    def __init__(
        self,
        store: KVStore,
        *,
        strategy: str,
        layers: Sequence[int],
        is_cold: Callable[[Extent], bool],
        pins: Pins,
        buffers: BufferPool,
        scheduler: IOScheduler,
        counters: KVCounters,
    ) -> None:
        """Nothing is read yet.

        Args:
            store: whose extents are read.
            strategy: its name, for messages.
            layers: those that are stored, in the order in which a step visits them.
            is_cold: whether an extent must be read.
            pins, counters: the session's.
            buffers: as many as there may be reads.
            scheduler: of the disk.
        """
        self._store = store
        self._strategy = strategy
        self._layers = {layer: place for place, layer in enumerate(layers)}
        self._order = tuple(layers)
        self._is_cold = is_cold
        self._pins = pins
        self._buffers = buffers
        self._scheduler = scheduler
        self._counters = counters
        self._ahead: deque[_Read] = deque()
        self._current: _Read | None = None
        self._busy: dict[int, Wait] = {}

    @property
    def in_flight(self) -> int:
        """Reads that were asked for and whose bytes were not used yet."""
        return len(self._ahead)

    @property
    def buffer_bytes(self) -> int:
        """Memory of the buffers."""
        return self._buffers.nbytes

    def read(self, extents: Sequence[Extent]) -> Generator[tuple[Extent, Tensor], None, None]:
        """The raw bytes of pinned cold extents of one layer, in order, each until the next is asked for.

        Raises:
            CorruptDataError, StorageError: an extent cannot be read; nothing is being read then.
        """
        at = 0
        try:
            while at < len(extents):
                self._current = read = self._take(extents[at:])
                self._top_up(read.run[-1])
                yield from zip(read.run, self._result(read), strict=True)
                at += len(read.run)
                self._current = None
                self._finish(read)
        finally:
            if at < len(extents):  # an error, or nobody wants the rest
                self.cancel()

    def in_use_until(self, wait_until: Wait) -> None:
        """Somebody, such as a copy to an accelerator, reads the bytes that came last until `wait_until` returns."""
        assert self._current is not None
        self._current.until = wait_until

    def forget(self, extents: Iterable[Extent]) -> None:
        """These were dropped: nobody will ask for them."""
        gone = set(extents)
        for read in [read for read in self._ahead if not gone.isdisjoint(read.run)]:
            self._ahead.remove(read)
            self._finish(read)

    def cancel(self) -> None:
        """Give up what was read ahead; afterwards nothing is being read, and no buffer is in use."""
        if self._current is not None:
            self._finish(self._current)
            self._current = None
        while self._ahead:
            self._finish(self._ahead.popleft())
        for wait_until in self._busy.values():
            wait_until()
        self._busy.clear()

    def _take(self, wanted: Sequence[Extent]) -> _Read:
        """The read that brings the first of the wanted extents: under way already, if the guess was right."""
        for place, read in enumerate(self._ahead):
            if read.run == tuple(wanted[: len(read.run)]):
                for _ in range(place):  # they were skipped
                    self._finish(self._ahead.popleft())
                return self._ahead.popleft()
        if not self._has_room:
            self._finish(self._ahead.pop())
        return self._submit(self._run(wanted))

    @property
    def _has_room(self) -> bool:
        if self._store.storage is None:
            return len(self._ahead) + 1 < self._buffers.count
        return self._buffers.has_free

    def _top_up(self, after: Extent) -> None:
        """Ask for what comes next, as far as there are buffers."""
        while self._has_room:
            run = self._next_run(self._ahead[-1].run[-1] if self._ahead else after)
            if run is None or any(run[0] in read.run for read in self._ahead):
                return
            self._ahead.append(self._submit(run))

    def _next_run(self, after: Extent) -> Run | None:
        """What comes after an extent: the rest of its layer, then the other layers, round and round."""
        place = self._layers[after.layer]
        for step in range(len(self._order) + 1):
            extents = self._store.extents(self._order[(place + step) % len(self._order)])
            first = bisect.bisect_left(extents, after.stop, key=attrgetter("start")) if step == 0 else 0
            for at in range(first, len(extents)):
                if self._is_cold(extents[at]):
                    return self._run(extents[at:])
        return None

    def _run(self, extents: Sequence[Extent]) -> Run:
        """The first extents that can be read at once."""
        if self._store.storage is None:
            return (extents[0],)
        begin, end = record_span(extents[0])
        count = 1
        for extent in extents[1:]:
            start, stop = record_span(extent)
            if extent.segment != extents[0].segment or start != end or stop - begin > READ_BYTES:
                break
            if not self._is_cold(extent):
                break
            count, end = count + 1, stop
        return tuple(extents[:count])

    def _submit(self, run: Run) -> _Read:
        storage, buffer = self._store.storage, None
        self._pins.pin(run)
        try:
            if storage is None:
                return _Read(run, None, self._scheduler.submit(lambda: [self._store.read(run[0])]))
            buffer = self._buffers.take(record_span(run[-1])[1] - record_span(run[0])[0])
            until = self._busy.pop(buffer.data_ptr(), None)
            return _Read(run, buffer, self._scheduler.submit(_read_into, storage, run, buffer, until))
        except BaseException:
            if buffer is not None:
                self._buffers.give_back(buffer)
            self._pins.unpin(run)
            raise

    def _result(self, read: _Read) -> list[Tensor]:
        began = time.perf_counter()
        raws = read.future.result()
        self._counters.load_seconds += time.perf_counter() - began
        for extent, raw in zip(read.run, raws, strict=True):
            check_raw(self._strategy, extent, raw)
            self._counters.loaded_bytes += extent.nbytes
        return raws

    def _finish(self, read: _Read) -> None:
        """Nobody uses its bytes any more: wait for the worker, if it is at it, and take the buffer back."""
        if not read.future.cancel():
            wait([read.future])
        if read.buffer is not None:
            if read.until is not None:
                self._busy[read.buffer.data_ptr()] = read.until
            self._buffers.give_back(read.buffer)
        self._pins.unpin(read.run)


def check_raw(strategy: str, extent: Extent, raw: Tensor) -> None:
    """What a store gave for an extent must be its raw bytes.

    Raises:
        StoreContractError: it is something else.
    """
    if raw.dtype != torch.uint8 or raw.numel() != extent.nbytes:
        raise StoreContractError(
            f"KV store '{strategy}': read() of {extent} gave {raw.numel()} elements of {raw.dtype}."
        )


def _read_into(storage: SegmentedStorage, run: Run, buffer: Tensor, until: Wait | None) -> list[Tensor]:
    """What a worker does."""
    if until is not None:
        until()
    return storage.read(run, buffer)
