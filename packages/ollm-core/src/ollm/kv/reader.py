"""`BlockReader`: reads what attention will ask for next, so that the disk does not idle while attention computes.

A step visits the layers in order and each layer's extents in order, and the next step does the same again: what comes
after an extent is known to whoever asks for it. The reader keeps as many reads in flight as it has buffers, across the
layers and from one step into the next. A wrong guess costs a read, never a wrong byte: what was read is known by its
extents, which are pinned until it was used. The idea of reading ahead across layers is FlexGen's (Sheng et al., 2023).
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from ollm.contracts.kv import Extent, KVStore
from ollm.errors import StoreContractError
from ollm.io.buffers import BufferPool
from ollm.io.scheduler import IOScheduler
from ollm.kv.pins import Pins
from ollm.kv.residency import MOST_EXTENT_BYTES
from ollm.kv.state import KVCounters
from ollm.storage.records import record_span

if TYPE_CHECKING:
    from ollm.storage.segments import SegmentedStorage

READ_BYTES = MOST_EXTENT_BYTES + 2**16
"""The most that is read at once: an extent of 8 MiB, or several smaller ones that are neighbours."""

Run = tuple[Extent, ...]
Following = Callable[[], Iterable[Sequence[Extent]]]
"""The extents that will be wanted after those that are asked for, layer by layer; finite."""
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
            is_cold: whether an extent must be read.
            pins, counters: the session's.
            buffers: as many as there may be reads.
            scheduler: of the disk.
        """
        self._store = store
        self._strategy = strategy
        self._is_cold = is_cold
        self._pins = pins
        self._buffers = buffers
        self._scheduler = scheduler
        self._counters = counters
        self._ahead: deque[_Read] = deque()
        self._current: _Read | None = None
        self._busy: dict[int, Wait] = {}
        self._plan: Iterator[Run] = iter(())

    @property
    def in_flight(self) -> int:
        """Reads that were asked for and whose bytes were not used yet."""
        return len(self._ahead)

    @property
    def buffer_bytes(self) -> int:
        """Memory of the buffers."""
        return self._buffers.nbytes

    def read(self, extents: Sequence[Extent], following: Following) -> Generator[tuple[Extent, Tensor], None, None]:
        """The raw bytes of pinned cold extents of one layer, in order, each until the next is asked for.

        Raises:
            CorruptDataError, StorageError: an extent cannot be read; nothing is being read then.
        """
        at, planned = 0, False
        try:
            while at < len(extents):
                ahead = self._ahead_of(extents, at)
                self._current = read = self._submit(self._run(extents, at)) if ahead is None else ahead
                if ahead is None or not planned:
                    self._plan, planned = self._planned(extents, at + len(read.run), following), True
                self._top_up()
                if ahead is not None and self._failed(ahead):  # at an earlier time: now it may work
                    self._finish(ahead)
                    self._current = read = self._submit(ahead.run)
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

    def _ahead_of(self, wanted: Sequence[Extent], at: int) -> _Read | None:
        """The read that brings the next of the wanted extents and is under way already; if there is none, there is a
        buffer for it."""
        for place, read in enumerate(self._ahead):
            if read.run == tuple(wanted[at : at + len(read.run)]):
                for _ in range(place):  # they were skipped
                    self._finish(self._ahead.popleft())
                return self._ahead.popleft()
        if not self._has_room:
            self._finish(self._ahead.pop())
        return None

    @property
    def _has_room(self) -> bool:
        if self._store.storage is None:
            return len(self._ahead) + 1 < self._buffers.count
        return self._buffers.has_free

    def _top_up(self) -> None:
        """Ask for what comes next, as far as there are buffers."""
        while self._has_room:
            run = next(self._plan, None)
            if run is None:
                return
            if not any(run[0] in read.run for read in self._ahead):
                self._ahead.append(self._submit(run))

    def _planned(self, extents: Sequence[Extent], at: int, following: Following) -> Iterator[Run]:
        """What is to be read after the first `at` of these extents: looked up when there is room for it."""
        for layer in itertools.chain([extents], following()):
            while at < len(layer):
                if self._is_cold(layer[at]):
                    run = self._run(layer, at)
                    yield run
                    at += len(run)
                else:
                    at += 1
            at = 0

    def _run(self, extents: Sequence[Extent], at: int) -> Run:
        """The extents from place `at` on that can be read at once."""
        first = extents[at]
        if self._store.storage is None:
            return (first,)
        begin, end = record_span(first)
        run = [first]
        for extent in itertools.islice(extents, at + 1, None):
            start, stop = record_span(extent)
            if extent.segment != first.segment or start != end or stop - begin > READ_BYTES:
                break
            if not self._is_cold(extent):
                break
            run.append(extent)
            end = stop
        return tuple(run)

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

    def _failed(self, read: _Read) -> bool:
        """Whether a read that is under way comes to nothing."""
        began = time.perf_counter()
        error = read.future.exception()
        self._counters.load_seconds += time.perf_counter() - began
        return error is not None

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
        if not read.future.done() and not read.future.cancel():
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
