"""One store at work: the plan it runs under, what is written and dropped, who still reads it, and counters."""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs
import torch
from torch import Tensor

from ollm.contracts.kv import Extent, KVBlock, KVStore
from ollm.contracts.spill import SpillPlan
from ollm.errors import StoreContractError
from ollm.io.ledger import Claim
from ollm.kv.pins import Pins
from ollm.kv.source import BlockSource
from ollm.kv.state import KVCounters


class KVSession:
    """What the layers of one cache share. Every answer of the store is checked here, so that a faulty one cannot
    lead to a wrong token."""

    def __init__(
        self,
        store: KVStore,
        plan: SpillPlan,
        *,
        strategy: str,
        layers: Sequence[int],
        lossless: bool = True,
        device: torch.device | None = None,
        directory: Path | None = None,
        claims: Sequence[Claim] = (),
    ) -> None:
        """A session over a new store.

        Args:
            store: empty.
            plan: what the spill policy decided.
            strategy: the name for messages and `state()`.
            layers: the indices of the stored layers.
            lossless: whether the store gives back what it is given; only then may copies of that stay in memory.
            device: where attention runs; by default the CPU.
            directory: the private folder of the store, for `state()`.
            claims: memory that was claimed for this cache; given back at the end.

        Raises:
            MemoryLimitError: no memory for the read buffers is free.
        """
        self.store = store
        self.plan = plan
        self.strategy = strategy
        self.directory = directory
        self.counters = KVCounters()
        self.pins = Pins()
        self._claims = list(claims)
        self._stride = max(layers, default=0) + 1
        self._users: set[int] = set()
        self._dropped_users: deque[Callable[[], None]] = deque()
        self.source = BlockSource(
            store, plan, strategy=strategy, layers=layers, lossless=lossless,
            device=device or torch.device("cpu"), pins=self.pins, counters=self.counters,
        )  # fmt: skip

    @property
    def users(self) -> int:
        """How many caches share the store: the first one and its forks."""
        return len(self._users)

    def join(self) -> int:
        """One user more; its number, of which `layer_number` makes numbers that no other user has."""
        self._tidy()
        user = next(number for number in itertools.count() if number not in self._users)
        self._users.add(user)
        return user

    def layer_number(self, user: int, layer: int) -> int:
        """The number in the store of a layer of a user."""
        return user * self._stride + layer

    def leave(self, user: int, give_up: Callable[[], None]) -> None:
        """One user less: `give_up` drops what is its own; with the last user everything ends. May be called twice."""
        if self._users == {user}:
            self.close()
        elif user in self._users:
            give_up()
        self._users.discard(user)

    def leave_soon(self, user: int, give_up: Callable[[], None]) -> None:
        """The same for a user that was dropped, perhaps by the garbage collector in the midst of anything: takes place
        when another one goes on. If there is no other, what they shared is garbage as well, and ends by itself."""
        if self._users == {user}:
            self._users.clear()
        else:
            self._dropped_users.append(functools.partial(self.leave, user, give_up))

    def _tidy(self) -> None:
        while self._dropped_users:
            self._dropped_users.popleft()()

    def append(self, layer: int, keys: Tensor, values: Tensor) -> Extent:
        """Store one extent and return it as the store lists it."""
        before = self.store.extents(layer)
        began = time.perf_counter()
        self.store.append(layer, keys, values)
        self.counters.save_seconds += time.perf_counter() - began
        self.counters.saved_bytes += keys.nbytes + values.nbytes
        after = self.store.extents(layer)
        start = before[-1].stop if before else 0
        rows, _, tokens, _ = keys.shape
        if len(after) != len(before) + 1 or _place(after[-1]) != (layer, start, tokens, rows):
            raise StoreContractError(
                f"KV store '{self.strategy}': after append() of {tokens} tokens at {start} to layer {layer}, extents() "
                f"lists {after[-1] if after else 'nothing'}."
            )
        if list(after[:-1]) != list(before):
            raise StoreContractError(
                f"KV store '{self.strategy}': append() to layer {layer} changed extents that were there before."
            )
        self.source.keep(after[-1], KVBlock(keys, values))
        return after[-1]

    def truncate(self, layer: int, length: int) -> Sequence[Extent]:
        """Drop the extents of a layer from `length` on; those that stay. `release_unread` gives their bytes back."""
        before = self.store.extents(layer)
        keep = [extent for extent in before if extent.stop <= length]
        if len(keep) == len(before):
            return before
        dropped = before[len(keep) :]
        self.store.truncate(layer, length)
        after = self.store.extents(layer)
        if self.store.trims and dropped[0].start < length:
            keep.append(attrs.evolve(dropped[0], tokens=length - dropped[0].start))
        if list(after) != keep:
            raise StoreContractError(
                f"KV store '{self.strategy}': after truncate({layer}, {length}), extents() lists "
                f"{len(after)} extents instead of {len(keep)}."
            )
        self._drop(dropped)
        return after

    def release_unread(self) -> None:
        """Give back the bytes of dropped extents that nobody reads. The last step of whoever drops some: it may be
        interrupted, and costs only space then."""
        dropped = self.pins.dropped
        if not dropped:
            return
        self.source.forget_reads(dropped)
        free = self.pins.take_unread()
        if free:
            self.store.release(free)

    def evict(self, layer: int, extents: Sequence[Extent]) -> None:
        """Let a windowed store drop extents; their bytes are released once nobody reads them."""
        keep = [extent for extent in self.store.extents(layer) if extent not in extents]
        self.store.evict(layer, extents)
        if list(self.store.extents(layer)) != keep:
            raise StoreContractError(
                f"KV store '{self.strategy}': after evict({layer}, …) of {len(extents)} extents, extents() lists "
                f"{len(self.store.extents(layer))} instead of {len(keep)}."
            )
        self._drop(extents)

    @contextmanager
    def snapshot(self, extents: Sequence[Extent]) -> Iterator[Sequence[Extent]]:
        """Pin extents: until the end of the `with` block their bytes stay what they are, truncated or not."""
        try:
            with self.pins.pinned(extents):
                yield extents
        finally:
            self.release_unread()

    def _drop(self, extents: Sequence[Extent]) -> None:
        """The store does not list these any more."""
        self.pins.drop(extents)
        self.source.forget(extents)

    def settle(self) -> None:
        """Raise what the background failed with since the last call; see `SegmentedStorage.settle`."""
        self._tidy()
        if self.store.storage is not None:
            self.store.storage.settle()

    def close(self) -> None:
        """End all reading, close the store and forget what is resident. May be called twice."""
        with ExitStack() as steps:  # from the last to the first; the next one is done even if one fails
            for claim in self._claims:
                steps.callback(claim.release)
            steps.callback(self.store.close)
            steps.callback(self.source.close)


def _place(extent: Extent) -> tuple[int, int, int, int]:
    return extent.layer, extent.start, extent.tokens, extent.rows
