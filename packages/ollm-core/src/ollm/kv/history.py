"""One layer's keys and values since the beginning: extents in the store, then the tail.

Knows positions, rows and when to flush. Knows nothing of attention, masks or how a store keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import torch
from torch import Tensor

from ollm.attention.blockwise import Block
from ollm.contracts.kv import KVBlock
from ollm.errors import BatchMismatchError
from ollm.kv.handle import KVHandle
from ollm.kv.rows import RowMap, select, take
from ollm.kv.session import KVSession
from ollm.kv.source import Stored
from ollm.kv.tail import Pending, Tail
from ollm.storage.tensors import LayerLayout


@attrs.frozen
class _Past:
    """What a layer held at one moment: extents with their row maps, then blocks in memory."""

    stored: tuple[Stored, ...]
    recent: list[Block]


class LayerHistory:
    """All tokens of one layer. `append` and `gather` take and give `[rows, kv_heads, tokens, size]`."""

    def __init__(self, layer: int, session: KVSession) -> None:
        self.layer = layer
        self.tail = Tail()
        self.rows = 0
        self._session = session
        self._layout: LayerLayout | None = None
        self._device = torch.device("cpu")
        self._row_maps: list[RowMap] = []
        self._held: _Past | None = None
        self._evicted = 0

    @property
    def stored_tokens(self) -> int:
        """Tokens in the store."""
        extents = self._session.store.extents(self.layer)
        return extents[-1].stop if extents else 0

    @property
    def tokens(self) -> int:
        """Tokens in all: the true sequence length."""
        return self.stored_tokens + self.tail.tokens

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens, flushing the tail when the plan says so. After an error the history is what it was."""
        self._check(keys, values)
        pending = Pending(self.tail, keys, values)
        flush = self._tokens_to_flush(pending.tokens)
        if not flush:
            self.tail.append(keys, values)
            return
        # made first: once the extents are stored, nothing may fail any more
        rest = Tail()
        if flush < pending.tokens:
            rest.append(*pending.slice(flush, pending.tokens))
        before = self.stored_tokens
        try:
            for start, stop in self._cuts(flush):
                self._session.append(self.layer, *pending.slice(start, stop))
        except BaseException:
            self._session.truncate(self.layer, before)
            self._session.release_unread()
            raise
        self._row_maps += [None] * (len(self._session.store.extents(self.layer)) - len(self._row_maps))
        self.tail = rest
        self._session.counters.spills += 1
        self._evict()

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Everything that came before, with the given tokens behind it, as two tensors of their own."""
        self._check(keys, values)
        before = self.tokens
        if before == 0:
            return keys, values
        shape = (*keys.shape[:2], before + keys.shape[2])
        all_keys = keys.new_empty((*shape, keys.shape[3]))
        all_values = values.new_empty((*shape, values.shape[3]))
        self._fill(all_keys, all_values)
        stored = before - self.tail.tokens
        if self.tail.tokens:
            all_keys[:, :, stored:before] = self.tail.keys
            all_values[:, :, stored:before] = self.tail.values
        all_keys[:, :, before:] = keys
        all_values[:, :, before:] = values
        return all_keys, all_values

    def handle(self, keys: Tensor, values: Tensor) -> KVHandle:
        """The same as `gather`, as blocks that are read when attention asks for them."""
        self._check(keys, values)
        layout = self._layout or LayerLayout.of(keys, values)
        newest = Block(self.tokens, keys, values)
        if self._held is not None:
            self._held.recent.append(newest)
            return KVHandle(self._session, layout, self._held.stored, self._held.recent)
        before = self._past()
        return KVHandle(self._session, layout, before.stored, [*before.recent, newest])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Until the end of the `with` block, what is appended stays in memory too, so that it is not read back: for a
        layer that takes a prompt in several pieces, one after the other. After an error the history is what it was,
        but for what has left a window meanwhile."""
        before, self._held = self.tokens, self._past()
        with self._session.snapshot([extent for extent, _ in self._held.stored]):
            try:
                yield
            except BaseException:
                if self.why_not_crop(before) is None:
                    self.crop(before)
                raise
            finally:
                self._held = None

    def _past(self) -> _Past:
        recent = [Block(self.stored_tokens, self.tail.keys, self.tail.values)] if self.tail.tokens else []
        return _Past(self._stored(), recent)

    def _stored(self) -> tuple[Stored, ...]:
        return tuple(zip(self._session.store.extents(self.layer), self._row_maps, strict=True))

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens: cuts the tail, then whole extents, then puts the remainder in the tail."""
        stored = self.stored_tokens
        if length >= stored:
            self.tail.crop(length - stored)
        else:
            rest, border = self._remainder(length)
            self._session.truncate(self.layer, border)
            del self._row_maps[len(self._session.store.extents(self.layer)) :]
            self.tail = rest
        if length == 0:
            self.rows, self._layout, self._evicted = 0, None, 0
        self._session.release_unread()

    def why_not_crop(self, length: int) -> str | None:
        """Why the first `length` tokens cannot be kept alone: a later query would miss some that left the window."""
        window = self._session.store.window
        if window is None or not self._evicted or length == 0 or self._evicted <= max(length - window, 0):
            return None
        return f"tokens before {self._evicted} have left the window of {window} tokens and are gone"

    def _evict(self) -> None:
        """Let the store drop extents that no later query sees; the newest stays, for positions are counted from it."""
        store = self._session.store
        if store.window is None:
            return
        border = self.tokens - store.window
        extents = store.extents(self.layer)
        gone = [extent for extent in extents[:-1] if store.sinks <= extent.start and extent.stop <= border]
        if gone:
            keep = [index for index, extent in enumerate(extents) if extent not in gone]
            self._session.evict(self.layer, gone)
            self._row_maps = [self._row_maps[index] for index in keep]
            self._evicted = gone[-1].stop

    def select_rows(self, index: Tensor) -> None:
        """Make the batch `batch[index]`, copying nothing that is stored. `index`: int64, on any device."""
        if not self.rows:
            return
        row_maps = select(self._row_maps, index.to("cpu"))
        self.tail.select_rows(index)
        self._row_maps = row_maps
        self.rows = len(index)

    def _fill(self, keys: Tensor, values: Tensor) -> None:
        """Copy all stored tokens to the front of two tensors."""
        assert self._layout is not None

        def out(start: int, stop: int) -> KVBlock:
            return KVBlock(keys[:, :, start:stop], values[:, :, start:stop])

        mapped = {extent: row_map for extent, row_map in self._stored() if row_map is not None}
        with self._session.snapshot(self._session.store.extents(self.layer)):
            for part in self._session.source.blocks(
                self._stored(),
                self._layout,
                lambda extent: None if extent in mapped else out(extent.start, extent.stop),
            ):
                target = out(part.start, part.start + part.block.keys.shape[2])
                for ours, theirs in ((target.keys, part.block.keys), (target.values, part.block.values)):
                    if ours.data_ptr() != theirs.data_ptr():
                        ours.copy_(take(theirs, part.row_map))

    def _remainder(self, length: int) -> tuple[Tail, int]:
        """What stays of the extent that `length` cuts in two, as a tail with today's rows, and where it begins."""
        assert self._layout is not None
        rest = Tail()
        for extent, row_map in self._stored():
            if extent.start < length < extent.stop:
                with self._session.snapshot([extent]):
                    for part in self._session.source.blocks([(extent, row_map)], self._layout):
                        kept = slice(0, length - extent.start)
                        rest.append(
                            take(part.block.keys, row_map)[:, :, kept].to(self._device),
                            take(part.block.values, row_map)[:, :, kept].to(self._device),
                        )
                return rest, extent.start
        return rest, length

    def _tokens_to_flush(self, pending: int) -> int:
        """How many of the pending tokens leave the tail now."""
        assert self._layout is not None
        plan = self._session.plan
        if pending < plan.flush_tokens and self._layout.nbytes(self.rows, pending) < plan.flush_bytes:
            return 0
        flush = max(pending - plan.hot_tokens, 0)
        size = self._session.store.extent_tokens
        return flush - flush % size if size else flush

    def _cuts(self, tokens: int) -> list[tuple[int, int]]:
        """Split so many tokens into extents: as the store wants them, else of about equal size up to a limit."""
        assert self._layout is not None
        size = self._session.store.extent_tokens
        if size is None and self._session.store.in_memory:
            return [(0, tokens)]  # nothing is read: the fewer, the better
        if size is None:
            most = max(self._session.source.extent_bytes // self._layout.nbytes(self.rows, 1), 1)
            pieces = -(-tokens // most)
            size = -(-tokens // pieces)
        return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def _check(self, keys: Tensor, values: Tensor) -> None:
        """While the layer is empty, learn the shapes; afterwards they must stay."""
        self._session.settle()
        layout = LayerLayout.of(keys, values)
        if not self.tokens:
            self._layout, self.rows, self._device = layout, keys.shape[0], keys.device
        elif layout != self._layout or keys.shape[0] != self.rows:
            raise BatchMismatchError(
                f"Layer {self.layer} holds {self.rows} rows of {self._layout}, and {keys.shape[0]} rows of {layout} "
                "were appended. A cache serves one batch: call reset() or make another cache."
            )
