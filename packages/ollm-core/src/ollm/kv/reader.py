"""`BlockReader`: reads what attention will ask for next, so that the disk does not idle while attention computes.

A step visits the layers in order and each layer's extents in order, and the next step does the same again: what comes
after an extent is known to whoever asks for it. The reader keeps as many reads in flight as it has buffers, across the
layers and from one step into the next. A wrong guess costs a read, never a wrong byte: what was read is known by its
extents, and whoever frees some says so first. Reading ahead across layers is FlexGen's idea (Sheng et al., 2023).
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

import attrs
import torch
from torch import Tensor

from ollm.contracts.blocks import Extent, KVBlock, Location
from ollm.contracts.kv import KVStore
from ollm.errors import StoreContractError
from ollm.io.buffers import ALIGNMENT, BufferPool
from ollm.kv.state import KVCounters
from ollm.storage.records import run_span

Run = tuple[Extent, ...]
"""Extents that are read at once: neighbours in a file, or a single one."""
Coming = Callable[[], Iterable[Run]]
"""What will be wanted after what is asked for, as far as one can tell; finite."""
Submit = Callable[..., Future[Any]]
Wait = Callable[[], None]
Found = tuple[Tensor, KVBlock | None]
"""The raw bytes of an extent, and its keys and values if a worker decoded them."""


@attrs.define(eq=False)
class _Read:
    """One request, from its submission until its bytes were used."""

    run: Run
    buffers: list[tuple[BufferPool, Tensor]]
    """What a worker fills: with bytes, if they come from a storage, and with what it makes of them, if it decodes."""
    future: Future[list[Found]]
    until: Wait | None = None
    """Waits for whoever goes on reading the buffer after it was used."""


class BlockReader:
    """Reads for one cache, on the workers of its disk, into its own buffers. For one thread."""

    def __init__(
        self, store: KVStore, submit: Submit, *, strategy: str, buffers: BufferPool, counters: KVCounters,
        decoded: BufferPool | None = None,
    ) -> None:  # fmt: skip
        """Nothing is read yet.

        Args:
            store: whose extents are read.
            submit: runs something on a worker.
            strategy: its name, for messages.
            buffers: as many as there may be reads.
            counters: the session's.
            decoded: as many, for what workers decode; without them, they do not.
        """
        self._store = store
        self._decoded = decoded
        self._submit_action = submit
        self._strategy = strategy
        self._buffers = buffers
        self._counters = counters
        self._ahead: deque[_Read] = deque()
        self._current: _Read | None = None
        self._busy: dict[int, Wait] = {}
        self._plan: Iterator[Run] = iter(())

    @property
    def buffer_bytes(self) -> int:
        """Memory of the buffers."""
        return self._buffers.nbytes + (0 if self._decoded is None else self._decoded.nbytes)

    def read(self, runs: Sequence[Run], coming: Coming) -> Generator[list[Found], None, None]:
        """What is found of the extents of each run, in order, each until the next is asked for.

        Raises:
            CorruptDataError, StorageError: an extent cannot be read; nothing is being read then.
        """
        done, planned = 0, False
        try:
            for at, run in enumerate(runs):
                ahead = self._ahead_of(run)
                self._current = read = self._submit(run) if ahead is None else ahead
                if ahead is None or not planned:
                    self._plan, planned = itertools.chain(runs[at + 1 :], coming()), True
                self._top_up()
                if ahead is not None and self._failed(ahead):  # at an earlier time: now it may work
                    self._finish(ahead)
                    self._current = read = self._submit(run)
                yield self._result(read)
                self._current = None
                self._finish(read)
                done += 1
        finally:
            if done < len(runs):  # an error, or nobody wants the rest
                self.cancel()

    def in_use_until(self, wait_until: Wait) -> None:
        """Somebody, such as a copy to an accelerator, reads the bytes that came last until `wait_until` returns."""
        assert self._current is not None
        self._current.until = wait_until

    def forget(self, locations: Iterable[Location]) -> None:
        """What is there will be freed, and nobody will ask for it: afterwards nothing reads there."""
        gone = set(locations)
        for read in [read for read in self._ahead if any(extent.location in gone for extent in read.run)]:
            self._ahead.remove(read)
            self._finish(read)
        self._plan = iter(())  # it may name some

    def cancel(self) -> None:
        """Give up what was read ahead; afterwards nothing is being read, and no buffer is in use."""
        current, self._current = self._current, None
        if current is not None:
            self._finish(current)
        while self._ahead:
            self._finish(self._ahead.popleft())
        for wait_until in self._busy.values():
            wait_until()
        self._busy.clear()

    def _ahead_of(self, run: Run) -> _Read | None:
        """The read of this run that is under way already; if there is none, there is a buffer for it."""
        for place, read in enumerate(self._ahead):
            if read.run == run:
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

    def _submit(self, run: Run) -> _Read:
        storage, until = self._store.storage, None
        buffers = []  # if asking fails they are dropped, and so free once nobody reads into them
        if storage is None:
            read: Callable[[], list[Tensor]] = functools.partial(_look_up, self._store, run)
        else:
            begin, end = run_span(run)
            buffer = self._buffers.take(end - begin)
            buffers.append((self._buffers, buffer))
            until = self._busy.pop(buffer.data_ptr(), None)
            read = functools.partial(storage.read, run, buffer)
        decode = None
        if self._decoded is not None:
            place = self._decoded.take(sum(map(_decoded_bytes, run)))
            buffers.append((self._decoded, place))
            decode = functools.partial(_decode_into, self._store, place)
        return _Read(run, buffers, self._submit_action(_work, self._strategy, run, read, decode, until))

    def _failed(self, read: _Read) -> bool:
        """Whether a read that is under way comes to nothing."""
        began = time.perf_counter()
        error = read.future.exception()
        self._counters.load_seconds += time.perf_counter() - began
        return error is not None

    def _result(self, read: _Read) -> list[Found]:
        began = time.perf_counter()
        found = read.future.result()
        self._counters.load_seconds += time.perf_counter() - began
        self._counters.loaded_bytes += sum(extent.location.nbytes for extent in read.run)
        return found

    def _finish(self, read: _Read) -> None:
        """Nobody uses its bytes any more: wait for the worker, if it is at it, and take the buffers back."""
        if not read.future.done() and not read.future.cancel():
            wait([read.future])
        for pool, buffer in read.buffers:
            if read.until is not None:
                self._busy[buffer.data_ptr()] = read.until
            pool.give_back(buffer)


def check_raw(strategy: str, extent: Extent, raw: Tensor) -> None:
    """What a store gave for an extent must be its raw bytes.

    Raises:
        StoreContractError: it is something else.
    """
    if raw.dtype != torch.uint8 or raw.numel() != extent.location.nbytes:
        raise StoreContractError(
            f"KV store '{strategy}': read() of {extent} gave {raw.numel()} elements of {raw.dtype}."
        )


def _work(
    strategy: str,
    run: Run,
    read: Callable[[], list[Tensor]],
    decode: Callable[[Run, list[Tensor]], list[KVBlock]] | None,
    until: Wait | None,
) -> list[Found]:
    """What a worker does."""
    if until is not None:
        until()
    raws = read()
    for extent, raw in zip(run, raws, strict=True):
        check_raw(strategy, extent, raw)
    blocks = [None] * len(run) if decode is None else decode(run, raws)
    return list(zip(raws, blocks, strict=True))


def _look_up(store: KVStore, run: Run) -> list[Tensor]:
    return [store.read(extent) for extent in run]


def _decoded_bytes(extent: Extent) -> int:
    """What keys and values of an extent take, aligned for the next ones."""
    return -(-extent.layout.nbytes(extent.key.rows, extent.key.tokens) // ALIGNMENT) * ALIGNMENT


def _decode_into(store: KVStore, place: Tensor, run: Run, raws: list[Tensor]) -> list[KVBlock]:
    blocks, at = [], 0
    with torch.no_grad():  # is each thread's own
        for extent, raw in zip(run, raws, strict=True):
            size = _decoded_bytes(extent)
            out = KVBlock.empty(extent.layout, extent.key.rows, extent.key.tokens, into=place[at : at + size])
            blocks.append(store.decode(extent, raw, out))
            at += size
    return blocks
