"""Bounded prefill, layer by layer: each decoder layer takes a long prompt in pieces, before the next layer starts.

Activations are then those of one piece, every weight is visited once, and what a layer has just stored is not read
back. Nothing of the modelling code is changed: the `forward` of each layer object is wrapped, and unwrapped again (see
`ollm.changes`). A layer in which somebody watches takes the prompt whole, so that he sees what he would see without us.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ollm.attention.masks import TileMask
from ollm.changes import Changes, beneath, is_our_hook, is_ours
from ollm.kv.state import PrefillProgress
from ollm.seam.cache import KVCache
from ollm.seam.geometry import kv_geometry, largest, without_adapter
from ollm.seam.recording import is_recorder, records_now


def take_in_pieces(layers: Sequence[nn.Module], changes: Changes) -> None:
    """Let the decoder layers of a model, given in order, take prompts in pieces. Forwards without a `KVCache` pass
    through, and those of layers that do so already."""
    pieces = _Pieces(len(layers))
    for index, layer in enumerate(layers):
        changes.wrap(layer, functools.partial(pieces.take, index, weakref.ref(layer)))


class _Pieces:
    """What the decoder layers of one model do together. Knows how many there are, holds none."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._began = 0.0

    def take(
        self,
        index: int,
        layer: weakref.ref[nn.Module],
        forward: Callable[..., Any],
        hidden_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The output of layer `index` for all tokens."""
        rows, tokens = hidden_states.shape[:2]
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, KVCache)), None)
        if index == 0:
            self._began = time.perf_counter()
        # more dimensions: Gemma 3n has several states of each token, whose rows are no tokens; then: this is a piece
        if cache is None or hidden_states.dim() != 3 or tokens == 1 or cache.piece is not None:
            return forward(hidden_states, *args, **kwargs)
        # a mask tensor of queries times keys has no second dimension of tokens, and exists as a whole anyway
        has_mask_tensor = any(isinstance(value, Tensor) and value.dim() == 4 for value in (*args, *kwargs.values()))
        whole = has_mask_tensor or _wants_more_outputs(kwargs) or _is_watched(layer())
        piece_tokens = tokens if whole else max((cache.piece_tokens or rows * tokens) // rows, 1)
        outputs = []
        try:
            with cache.held(index):
                for low in range(0, tokens, piece_tokens):
                    high = min(low + piece_tokens, tokens)
                    cache.piece = (low, tokens)
                    piece = _Slice(low, high, tokens) if piece_tokens < tokens else _whole
                    outputs.append(forward(*piece((hidden_states, *args)), **piece(kwargs)))
                    self._report(index, high, tokens, cache)
        finally:
            cache.piece = None
        return _join(outputs)

    def _report(self, index: int, done: int, tokens: int, cache: KVCache) -> None:
        if cache.progress is None:
            return
        layers_done, seconds = index + done / tokens, time.perf_counter() - self._began
        cache.progress(
            PrefillProgress(
                tokens=tokens,
                layers_done=layers_done,
                layers=self._layers,
                saved_bytes=cache.counters.saved_bytes,
                seconds=seconds,
                eta_seconds=seconds / layers_done * (self._layers - layers_done),
            )
        )


def _whole(value: Any) -> Any:
    return value


def _wants_more_outputs(kwargs: dict[str, Any]) -> bool:
    """Whether a layer is asked for outputs of its parts: those of pieces cannot be joined without knowing what they
    are."""
    return records_now() or any(value for name, value in kwargs.items() if name.startswith("output_"))


def _is_watched(layer: nn.Module | None) -> bool:
    """Whether somebody sees, or changes, what goes through the parts of a layer, or through the layer beneath us. What
    hooks on the layer itself are given is whole anyway."""
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    parts = () if layer is None else layer.modules()
    return any(_has_foreign_forward(part) or (part is not layer and _has_foreign_hook(part)) for part in parts)


def _has_foreign_forward(module: nn.Module) -> bool:
    forward = beneath(module, "forward")
    if forward is None or getattr(forward, "__func__", None) is type(module).forward:
        return False
    return "_hf_hook" not in vars(module)  # accelerate's, which only moves tensors


def _has_foreign_hook(module: nn.Module) -> bool:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(not is_our_hook(hook) and not is_recorder(hook) for hook in hooks)


@attrs.frozen
class _Slice:
    """Cuts the tokens `low … high - 1` out of everything that is as long as the prompt in its second dimension."""

    low: int
    high: int
    tokens: int

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:, self.low : self.high] if value.dim() > 1 and value.shape[1] == self.tokens else value
        if isinstance(value, TileMask):
            return value.queries_between(self.low, self.high)
        if isinstance(value, tuple):
            return tuple(map(self, value))
        if isinstance(value, dict):
            return {name: self(item) for name, item in value.items()}
        return value


def _join(outputs: list[Any]) -> Any:
    """The output of all pieces as that of one forward."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(outputs, dim=1)
    if isinstance(first, tuple):
        return tuple(_join([output[index] for output in outputs]) for index in range(len(first)))
    return first


def bound_prompts(model: Any, tokens: int) -> Callable[[], None]:
    """Let `generate` take a prompt in parts of at most `tokens`, unless somebody has set a size; how to undo it."""
    settings = without_adapter(model).generation_config
    with Changes() as changes:
        if settings.prefill_chunk_size is None or is_ours(settings, "prefill_chunk_size"):
            changes.set(settings, "prefill_chunk_size", tokens)
        return changes.pop_all().close


_USUAL_HIDDEN_SIZE = 4096


_HIDDEN_COPIES = 3
"""Of the whole prompt's hidden states: what goes into a layer, what came out of it in pieces, and these joined."""


def prompt_bytes(config: Any, dtype: torch.dtype) -> int:
    """About what is kept of every token of a prompt while a layer works through it, piece by piece."""
    hidden = largest(config, "hidden_size") or _USUAL_HIDDEN_SIZE
    # keys and values of the layer at work, before and after they are put together for its later pieces
    kept = max((layer.bytes_per_token for layer in kv_geometry(config, dtype).layers), default=0) * 2
    head = largest(config, "head_dim") or hidden // (largest(config, "num_attention_heads") or 1)
    rotary = 2 * head * 4
    return hidden * dtype.itemsize * _HIDDEN_COPIES + kept + rotary


def activation_bytes(config: Any, itemsize: int) -> int:
    """About what a layer takes per token of a prompt while it works, beside its input and output."""
    hidden = largest(config, "hidden_size") or _USUAL_HIDDEN_SIZE
    return (8 * hidden + 3 * (largest(config, "intermediate_size") or 4 * hidden)) * itemsize
