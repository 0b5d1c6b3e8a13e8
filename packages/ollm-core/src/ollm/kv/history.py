"""One layer's keys and values since the beginning: extents in the store, then the tail.

Knows positions, rows and when to flush. Knows nothing of attention, masks or how a store keeps its bytes. The history
of a fork begins with the extents of the one that it came from; what it adds has a layer number of its own in the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import attrs
import torch
from torch import Tensor

from ollm.attention.blockwise import Block
from ollm.errors import BatchMismatchError
from ollm.kv.copies import as_tail, copy_stored
from ollm.kv.flushing import cuts, even, tokens_to_flush
from ollm.kv.handle import KVHandle
from ollm.kv.rows import Stored, select
from ollm.kv.session import KVSession
from ollm.kv.tail import Pending, Tail
from ollm.storage.tensors import LayerLayout


@attrs.frozen
class _Past:
    """What a layer held at one moment: extents, then blocks in memory."""

    stored: tuple[Stored, ...]
    recent: list[Block]


class LayerHistory:
    """All tokens of one layer. `append` and `gather` take and give `[rows, kv_heads, tokens, size]`."""

    def __init__(self, layer: int, session: KVSession) -> None:
        """Empty; `layer` is its number in the store."""
        self.layer = layer
        self.tail = Tail()
        self.rows = 0
        self.next: Callable[[], LayerHistory | None] = lambda: None
        """The layer that a step visits after this one, and after the last the first: a weak reference."""
        self.evictions = self.evicted_tokens = 0
        """How often tokens left the window, and how many."""
        self._session = session
        self._layout: LayerLayout | None = None
        self._device = torch.device("cpu")
        self._shared: tuple[Stored, ...] = ()
        self._base = 0  # where its own tokens begin
        self._own: tuple[Stored, ...] = ()
        self._held: _Past | None = None
        self._first_kept = 0

    @property
    def shared_tokens(self) -> int:
        """Tokens whose extents belong to the cache that this one was forked from."""
        return sum(part.extent.tokens for part in self._shared)

    @property
    def stored(self) -> tuple[Stored, ...]:
        """The extents, in order of position."""
        return (*self._shared, *self._own)

    @property
    def stored_tokens(self) -> int:
        """Tokens in the store."""
        return self._own[-1].stop if self._own else self._base

    @property
    def tokens(self) -> int:
        """Tokens in all: the true sequence length."""
        return self.stored_tokens + self.tail.tokens

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens. After an error the history is what it was, unless what left a window was being given back."""
        layout = self._check(keys, values)
        short = self._short_extent()
        flush = tokens_to_flush(
            self._session.plan,
            self._session.store.extent_tokens,
            layout.nbytes(self.rows, 1),
            pending=self.tail.tokens + keys.shape[2],
            short=short.extent.tokens if short else 0,
        )
        if not flush:
            self.tail.append(keys, values)
            return
        try:
            if short:
                self._unwrite(short)
            self._flush(Pending(self.tail, keys, values), flush)
        except BaseException:
            self._session.truncate(self.layer, self._own[-1].extent.stop if self._own else 0)
            self._session.release_unread()
            raise
        self._session.counters.spills += 1
        self._session.release_unread()
        self._evict()

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Everything that came before, with the given tokens behind it, as two tensors of their own."""
        layout = self._check(keys, values)
        before = self.tokens
        if before == 0:
            return keys, values
        shape = (*keys.shape[:2], before + keys.shape[2])
        all_keys = keys.new_empty((*shape, keys.shape[3]))
        all_values = values.new_empty((*shape, values.shape[3]))
        with self._session.snapshot([part.extent for part in self.stored]):
            copy_stored(self._session.source, self.stored, layout, self.following, all_keys, all_values)
        stored = before - self.tail.tokens
        if self.tail.tokens:
            all_keys[:, :, stored:before] = self.tail.keys
            all_values[:, :, stored:before] = self.tail.values
        all_keys[:, :, before:] = keys
        all_values[:, :, before:] = values
        return all_keys, all_values

    def handle(self, keys: Tensor, values: Tensor) -> KVHandle:
        """The same as `gather`, as blocks that are read when attention asks for them."""
        layout = self._check(keys, values)
        newest = Block(self.tokens, keys, values)
        if self._held is not None:
            self._held.recent.append(newest)
            return KVHandle(self._session, layout, self._held.stored, self._held.recent, self.following)
        before = self._past()
        return KVHandle(self._session, layout, before.stored, [*before.recent, newest], self.following)

    def following(self) -> Iterator[Sequence[Stored]]:
        """The extents of the layers that are visited after this one, until it is its turn again."""
        history = self.next()
        while history is not None and history is not self:
            yield history.stored
            history = history.next()
        yield self.stored

    @contextmanager
    def held(self) -> Iterator[None]:
        """Until the end of the `with` block, what is appended stays in memory too, so that it is not read back: for a
        layer that takes a prompt in several pieces, one after the other. After an error the history is what it was,
        but for what has left a window meanwhile."""
        before, self._held = self.tokens, self._past()
        with self._session.snapshot([part.extent for part in self._held.stored]):
            try:
                yield
            except BaseException:
                if self.why_not_crop(before) is None:
                    self.crop(before)
                raise
            finally:
                self._held = None

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens: cuts the tail, then whole extents, then puts the remainder in the tail, or
        leaves it in the store where that `trims`."""
        stored, trims = self.stored_tokens, self._session.store.trims
        if length >= stored:
            self.tail.crop(length - stored)
        else:
            cut = next((part for part in self.stored if part.start < length < part.stop), None)
            if cut is not None and trims and cut in self._own:
                self._truncate(length)
                self.tail = Tail()
            else:
                rest = Tail() if cut is None else self._remainder(cut, length)
                self._truncate(length if cut is None else cut.start)
                self.tail = rest
        if length == 0:
            self.rows, self._layout, self._first_kept = 0, None, 0
        self._session.release_unread()

    def fork(self, layer: int) -> LayerHistory:
        """The same tokens again, of which nothing that is stored is copied; `layer` is the new one's number."""
        fork = LayerHistory(layer, self._session)
        fork._shared, fork._base = self.stored, self.stored_tokens
        fork.rows, fork._layout, fork._device = self.rows, self._layout, self._device
        fork._first_kept = self._first_kept
        if self.tail.tokens:
            fork.tail.append(self.tail.keys, self.tail.values)
        self._session.pins.pin([part.extent for part in fork._shared])
        return fork

    def close(self) -> None:
        """Give up what is its own, and what it shares. May be called twice."""
        self.crop(0)

    def why_not_crop(self, length: int) -> str | None:
        """Why the first `length` tokens cannot be kept alone: a later query would miss some that left the window."""
        store, window = self._session.store, self._session.store.window
        if store.trims and any(part.start < length < part.stop for part in self._shared):
            return "an extent would be cut in two that another cache shares, and encoding it again would lose something"
        if window is None or not self._first_kept or length == 0 or self._first_kept <= max(length - window, 0):
            return None
        return f"tokens before {self._first_kept} have left the window of {window} tokens and are gone"

    def select_rows(self, index: Tensor) -> None:
        """Make the batch `batch[index]`, copying nothing that is stored. `index`: int64, on any device."""
        if not self.rows:
            return
        stored = select(self.stored, index.to("cpu"))
        self.tail.select_rows(index)
        self._shared, self._own = stored[: len(self._shared)], stored[len(self._shared) :]
        self.rows = len(index)

    def _past(self) -> _Past:
        recent = [Block(self.stored_tokens, self.tail.keys, self.tail.values)] if self.tail.tokens else []
        return _Past(self.stored, recent)

    def _short_extent(self) -> Stored | None:
        """The last extent, if it is shorter than the store wants them, so that it can grow."""
        store, last = self._session.store, self._own[-1] if self._own else None
        if last is None or last.row_map is not None or store.trims:  # which must not encode again
            return None
        return last if last.extent.tokens < (store.extent_tokens or 0) else None

    def _unwrite(self, last: Stored) -> None:
        """Take the last extent back into the tail."""
        rest = self._remainder(last, last.stop)
        if self.tail.tokens:
            rest.append(self.tail.keys, self.tail.values)
        self._own, self.tail = self._own[:-1], rest
        self._session.truncate(self.layer, last.extent.start)

    def _flush(self, pending: Pending, tokens: int) -> None:
        """Store the first `tokens` of what is pending; the rest is the new tail."""
        rest = Tail()  # made first: once the extents are stored, nothing may fail any more
        if tokens < pending.tokens:
            rest.append(*pending.slice(tokens, pending.tokens))
        written = []
        start = self.stored_tokens
        for low, high in cuts(tokens, self._extent_tokens(tokens)):
            extent = self._session.append(self.layer, *pending.slice(low, high))
            written.append(Stored(extent, start + low))
        self._own, self.tail = (*self._own, *written), rest

    def _extent_tokens(self, tokens: int) -> int:
        """The size of the extents into which so many tokens should be cut."""
        store = self._session.store
        if store.extent_tokens is not None:
            return store.extent_tokens
        if store.in_memory:
            return tokens  # nothing is read: the fewer, the better
        assert self._layout is not None
        most = max(self._session.source.extent_bytes // self._layout.nbytes(self.rows, 1), 1)
        return even(tokens, most)

    def _remainder(self, part: Stored, length: int) -> Tail:
        """The tokens of an extent before position `length` as a tail with today's rows; they will be stored again."""
        assert self._layout is not None
        with self._session.snapshot([part.extent]):
            rest = as_tail(self._session.source, part, self._layout, length - part.start, self._device)
        self._session.counters.saved_bytes -= self._layout.nbytes(self.rows, rest.tokens)
        return rest

    def _evict(self) -> None:
        """Let the store drop extents that no later query sees; the newest stays, for positions are counted from it."""
        store = self._session.store
        if store.window is None:
            return
        border = self.tokens - store.window

        def left(part: Stored) -> bool:
            return store.sinks <= part.start and part.stop <= border

        shared = [part for part in self._shared if left(part)] if self._own else []
        own = [part for part in self._own[:-1] if left(part)]
        if not shared and not own:
            return
        if own:
            self._session.evict(self.layer, [part.extent for part in own])
        self._session.pins.unpin([part.extent for part in shared])
        self._shared = tuple(part for part in self._shared if part not in shared)
        self._own = tuple(part for part in self._own if part not in own)
        self.evictions += 1
        self.evicted_tokens += sum(part.extent.tokens for part in (*shared, *own))
        self._first_kept = (*shared, *own)[-1].stop
        self._session.release_unread()

    def _truncate(self, length: int) -> None:
        """Drop what is stored from position `length` on, which is a border, unless the store trims."""
        shared = tuple(part for part in self._shared if part.stop <= length)
        kept = self._session.truncate(self.layer, max(length - self._base, 0))
        self._session.pins.unpin([part.extent for part in self._shared[len(shared) :]])
        self._shared, self._base = shared, min(self._base, length)
        self._own = tuple(attrs.evolve(part, extent=extent) for part, extent in zip(self._own, kept, strict=False))

    def _check(self, keys: Tensor, values: Tensor) -> LayerLayout:
        """While the layer is empty, learn the shapes; afterwards they must stay. The layout."""
        self._session.settle()
        layout = LayerLayout.of(keys, values)
        if not self.tokens:
            self._layout, self.rows, self._device = layout, keys.shape[0], keys.device
        elif layout != self._layout or keys.shape[0] != self.rows:
            raise BatchMismatchError(
                f"This cache holds {self.rows} rows of {self._layout}, and {keys.shape[0]} rows of {layout} were "
                "appended. A cache serves one batch: call reset() or make another cache."
            )
        return layout
