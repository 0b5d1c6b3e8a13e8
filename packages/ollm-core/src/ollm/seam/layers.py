"""Cache layers for transformers: one over a layer's history, and stock layers that keep neither a prompt nor a mode.

`_layer_type` stays `None` in all of them: setting it would replace transformers' own layers in the whole process.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from ollm.errors import ConfigurationError, UnsupportedOperationError
from ollm.kv.history import LayerHistory
from ollm.seam.gradients import refuse_gradient


class StoredLayer(CacheLayerMixin):
    """A full-attention layer whose keys and values live in a store. `keys` and `values` stay `None`."""

    is_sliding = False

    def __init__(self, history: LayerHistory, *, croppable: bool, blocks: bool) -> None:
        """Over a history, which need not be empty."""
        super().__init__()
        self.history = history
        self.is_croppable = croppable
        self._blocks = blocks

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add tokens; returns all keys and values so far: in block mode one `KVHandle` that stands for both, else
        two tensors `[rows, kv_heads, tokens, size]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._blocks:
            handle = self.history.handle(key_states, value_states)
            full: tuple[Any, Any] = (handle, handle)
        else:
            full = self.history.gather(key_states, value_states)
            if self.history.differentiable:
                error = UnsupportedOperationError(
                    "Keys and values that a cache keeps have no gradient: run the model under torch.no_grad(), or "
                    "leave the cache out."
                )
                keys, values = full
                full = refuse_gradient(keys, key_states, error), refuse_gradient(values, value_states, error)
        self.history.append(key_states, value_states)
        return full

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys as they will be after the update: masks are made before it."""
        return self.history.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.history.tokens

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        """Nothing to do: the store decides where things are."""

    def prefetch(self) -> None:
        """Nothing to do: reading ahead is the engine's business."""

    def reset(self) -> None:
        self.history.crop(0)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens (transformers' sign)."""
        self.history.crop(max(self.history.tokens + tokens_to_remove, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.history.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.history.select_rows(torch.arange(self.history.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.history.select_rows(torch.arange(self.history.rows)[indices.to("cpu")])


class _OwnTail:
    """Mixed into a sliding layer: after a long update it keeps its window, not a view into the whole prompt.

    Stock layers keep a slice, and the storage behind it is as long as what was prefilled.
    """

    keys: Tensor | None
    values: Tensor | None

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        full: tuple[Tensor, Tensor] = super().update(*args, **kwargs)  # type: ignore[misc]
        if self.keys is not None and self.values is not None and full[0].shape[2] > 2 * self.keys.shape[2]:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        return full


class _OwnStates:
    """Mixed into a layer that changes its states in place: those made in inference mode could be changed in it only."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        with torch.inference_mode(False):
            super().lazy_initialization(*args, **kwargs)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():
            super().reorder_cache(beam_idx)  # type: ignore[misc]


class SlidingLayer(_OwnTail, DynamicSlidingWindowLayer):
    """transformers' sliding (or chunked) layer, with a tail of its own."""


class LinearLayer(_OwnStates, LinearAttentionLayer):
    """transformers' layer for linear attention, whose states may be changed in any mode."""


class LinearAndFullLayer(_OwnStates, LinearAttentionAndFullAttentionLayer):
    """The same, with full attention beside it."""


class LinearAndSlidingLayer(_OwnStates, _OwnTail, LinearAttentionAndSlidingWindowAttentionLayer):
    """The same, with sliding attention beside it, with a tail of its own."""


_OURS = {
    DynamicSlidingWindowLayer: SlidingLayer,
    LinearAttentionLayer: LinearLayer,
    LinearAttentionAndFullAttentionLayer: LinearAndFullLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: LinearAndSlidingLayer,
}


def copy_of(layer: Any) -> Any:
    """A stock layer with the same states, each in memory of its own and without a history."""
    states = [
        tensor
        for value in vars(layer).values()
        for tensor in (value.values() if isinstance(value, dict) else [value])
        if isinstance(tensor, Tensor)
    ]
    with torch.inference_mode(False), torch.no_grad():
        return copy.deepcopy(layer, {id(state): state.detach().clone() for state in states})


def stock_layer(kind: str, arguments: dict[str, Any]) -> Any:
    """The layer that keeps transformers' own behaviour for a type that does not go to a store.

    Raises:
        ConfigurationError: for a type that transformers itself does not know.
    """
    if kind not in DYNAMIC_LAYER_TYPE_MAPPING:
        known = ", ".join(DYNAMIC_LAYER_TYPE_MAPPING)
        raise ConfigurationError(
            f"This model has layers of type {kind!r}, which this transformers does not know (it knows {known}): "
            "upgrade transformers, or import the model's code first."
        )
    stock = DYNAMIC_LAYER_TYPE_MAPPING[kind]
    return _OURS.get(stock, stock)(**arguments)


def why_not_croppable(layer: Any, length: int) -> str | None:
    """Why a layer cannot go back to its first `length` tokens, or `None` if it can."""
    if isinstance(layer, StoredLayer):
        return layer.history.why_not_crop(length)
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        if not layer.record_past or any(layer.is_recurrent_states_initialized.values()):
            return "a recurrent state cannot be rolled back"
    elif (
        isinstance(layer, DynamicSlidingWindowLayer)
        and layer.get_seq_length() >= layer.sliding_window
        and not layer.record_past
    ):
        return f"the sliding window of {layer.sliding_window} tokens has passed and older tokens are gone"
    return None


def check_every_layer_has(layers: Sequence[Any], operation: str) -> None:
    """Whether transformers can do something to every layer of a cache.

    Raises:
        UnsupportedOperationError: names the first layer of which it cannot.
    """
    for index, layer in enumerate(layers):
        if not hasattr(layer, operation):
            raise UnsupportedOperationError(
                f"{operation}: transformers has no such operation for layer {index}, a {type(layer).__name__}."
            )
