"""Cache layers for transformers: those over a layer's history, and stock layers that keep neither a prompt nor a mode.

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
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from ollm.errors import ConfigurationError, UnsupportedOperationError
from ollm.kv.history import LayerHistory
from ollm.seam.gradients import refuse_gradient


class StoredLayer(DynamicLayer):
    """A full-attention layer whose keys and values live in a store. `keys` and `values` stay `None`."""

    def __init__(self, history: LayerHistory, *, croppable: bool, blocks: bool, **_: Any) -> None:
        """Over a history, which need not be empty. Arguments of transformers' own layer are passed over."""
        CacheLayerMixin.__init__(self)
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
        if self.history.rows:
            self.history.select_rows(torch.arange(self.history.rows)[indices.to("cpu")])


class StoredIndexedLayer(DynamicIndexedLayer, StoredLayer):
    """The same beside what an indexer keeps of every token to choose by, which stays in memory: small, but growing."""

    def __init__(self, history: LayerHistory, **more: Any) -> None:
        """As of `StoredLayer`."""
        StoredLayer.__init__(self, history, **more)
        self.indexer_keys = self.indexer_position_ids = None
        self.is_indexer_initialized = False


class _OwnStates:
    """Mixed into a layer that changes its states in place: those made in inference mode could be changed in it only."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        with torch.inference_mode(False):
            super().lazy_initialization(*args, **kwargs)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():
            super().reorder_cache(beam_idx)  # type: ignore[misc]


class _Hybrid(LinearAttentionAndFullAttentionLayer, StoredLayer):
    """transformers' own layer of that type names the classes of its two halves, so it is said again here."""

    is_croppable = False

    def __init__(self, history: LayerHistory, *, number_of_states: int = 1, **more: Any) -> None:
        """As of `StoredLayer`, with so many recurrent states."""
        StoredLayer.__init__(self, history, **more)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if args:
            StoredLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        StoredLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        StoredLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        StoredLayer.reorder_cache(self, beam_idx)


class StoredHybridLayer(_OwnStates, _Hybrid):
    """A stored layer beside a recurrent state, as in Falcon-H1 and Zamba2."""


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


class SlidingLayer(_OwnTail, DynamicSlidingWindowLayer):
    """transformers' sliding (or chunked) layer, with a tail of its own."""


class LinearLayer(_OwnStates, LinearAttentionLayer):
    """transformers' layer for linear attention, whose states may be changed in any mode."""


class LinearAndSlidingLayer(_OwnStates, _OwnTail, LinearAttentionAndSlidingWindowAttentionLayer):
    """The same, with sliding attention beside it, with a tail of its own."""


_OURS = {
    DynamicSlidingWindowLayer: SlidingLayer,
    LinearAttentionLayer: LinearLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: LinearAndSlidingLayer,
}


_STORED = {
    DynamicLayer: StoredLayer,
    DynamicIndexedLayer: StoredIndexedLayer,
    LinearAttentionAndFullAttentionLayer: StoredHybridLayer,
}
"""What stands for each of transformers' layers that keep every key and value, whatever a model calls them."""


def is_stored(kind: str) -> bool:
    """Whether layers of this type have keys and values that go to a store."""
    return DYNAMIC_LAYER_TYPE_MAPPING.get(kind) in _STORED


def stored_layer(
    kind: str, arguments: dict[str, Any], history: LayerHistory, *, croppable: bool, blocks: bool
) -> StoredLayer:
    """The layer over a history for a type of which `is_stored`; arguments as of `StoredLayer` and `stock_layer`."""
    made: StoredLayer = _STORED[DYNAMIC_LAYER_TYPE_MAPPING[kind]](
        history, croppable=croppable, blocks=blocks, **arguments
    )
    return made


def grows(layer: Any) -> bool:
    """Whether more of a layer stays in memory with every token: all that is not stored, nor of a fixed size."""
    fixed = (StoredLayer, StoredHybridLayer, SlidingLayer, LinearAndSlidingLayer)
    return isinstance(layer, CacheLayerMixin) and type(layer) not in fixed


def memory_bytes(layer: Any) -> int:
    """What a layer keeps in memory, beside what a history does."""
    values = [
        item for value in vars(layer).values() for item in (value.values() if isinstance(value, dict) else [value])
    ]
    return sum(value.nbytes for value in values if isinstance(value, Tensor) and value.dim() > 1)


class Kept:
    """What a layer has in memory at one moment, to be put back after a forward pass that failed.

    transformers' attention layers replace their tensors, so that references do. Recurrent states are written in place,
    also by kernels of which torch knows nothing: the model is given a copy of them, and what it was given before is the
    room for the next copy.
    """

    def __init__(self, layer: Any, room: dict[tuple[str, int], Tensor]) -> None:
        """Of a layer, which goes on with copies of its recurrent states.

        Args:
            layer: of the cache.
            room: where copies of this layer's states go; comes to hold what they replace.
        """
        self._layer = layer
        self._held = _contents(layer)
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            return
        for name in ("conv_states", "recurrent_states"):
            states = getattr(layer, name)
            for number, state in states.items():
                if state is not None:
                    states[number] = _copy(state, room.get((name, number)))
                    room[name, number] = state

    def put_back(self) -> None:
        """Make the layer what it was. May be called again after an interrupt."""
        vars(self._layer).update({name: _own(value) for name, value in self._held.items()})


def _contents(layer: Any) -> dict[str, Any]:
    return {name: _own(value) for name, value in vars(layer).items()}


def _own(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _copy(state: Tensor, room: Tensor | None) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # it is written to later, in whatever mode that is
        if (
            room is None
            or room is state  # it was put back
            or room.is_inference()
            or (room.shape, room.dtype, room.device) != (state.shape, state.dtype, state.device)
        ):
            return state.clone()
        return room.copy_(state)


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
    if isinstance(layer, LinearAttentionCacheLayerMixin) and (
        not layer.record_past or any(layer.is_recurrent_states_initialized.values())
    ):
        return "a recurrent state cannot be rolled back"
    if isinstance(layer, StoredLayer):
        return layer.history.why_not_crop(length)
    if (
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
        # what keeps a recurrent state inherits these operations where it has keys as well, but for those only
        if not hasattr(layer, operation) or isinstance(layer, LinearAttentionCacheLayerMixin):
            raise UnsupportedOperationError(
                f"{operation}: transformers has no such operation for layer {index}, a {type(layer).__name__}."
            )
