"""`KVCache`: a real `transformers.Cache` whose full-attention layers live in a store.

Give it to any `model.generate(past_key_values=cache)`. Made by `ollm.disk_cache` and `Inference.DiskCache`.
"""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, NoReturn, Self

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ollm.changes import Change, ChangesFor
from ollm.errors import (
    CacheClosedError,
    ConfigurationError,
    InterruptedForwardError,
    UnsupportedOperationError,
)
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession
from ollm.kv.state import CacheState, KVCounters, PrefillProgress
from ollm.seam.geometry import STORED_LAYER_TYPE, layer_types
from ollm.seam.layers import StoredLayer, check_every_layer_has, stock_layer, why_not_croppable

logger = logging.getLogger(__name__)


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
    ) -> None:
        """For the decoder `config`; use `ollm.disk_cache` instead of calling this.

        Args:
            config: of the decoder.
            session: over an empty store.
            spill_policy, lossless, mode_reason: for `state()`.
            switch_on: for block mode: switches the model to it and returns what undoes that, which is called when the
                cache is closed or dropped; `None` for tensor mode.
            origin: the cache that this one is a fork of.
        """
        self._config = config
        self._blocks: bool = origin._blocks if origin else switch_on is not None
        self.changes = ChangesFor(self)  # what is done to the model while the cache is open; a fork does the same
        self._mode_reason = mode_reason
        self.piece_tokens: int | None = None
        """The longest piece of a prompt that a layer takes at once; `None` for all of it."""
        self.progress: Callable[[PrefillProgress], None] | None = None
        """Called after every piece of every layer of a prefill."""
        self._session = session
        self._spill_policy = spill_policy
        self._lossless = lossless
        self._closed = False
        self.piece: tuple[int, int] | None = None
        """While a layer takes a prompt in pieces: the tokens it has taken, and those of the whole prompt."""
        self._stored: dict[int, LayerHistory] = {}
        self._layer_types = layer_types(config)
        self._branch = session.join()
        for index, (kind, _) in enumerate(self._layer_types):
            if kind == STORED_LAYER_TYPE:
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
        if not self._stored:
            logger.warning("No layer of this model has full attention, so nothing of it goes to a store.")
        self.changes.make(*(origin.changes.made if origin else [switch_on] if switch_on else []))

    @property
    def counters(self) -> KVCounters:
        """Bytes and seconds of loading and saving so far; a live object."""
        return self._session.counters

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values; returns all of that layer's.

        Raises:
            InterruptedForwardError: when an earlier forward stopped half-way, so that layers differ in length.
            CacheClosedError: after `close()`.
            StorageError: when the store cannot keep or read them; this layer is then as before.
        """
        self._check_open()
        self._check_whole(layer_idx, key_states.shape[2])
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens from every layer (transformers' sign: zero or negative).

        Raises:
            UnsupportedOperationError: before anything is changed, when a layer cannot forget: recurrent states, and
                sliding windows that have passed.
            ConfigurationError: for a positive number, or more tokens than there are.
        """
        self._check_open()
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
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copying nothing that is stored."""
        self._check_open()
        check_every_layer_has(self.layers, "batch_repeat_interleave")
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or a mask), copying nothing that is stored."""
        self._check_open()
        check_every_layer_has(self.layers, "batch_select_indices")
        super().batch_select_indices(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row `beam_idx[i]` was, copying nothing that is stored."""
        self._check_open()
        super().reorder_cache(beam_idx)

    def reset(self) -> None:
        """Forget everything; the cache can then serve another batch.

        Stock layers are made anew: transformers' recurrent layers would keep the old batch's shape.
        """
        self._check_open()
        for history in self._stored.values():
            history.crop(0)
        self.layers[:] = [self._new_layer(index) for index in range(len(self.layers))]

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
        self._check_open()
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
                    fork.layers[index] = copy.deepcopy(layer)
            if self.get_seq_length():
                fork.batch_repeat_interleave(n)
        except BaseException:
            fork.close()
            raise
        return fork

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
        if index in self._stored:
            return StoredLayer(self._stored[index], croppable=self._lossless, blocks=self._blocks)
        kind, arguments = self._layer_types[index]
        return stock_layer(kind, arguments)

    def held(self, layer_idx: int) -> AbstractContextManager[None]:
        """Keep what a layer is given in memory until the end of the `with` block; see `LayerHistory.held`."""
        history = self._stored.get(layer_idx)
        return nullcontext() if history is None else history.held()

    def _check_open(self) -> None:
        if self._closed:
            raise CacheClosedError("This cache is closed: make a new one.")
        self._session.check_process()

    def _check_whole(self, layer_idx: int, new_tokens: int) -> None:
        """All layers advance together; where they do not, a forward was interrupted and its rest would be wrong."""
        if layer_idx not in self._attention_layers:
            return
        first = self._attention_layers[0]
        done, total = self.piece or (0, new_tokens)
        length = self.layers[layer_idx].get_seq_length() - done
        if layer_idx == first:
            others = {self.layers[index].get_seq_length() for index in self._attention_layers if index != first}
            whole = others <= {length, 0}
        else:
            whole = self.layers[first].get_seq_length() == length + total
        if not whole:
            raise InterruptedForwardError(
                "An earlier forward pass stopped half-way (an error, or Ctrl-C), so the layers of this cache hold "
                "different numbers of tokens. Call cache.reset() and start again."
            )


def _close_all(histories: Sequence[LayerHistory]) -> None:
    """Drop what is a cache's own."""
    with ExitStack() as steps:  # the next one is done even if one fails
        for history in histories:
            steps.callback(history.close)
