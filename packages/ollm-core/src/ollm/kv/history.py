"""One layer's keys and values since the beginning: extents in the store, then the tail.

Knows the rows of the batch and what is being appended. Where tokens are is the table's business, writing the writer's,
reading the source's; nothing here knows attention, masks or how a store keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs
import torch
from torch import Tensor

from ollm.attention.blockwise import Block
from ollm.contracts.blocks import KVLayout
from ollm.errors import BatchMismatchError
from ollm.kv.handle import KVHandle
from ollm.kv.session import KVSession
from ollm.kv.table import Entries, LayerTable
from ollm.kv.tail import Tail


@attrs.frozen
class _Past:
    """What a layer held at one moment: extents, then blocks in memory."""

    entries: Entries
    recent: list[Block]


class LayerHistory:
    """All tokens of one layer. `append` and `gather` take and give `[rows, kv_heads, tokens, size]`."""

    def __init__(self, layer: int, session: KVSession, *, branch: int = 0) -> None:
        """Empty.

        Args:
            layer: its number in the model.
            session: of the cache.
            branch: the cache's number in the session.
        """
        self.table = LayerTable(session.table, layer, branch)
        self.tail = Tail()
        self.rows = 0
        self.next: Callable[[], LayerHistory | None] = lambda: None
        """The layer that a step visits after this one, and after the last the first: a weak reference."""
        self.differentiable = False
        """Whether something was appended that a gradient could go back to. What is kept has none."""
        self._session = session
        self._layout: KVLayout | None = None
        self._held: _Past | None = None
        self._before: tuple[Tail, int, int, KVLayout | None] | None = None

    @property
    def tokens(self) -> int:
        """Tokens in all: the true sequence length."""
        return self.table.tokens + self.tail.tokens

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens. After an error the history is what it was, unless what left a window was being given back."""
        self.differentiable |= torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
        keys, values = self._checked(keys.detach(), values.detach())
        session, store = self._session, self._session.store
        session.give_back()
        self.tail = session.writer.append(self.table, self.tail, keys, values)
        if store.window is not None:
            self.table.evict(self.tokens, store.window, store.sinks)
        session.give_back()

    def gather(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Everything that came before, with the given tokens behind it, as two tensors of their own."""
        before, stored = self.tokens, self.table.tokens
        given = keys, values
        keys, values = self._checked(keys, values)
        if before == 0:
            return given
        shape = (*keys.shape[:2], before + keys.shape[2])
        all_keys = keys.new_empty((*shape, keys.shape[3]))
        all_values = values.new_empty((*shape, values.shape[3]))
        with self._session.table.pinned():
            self._session.source.copy(self.table.entries, self.following, all_keys, all_values)
        if self.tail.tokens:
            all_keys[:, :, stored:before] = self.tail.keys
            all_values[:, :, stored:before] = self.tail.values
        all_keys[:, :, before:] = keys
        all_values[:, :, before:] = values
        return all_keys, all_values

    def handle(self, keys: Tensor, values: Tensor) -> KVHandle:
        """The same as `gather`, as blocks that are read when attention asks for them."""
        keys, values = self._checked(keys.detach(), values.detach())
        newest = Block(self.tokens, keys, values)
        if self._held is not None:
            self._held.recent.append(newest)
            return KVHandle(self._session, self.table.layer, self._held.entries, self._held.recent, self.following)
        before = self._past()
        recent = [*before.recent, newest]
        return KVHandle(self._session, self.table.layer, before.entries, recent, self.following)

    def following(self) -> Iterator[Entries]:
        """What the layers hold that are visited after this one, until it is its turn again."""
        history = self.next()
        while history is not None and history is not self:
            yield history.table.entries
            history = history.next()
        yield self.table.entries

    @contextmanager
    def held(self) -> Iterator[None]:
        """Until the end of the `with` block, what is appended stays in memory too, so that it is not read back: for a
        layer that takes a prompt in several pieces, one after the other. After an error the history is what it was,
        unless some of that has left a window meanwhile: then it keeps what was appended."""
        before, self._held = self.tokens, self._past()
        with self._session.table.pinned():
            try:
                yield
            except BaseException:
                if self.why_not_crop(before) is None:
                    self.crop(before)
                raise
            finally:
                self._held = None

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens: cuts the tail, then the list of extents, and moves no byte."""
        if length > self.table.tokens:
            self.tail.crop(length - self.table.tokens)
        else:
            self.table.crop(length)
            self.tail = Tail()
        if length == 0:
            self.rows, self._layout, self.differentiable = 0, None, False
        self._session.give_back()

    def fork(self, branch: int) -> LayerHistory:
        """The same tokens again in another cache, of which nothing that is stored is copied."""
        fork = LayerHistory(self.table.layer, self._session, branch=branch)
        if self.tail.tokens:
            fork.tail.append(self.tail.keys, self.tail.values)
        fork.rows, fork._layout, fork.differentiable = self.rows, self._layout, self.differentiable
        fork.table = self.table.fork(branch)
        return fork

    def begin(self) -> None:
        """Remember what there is, so that whatever is appended from now on can be undone, until `keep`. Copies nothing.
        Nothing but `append`, and `crop` to no less than there was, may come in between."""
        self._before = self.tail, self.tail.tokens, self.rows, self._layout
        self.table.begin()

    def keep(self) -> None:
        """What was appended since `begin` stays. Does nothing without it."""
        self._before = None
        self.table.keep()

    def undo(self) -> None:
        """Be what it was at `begin`. Does nothing without it, and can be called again after an interrupt."""
        if self._before is None:
            return
        self.table.undo()
        tail, tokens, self.rows, self._layout = self._before
        tail.crop(tokens)
        self.tail, self._before = tail, None

    def close(self) -> None:
        """Give up what it has. May be called twice."""
        self.keep()
        self.crop(0)

    def why_not_crop(self, length: int) -> str | None:
        """Why the first `length` tokens cannot be kept alone: a later query would miss some that left the window."""
        window, gone = self._session.store.window, self.table.first_kept
        if window is None or not gone or length == 0 or gone <= max(length - window, 0):
            return None
        return f"tokens before {gone} have left the window of {window} tokens and are gone"

    def select_rows(self, index: Tensor) -> None:
        """Make the batch `batch[index]`, copying nothing that is stored. `index`: int64, on any device."""
        if not self.rows:
            return
        entries = self.table.rows_selected(index.to("cpu"))
        self.tail.select_rows(index)
        self.table.entries = entries
        self.rows = len(index)

    def _past(self) -> _Past:
        recent = [Block(self.table.tokens, self.tail.keys, self.tail.values)] if self.tail.tokens else []
        return _Past(self.table.entries, recent)

    def _checked(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one dtype, as wide as any that came before: under autocast they come in several, and where
        stock caches join them, the widest wins. While the layer is empty, learn the shapes; afterwards they must stay.
        """
        self._session.raise_failed()
        before = self._layout if self.tokens else None
        dtype = torch.promote_types(keys.dtype, values.dtype)
        if before is not None:
            dtype = torch.promote_types(dtype, before.dtype)
        keys, values = keys.to(dtype), values.to(dtype)
        layout = KVLayout.of(keys, values)
        if before is None:
            self.rows = keys.shape[0]
        elif layout != attrs.evolve(before, dtype=dtype) or keys.shape[0] != self.rows:
            raise BatchMismatchError(
                f"This cache holds {self.rows} rows of {before}, and {keys.shape[0]} rows of {layout} were "
                "appended. A cache serves one batch: call reset() or make another cache."
            )
        self._layout = layout
        return keys, values
