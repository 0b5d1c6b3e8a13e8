"""One store at work: the plan it runs under, who reads what, what is resident, and what happened so far."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ollm.contracts.kv import Extent, KVBlock, KVStore
from ollm.contracts.spill import SpillPlan
from ollm.errors import StoreContractError
from ollm.kv.residency import Residency
from ollm.kv.state import KVCounters
from ollm.storage.tensors import LayerLayout


class KVSession:
    """What the layers of one cache share. Every answer of the store is checked here, so that a faulty one cannot
    lead to a wrong token."""

    def __init__(self, store: KVStore, plan: SpillPlan, *, strategy: str, layers: int, keep_resident: bool) -> None:
        """A session over a new store.

        Args:
            store: empty.
            plan: what the spill policy decided.
            strategy: the name for messages and `state()`.
            layers: how many layers share the resident bytes.
            keep_resident: whether copies may stay in memory: not for stores that are in memory themselves, and not
                for lossy ones, which give back something else than what they were given.
        """
        self.store = store
        self.plan = plan
        self.strategy = strategy
        self.counters = KVCounters()
        self.residency = Residency(plan.resident_bytes if keep_resident else 0, layers)
        self._pins: Counter[Extent] = Counter()
        self._dropped: set[Extent] = set()
        self._lock = threading.Lock()

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
        self.residency.offer(after[-1], KVBlock(keys, values))
        return after[-1]

    def truncate(self, layer: int, length: int) -> None:
        """Drop the extents of a layer from `length` on. `release_unread` gives their bytes back."""
        before = self.store.extents(layer)
        keep = [extent for extent in before if extent.stop <= length]
        if len(keep) == len(before):
            return
        self.store.truncate(layer, length)
        if list(self.store.extents(layer)) != keep:
            raise StoreContractError(
                f"KV store '{self.strategy}': after truncate({layer}, {length}), extents() lists "
                f"{len(self.store.extents(layer))} extents instead of {len(keep)}."
            )
        for extent in before[len(keep) :]:
            self.residency.drop(extent)
        with self._lock:
            self._dropped.update(before[len(keep) :])

    def release_unread(self) -> None:
        """Give back the bytes of dropped extents that nobody reads. The last step of whoever drops some: it may be
        interrupted, and costs only space then."""
        with self._lock:
            free = [extent for extent in self._dropped if not self._pins[extent]]
            self._dropped.difference_update(free)
        if free:
            self.store.release(sorted(free, key=lambda extent: (extent.layer, extent.start)))

    def evict(self, layer: int, extents: Sequence[Extent]) -> None:
        """Let a windowed store drop extents; their bytes are released once nobody reads them."""
        keep = [extent for extent in self.store.extents(layer) if extent not in extents]
        self.store.evict(layer, extents)
        if list(self.store.extents(layer)) != keep:
            raise StoreContractError(
                f"KV store '{self.strategy}': after evict({layer}, …) of {len(extents)} extents, extents() lists "
                f"{len(self.store.extents(layer))} instead of {len(keep)}."
            )
        for extent in extents:
            self.residency.drop(extent)
        with self._lock:
            self._dropped.update(extents)
        self.counters.evictions += 1
        self.counters.evicted_tokens += sum(extent.tokens for extent in extents)
        self.release_unread()

    @contextmanager
    def snapshot(self, extents: Sequence[Extent]) -> Iterator[Sequence[Extent]]:
        """Pin extents: until the end of the `with` block their bytes stay what they are, truncated or not."""
        with self._lock:
            self._pins.update(extents)
        try:
            yield extents
        finally:
            with self._lock:
                self._pins.subtract(extents)
                self._pins += Counter()  # forget those that nobody pins
            self.release_unread()

    def load(self, extent: Extent, layout: LayerLayout, device: torch.device, out: KVBlock | None) -> KVBlock:
        """The keys and values of a pinned extent on `device`, with the rows that it was written with."""
        block = self.residency.get(extent)
        if block is None:
            began = time.perf_counter()
            raw = self.store.read(extent)
            if raw.dtype != torch.uint8 or raw.numel() != extent.nbytes:
                raise StoreContractError(
                    f"KV store '{self.strategy}': read() of {extent} gave {raw.numel()} elements of {raw.dtype}."
                )
            block = self.store.decode(extent, raw.to(device), out)
            self.counters.load_seconds += time.perf_counter() - began
            self.counters.loaded_bytes += extent.nbytes
            self._check_block(extent, layout, block)
        return block

    def close(self) -> None:
        """Close the store and forget what is resident."""
        self.residency.clear()
        self.store.close()

    def _check_block(self, extent: Extent, layout: LayerLayout, block: KVBlock) -> None:
        shape = (extent.rows, layout.kv_heads, extent.tokens)
        for name, tensor, size in (("keys", block.keys, layout.key_size), ("values", block.values, layout.value_size)):
            if tensor.shape != (*shape, size) or tensor.dtype != layout.dtype:
                raise StoreContractError(
                    f"KV store '{self.strategy}': decode() of {extent} gave {name} {tuple(tensor.shape)} "
                    f"{tensor.dtype}, expected {(*shape, size)} {layout.dtype}."
                )


def _place(extent: Extent) -> tuple[int, int, int, int]:
    return extent.layer, extent.start, extent.tokens, extent.rows
