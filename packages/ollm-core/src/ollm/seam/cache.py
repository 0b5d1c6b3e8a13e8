"""`KVCache`: a real `transformers.Cache` whose full-attention layers live in a store.

Give it to any `model.generate(past_key_values=cache)`. Made by `ollm.disk_cache` and `Inference.DiskCache`.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ollm.changes import Change, ChangesFor
from ollm.errors import (
    CacheBusyError,
    CacheClosedError,
    ConfigurationError,
    InterruptedForwardError,
    UnsupportedOperationError,
)
from ollm.kv.history import LayerHistory
from ollm.kv.ids import TokenIds
from ollm.kv.session import KVSession
from ollm.kv.state import CacheState, KVCounters, PrefillProgress
from ollm.seam.geometry import layer_types
from ollm.seam.layers import (
    check_every_layer_has,
    copy_of,
    grows,
    is_stored,
    memory_bytes,
    stock_layer,
    stored_layer,
    why_not_croppable,
)
from ollm.seam.passes import Pass


class KVCache(Cache):
    """Keys and values of one batch of sequences. Not thread-safe; `reset()` makes it reusable, `close()` ends it.

    Beams, batches, `crop`, continued generation and chunked prefill work as with `DynamicCache` and give the same
    tokens for every lossless strategy.
    """

    def __init__(
        self,
        config: Any,
        session: KVSession,
        *,
        spill_policy: str,
        lossless: bool,
        switch_on: Change | None = None,
        mode_reason: str = "",
        origin: KVCache | None = None,
        changes: Sequence[Change] = (),
    ) -> None:
        """For the decoder `config`; use `ollm.disk_cache` instead of calling this.

        Args:
            config: of the decoder.
            session: over an empty store.
            spill_policy, lossless, mode_reason: for `state()`.
            switch_on: for block mode: switches the model to it and returns what undoes that, which is called when the
                cache is closed or dropped; `None` for tensor mode.
            origin: the cache that this one is a fork of, which does the same to the model.
            changes: what else is done to the model.
        """
        self._config = config
        self._blocks: bool = origin._blocks if origin else switch_on is not None
        self.changes = ChangesFor(self)  # what is done to the model while the cache is open; a fork does the same
        self._mode_reason = mode_reason
        self.piece_tokens: int | None = None
        """The longest piece of a prompt that a layer takes at once, tokens of all rows; `None` for all of it."""
        self.progress: Callable[[PrefillProgress], None] | None = None
        """Called after every piece of every layer of a prefill."""
        self._session = session
        self._spill_policy = spill_policy
        self._lossless = lossless
        self._closed = False
        self.piece: tuple[int, int] | None = None
        """While a layer takes a prompt in pieces: the tokens it has taken, and those of the whole prompt."""
        self.at_work = threading.Lock()
        """Taken during a forward pass."""
        self.running: Pass | None = None
        """The forward pass that is under way, or could not be undone yet."""
        self.passes = 0
        """How many forward passes the cache has seen."""
        self.new_tokens: int | None = None
        """How many `generate`, which has just been called, is expected to pass to the model first."""
        self._ids: TokenIds = origin._ids.fork() if origin else TokenIds()
        self._room: dict[int, dict[tuple[str, int], Tensor]] = {}
        self._stored: dict[int, LayerHistory] = {}
        self._layer_types = layer_types(config)
        self._branch = session.join()
        for index, (kind, _) in enumerate(self._layer_types):
            if is_stored(kind):
                before = origin._stored[index] if origin else None
                history = before.fork(self._branch) if before else LayerHistory(index, session, branch=self._branch)
                self._stored[index] = history
        histories = list(self._stored.values())
        for history, following in zip(histories, histories[1:] + histories[:1], strict=True):
            history.next = weakref.ref(following)
        self._leave = weakref.finalize(self, session.leave_soon, self._branch, functools.partial(_close_all, histories))
        self._leave.atexit = False  # at exit the store goes as well
        super().__init__(layers=[self._new_layer(index) for index in range(len(self._layer_types))])
        self._attention_layers = [i for i, layer in enumerate(self.layers) if isinstance(layer, CacheLayerMixin)]
        self.changes.make(*(origin.changes.made if origin else (*changes, *([switch_on] if switch_on else ()))))

    @property
    def token_ids(self) -> Tensor:
        """The ids of all tokens that the cache holds, `[rows, tokens]`, int64; -1 for those that came as embeddings."""
        rows = next((history.rows for history in self._stored.values()), len(self._ids.ids))
        self._ids.fill(rows, self.get_seq_length(), self._ids.ids.device)
        return self._ids.ids.clone()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def blocks(self) -> bool:
        """Whether it is in block mode."""
        return self._blocks

    @property
    def counters(self) -> KVCounters:
        """Bytes and seconds of loading and saving so far; a live object."""
        return self._session.counters

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values; returns all of that layer's. When a forward pass fails, what it added to
        any layer is taken back.

        Raises:
            CacheClosedError: after `close()`.
            StorageError: when the store cannot keep or read them; this layer is then as before.
        """
        self.check_open()
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def begin_pass(self) -> Pass:
        """A forward pass begins, with `at_work` taken: what every layer holds is remembered.

        Raises:
            InterruptedForwardError: layers hold different numbers of tokens, or an earlier pass cannot be undone.
            CacheClosedError: after `close()`.
        """
        self._settle()
        self.running = Pass(self.layers, self._attention_layers, self._stored, self._ids)
        self.running.begin(self._room)
        return self.running

    def end_pass(self, ids: Tensor | None, tokens: int | None) -> None:
        """It was successful, and was given these ids `[rows, tokens]`, if there were any, or so many tokens.

        Raises:
            CacheNotFilledError: the layers do not have what was given.
            CacheClosedError: it was closed meanwhile.
        """
        running = self.running
        assert running is not None
        if self._closed:
            self.check_open()
        running.note(ids, running.check(tokens))
        self.passes += 1
        self.running = None  # from here on it counts
        running.keep()

    def undo_pass(self) -> None:
        """Make every layer what it was before the pass that is under way, or failed. Does nothing without one."""
        running = self.running
        if running is not None and not self._closed:
            running.undo()
            self._session.give_back()
        self.running = None

    def first_difference(self, ids: Tensor) -> tuple[int, int] | None:
        """Position and row of the first of the ids `[rows, tokens]` that is not what the cache holds there; `None` if
        there is none. With several beams per row, each is compared."""
        rows = len(self._ids.ids)
        if rows > len(ids) > 0 and rows % len(ids) == 0:
            ids = ids.repeat_interleave(rows // len(ids), dim=0)
        return self._ids.first_difference(ids) if rows == len(ids) else None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens from every layer (transformers' sign: zero or negative).

        Raises:
            UnsupportedOperationError: before anything is changed, when a layer cannot forget: recurrent states, and
                sliding windows that have passed.
            ConfigurationError: for a positive number, or more tokens than there are.
        """
        self.check_usable()
        tokens_to_remove = int(tokens_to_remove)  # assisted decoding gives a tensor, up to 5.17
        if tokens_to_remove > 0 or -tokens_to_remove > self.get_seq_length():
            raise ConfigurationError(
                f"crop({tokens_to_remove}): give a negative number of tokens to remove, at most the "
                f"{self.get_seq_length()} that the cache holds."
            )
        if tokens_to_remove == 0 and not any(getattr(layer, "record_past", False) for layer in self.layers):
            return
        for index, layer in enumerate(self.layers):
            reason = why_not_croppable(layer, self.get_seq_length() + tokens_to_remove)
            if reason:
                raise UnsupportedOperationError(
                    f"Cannot remove {-tokens_to_remove} tokens: in layer {index} {reason}. "
                    "Call reset() and prefill the shorter text again."
                )
        length = self.get_seq_length() + tokens_to_remove
        super().crop(tokens_to_remove)
        self._ids.crop(length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copying nothing that is stored."""
        self.check_usable()
        check_every_layer_has(self.layers, "batch_repeat_interleave")
        super().batch_repeat_interleave(repeats)
        self._ids.select_rows(torch.arange(len(self._ids.ids)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or a mask), copying nothing that is stored."""
        self.check_usable()
        check_every_layer_has(self.layers, "batch_select_indices")
        super().batch_select_indices(indices)
        if self._ids.tokens:
            self._ids.select_rows(torch.arange(len(self._ids.ids))[indices.to("cpu")])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row `beam_idx[i]` was, copying nothing that is stored."""
        self.check_usable()
        super().reorder_cache(beam_idx)
        self._ids.select_rows(beam_idx)

    def reset(self) -> None:
        """Forget everything; the cache can then serve another batch.

        Stock layers are made anew: transformers' recurrent layers would keep the old batch's shape.
        """
        self.check_open()
        self._check_idle()
        for history in self._stored.values():
            history.close()
        self.layers[:] = [self._new_layer(index) for index in range(len(self._layer_types))]
        self._ids.crop(0)
        self._room.clear()
        self.running = None

    def fork(self, n: int = 1) -> KVCache:
        """A cache that goes on from here with `n` continuations of every row, `[row 0, row 0, …, row 1, …]`.

        Nothing that is stored is copied: both caches share it, and a step reads what the continuations share once for
        all of them. Each then goes its own way; closing one frees its own bytes and nothing else, in any order. The
        two must be used from the same thread. Continuations of unequal length are padded on the left.

        Raises:
            ConfigurationError: `n` is not a positive number.
            UnsupportedOperationError: transformers cannot repeat the rows of one of the layers.
            CacheClosedError: after `close()`.
        """
        self.check_usable()
        check_every_layer_has(self.layers, "batch_repeat_interleave")
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ConfigurationError(f"fork(n={n!r}): give the number of continuations of every row, 1 or more.")
        fork = KVCache(
            self._config, self._session, spill_policy=self._spill_policy, lossless=self._lossless,
            mode_reason=self._mode_reason, origin=self,
        )  # fmt: skip
        fork.piece_tokens, fork.progress = self.piece_tokens, self.progress
        try:
            for index, layer in enumerate(self.layers):
                if index not in self._stored:
                    fork.layers[index] = copy_of(layer)
            if self.get_seq_length():
                fork.batch_repeat_interleave(n)
        except BaseException:
            fork.close()
            raise
        return fork

    def what_stays_in_memory(self) -> Iterator[str]:
        """What a user should know of layers that are not, or not wholly, stored: a warning, or none."""
        growing = [index for index, layer in enumerate(self.layers) if grows(layer)]
        if growing:
            kinds = ", ".join(sorted({self._layer_types[index][0] for index in growing}))
            yield (
                f"{len(growing)} of {len(self.layers)} layers ({kinds}) keep something of every token in memory, "
                "beside what goes to the store: state().memory_bytes says how much."
            )
        elif not self._stored:
            yield (
                "No layer of this model keeps every key and value, so nothing goes to a store; what its layers keep "
                "in memory does not grow with the context."
            )

    def state(self) -> CacheState:
        """What the cache holds and did so far. Works after `close()` too, with the counters as they were.

        Raises:
            CacheForkedError: in a forked child.
        """
        self._session.check_process()
        stats = self._session.store.stats()
        histories = list(self._stored.values())
        first = histories[0] if histories else None
        storage = self._session.store.storage
        return CacheState(
            strategy=self._session.strategy,
            spill_policy=self._spill_policy,
            lifecycle="runtime-scoped",
            mode="block" if self._blocks else "tensor",
            mode_reason=self._mode_reason,
            lossless=self._lossless,
            directory=self._session.directory,
            tokens=self.get_seq_length(),
            rows=first.rows if first else 0,
            stored_layers=len(histories),
            persisted_tokens=first.table.tokens if first else 0,
            shared_tokens=first.table.shared_tokens if first else 0,
            caches=len(self._session.table.branches),
            growing_layers=sum(map(grows, self.layers)),
            memory_bytes=sum(map(memory_bytes, self.layers)),
            tail_tokens=first.tail.tokens if first else 0,
            tail_bytes=sum(history.tail.nbytes for history in histories),
            resident_bytes=self._session.source.resident_bytes + stats.memory_bytes,
            read_buffers=0 if self._session.store.in_memory else self._session.plan.read_buffers,
            buffer_bytes=self._session.source.buffer_bytes + (storage.buffer_bytes if storage is not None else 0),
            unbuffered=storage is not None and storage.unbuffered,
            disk_bytes=stats.disk_bytes,
            bytes_written=stats.bytes_written,
            write_amplification=stats.bytes_written / self.counters.saved_bytes if self.counters.saved_bytes else 0.0,
            bytes_read=stats.bytes_read,
            save_seconds=self.counters.save_seconds,
            load_seconds=self.counters.load_seconds,
            spills=self.counters.spills,
            evictions=first.table.evictions if first else 0,
            evicted_tokens=first.table.evicted_tokens if first else 0,
            compactions=stats.compactions,
            window_tokens=self._session.store.window,
            cold_representation=stats.representation,
        )

    def close(self) -> None:
        """Free everything that no fork needs, on disk too; the cache cannot be used afterwards.

        Does all that it can, whatever fails, and may be called until it has succeeded: after Ctrl-C, or once the disk
        lets its files be removed. What is left then goes when the program ends. In a forked child it only gives the
        child's model back, and touches nothing that the parent uses.
        """
        self._closed = True
        with ExitStack() as steps:  # from the last to the first; the next one is done even if one fails
            steps.callback(self._session.leave, self._branch, functools.partial(_close_all, [*self._stored.values()]))
            steps.callback(self.changes.undo)
        self._leave.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise UnsupportedOperationError("A KVCache owns files and cannot be copied: make a second cache instead.")

    def __reduce__(self) -> NoReturn:
        raise UnsupportedOperationError("A KVCache owns files and cannot be pickled: make one in each process.")

    def _new_layer(self, index: int) -> Any:
        kind, arguments = self._layer_types[index]
        if index not in self._stored:
            return stock_layer(kind, arguments)
        history = self._stored[index]
        return stored_layer(kind, arguments, history, croppable=self._lossless, blocks=self._blocks)

    def held(self, layer_idx: int) -> AbstractContextManager[None]:
        """Keep what a layer is given in memory until the end of the `with` block; see `LayerHistory.held`."""
        history = self._stored.get(layer_idx)
        return nullcontext() if history is None else history.held()

    def check_usable(self) -> None:
        """Whether the cache can be changed now. What an interrupted pass left half-way is undone first.

        Raises:
            CacheClosedError: after `close()`.
            CacheBusyError: a forward pass is under way.
            InterruptedForwardError: an earlier pass cannot be undone.
        """
        self.check_open()
        self._check_idle()
        self._settle()

    def check_open(self) -> None:
        """Whether the cache can be used at all.

        Raises:
            CacheClosedError: after `close()`.
            CacheForkedError: in a forked child.
        """
        if self._closed:
            raise CacheClosedError("This cache is closed: make a new one.")
        self._session.check_process()

    def _check_idle(self) -> None:
        if self.at_work.locked():
            raise CacheBusyError("A forward pass with this cache is under way: it can be changed before or after it.")

    def _settle(self) -> None:
        """Undo the pass that is not under way any more and was neither kept nor undone: its undoing was interrupted."""
        self.check_open()
        try:
            self.undo_pass()
        except Exception as error:
            raise InterruptedForwardError(
                f"An earlier forward pass stopped half-way and cannot be undone ({error}). Call cache.reset() and "
                "start again."
            ) from error


def _close_all(histories: Sequence[LayerHistory]) -> None:
    """Drop what is a cache's own."""
    with ExitStack() as steps:  # the next one is done even if one fails
        for history in histories:
            steps.callback(history.close)
