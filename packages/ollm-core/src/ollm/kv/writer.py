"""`Writer`: cuts what leaves the tail into extents and hands them to the store.

Knows when something is flushed and into how many pieces. Nothing of a layer changes before everything is written: after
an error its table and its tail are what they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import Tensor

from ollm.contracts.blocks import EXTENT_BYTES, BlockKey, Extent, KVBlock, KVLayout, Location
from ollm.contracts.kv import KVStore
from ollm.contracts.spill import SpillPlan
from ollm.errors import StoreContractError
from ollm.kv.flushing import cuts, even, tokens_to_flush
from ollm.kv.source import BlockSource
from ollm.kv.state import KVCounters
from ollm.kv.table import BlockTable, Entry, LayerTable
from ollm.kv.tail import Pending, Tail


class Writer:
    """Writes for a cache and its forks."""

    def __init__(
        self,
        store: KVStore,
        plan: SpillPlan,
        *,
        strategy: str,
        lossless: bool,
        table: BlockTable,
        source: BlockSource,
        counters: KVCounters,
        give_back: Callable[[], None],
    ) -> None:
        """Nothing is written yet.

        Args:
            store, plan, strategy, lossless: as of `KVSession`.
            table, source, counters: the session's.
            give_back: frees what nobody reads any more.
        """
        self._store = store
        self._plan = plan
        self._strategy = strategy
        self._lossless = lossless
        self._table = table
        self._source = source
        self._counters = counters
        self._give_back = give_back

    def append(self, layer: LayerTable, tail: Tail, keys: Tensor, values: Tensor) -> Tail:
        """Add tokens behind a layer's tail, and store what should not stay there; the tail that is left, which is the
        same one where nothing was stored."""
        layout, rows = KVLayout.of(keys, values), keys.shape[0]
        short = self._short(layer)
        flush = tokens_to_flush(
            self._plan,
            self._store.extent_tokens,
            layout.nbytes(rows, 1),
            pending=tail.tokens + keys.shape[2],
            short=short.extent.visible if short else 0,
        )
        if not flush:
            tail.append(keys, values)
            return tail
        parts = [(tail.keys, tail.values)] if tail.tokens else []
        if short:
            with self._table.pinned():
                parts.insert(0, self._source.tensors(short, keys.device))
        pending = Pending([*parts, (keys, values)])
        rest = Tail()  # made first: once the extents are stored, nothing may fail any more
        if flush < pending.tokens:
            rest.append(*pending.slice(flush, pending.tokens))
        start = short.start if short else layer.tokens
        before, written = layer.entries, list[Location]()
        try:
            extents = self._write(layer, start, layout, pending, flush, written)
            layer.append(extents, instead_of_last=short is not None)
        except BaseException:
            if layer.entries is before:
                self._table.discard(written)
                with suppress(Exception):  # the first error is told, and what is not freed now the next one frees
                    self._give_back()
            raise
        self._counters.spills += 1
        self._counters.saved_bytes += layout.nbytes(rows, layer.tokens - (short.stop if short else start))
        return rest

    def _short(self, layer: LayerTable) -> Entry | None:
        """The last extent, if it shows fewer tokens than the store wants in one: it is taken back and written anew as
        it grows. But not where other rows share its tokens, or where writing them again would lose something again."""
        last = layer.entries.items[-1] if layer.entries.items else None
        if last is None or last.row_map is not None or not self._lossless:
            return None
        return last if last.extent.visible < (self._store.extent_tokens or 0) else None

    def _write(
        self, layer: LayerTable, start: int, layout: KVLayout, pending: Pending, tokens: int, written: list[Location]
    ) -> Sequence[Extent]:
        """Store the first `tokens` of what is pending, the first of which has position `start`. Where anything is
        stored is added to `written`."""
        extents: list[Extent] = []
        for low, high in cuts(tokens, self._extent_tokens(layout, pending.rows, tokens)):
            key = BlockKey(layer.layer, layer.branch, start + low, high - low, pending.rows)
            block = KVBlock(*pending.slice(low, high))
            began = time.perf_counter()
            written.append(self._store.write(block, key))
            self._check(written, key)
            self._counters.save_seconds += time.perf_counter() - began
            extents.append(Extent.of(key, layout, written[-1]))
            self._source.keep(extents[-1], block)
        return extents

    def _extent_tokens(self, layout: KVLayout, rows: int, tokens: int) -> int:
        """The size of the extents into which so many tokens should be cut."""
        if self._store.extent_tokens is not None:
            return self._store.extent_tokens
        if self._store.in_memory:
            return tokens  # nothing is read: the fewer, the better
        return even(tokens, max(min(self._source.extent_bytes, EXTENT_BYTES) // layout.nbytes(rows, 1), 1))

    def _check(self, written: list[Location], key: BlockKey) -> None:
        """Whether what a store answered last can be an answer."""
        location: object = written[-1]
        if not isinstance(location, Location) or location.nbytes < 0:
            written.pop()
            raise StoreContractError(
                f"KV store '{self._strategy}': write() of {key.tokens} tokens at {key.start} of layer {key.layer} gave "
                f"{location!r}; it must give the Location where they are."
            )
