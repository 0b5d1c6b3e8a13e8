"""Whether a model can attend block by block: decided by trying it, when a cache is made.

The probe runs a few tokens through the model twice, with stock attention and cache and with blocks, and compares the
logits. Whatever fails or differs, the model runs in tensor mode, which works everywhere. Nothing is decided by name.
What fails for the moment's reasons, such as memory that is short, is raised: it says nothing of the model.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ollm.changes import Changes
from ollm.errors import BlockModeError, PluginError, StorageError, WeightsError, brief
from ollm.seam import attention
from ollm.seam.cache import KVCache
from ollm.seam.geometry import decoder_config, without_adapter
from ollm.seam.prefill import take_in_pieces

PROBE_TOKENS = (7, 4, 1)
"""A prompt and a continuation that are longer than the pieces of a cache on trial, then a single token."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_COARSE = 5e-2
_ATTENTION = "_attn_implementation_internal"
"""Where a config names its attention. Assigning to `_attn_implementation` would change its sub-configs, too."""

_OF_THE_MOMENT = (MemoryError, torch.OutOfMemoryError, OSError, PluginError, StorageError, WeightsError)
"""What may fail today and work tomorrow, whatever the model."""

_verdicts: weakref.WeakKeyDictionary[Any, dict[bool, str]] = weakref.WeakKeyDictionary()


def why_not_blocks(model: Any, make_cache: Callable[[bool], KVCache], *, pieces: bool) -> str:
    """Why a model cannot attend block by block; empty if it can. Tried once per model.

    Args:
        model: on its device, in evaluation mode.
        make_cache: an empty block-mode cache for it, in memory, which switches the model to block mode while it is
            open; with the argument `True`, its decoder layers take prompts in pieces as well.
        pieces: whether to try that, too.

    Raises:
        MemoryError, torch.OutOfMemoryError, OSError, PluginError, StorageError, WeightsError: the trial could not be
            made; no verdict is kept.
    """
    verdicts = _verdicts.setdefault(model, {})
    if pieces not in verdicts:
        verdicts[pieces] = _probe(model, lambda: make_cache(pieces))
    return verdicts[pieces]


def switch_on(model: Any, layers: Sequence[Any]) -> Callable[[], None]:
    """Let the text model attend block by block, and its decoder layers take prompts in pieces; how to undo it.

    With the last one that is undone, in whatever order, the model is as it was before. What a model in this state
    computes with other caches than ours, in any thread, is the same as before, and so is what a copy of it computes.

    Raises:
        BlockModeError: when the model's attention cannot be exchanged; the model is as it was.
    """
    attention.register()
    changes = Changes()
    try:
        for module in model.modules():
            if isinstance(module, PreTrainedModel):  # who makes masks
                changes.wrap(module, functools.partial(_with_blocks_or_without, weakref.ref(module)))
        for config in _configs_that_take_ours(model):
            changes.set(config, _ATTENTION, attention.Exchanged(getattr(config, _ATTENTION)))
        if decoder_config(model)._attn_implementation != attention.NAME:
            raise BlockModeError("its attention cannot be exchanged")
        take_in_pieces(layers, changes)
        return changes.close
    except BaseException:
        changes.close()
        raise


def _with_blocks_or_without(
    module: weakref.ref[nn.Module], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Whose attention a forward pass gets: ours with a block-mode cache, with anything else the model's own.

    Raises:
        BlockModeError: attention weights are wanted, which block mode does not make; nothing was done.
    """
    blocks = any(isinstance(value, KVCache) and value.blocks for value in (*args, *kwargs.values()))
    config = getattr(module(), "config", None)
    if blocks and kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        raise BlockModeError(
            "output_attentions: in block mode attention weights never exist. Load the model with "
            "attn_implementation='eager' and make the cache with mode='tensor', or leave output_attentions out."
        )
    with attention.in_blocks(blocks):
        return forward(*args, **kwargs)


def _configs_that_take_ours(model: Any) -> list[Any]:
    """The configs within a model that have our attention if transformers sets it for the text model only: vision and
    audio towers keep theirs. Leaves them as they are: what it says of one for all does not lead back to what was."""
    base = without_adapter(model)
    configs = _configs(base)
    before = [getattr(config, _ATTENTION) for config in configs]
    text = decoder_config(base)
    keys = [key for key in base.config.sub_configs if getattr(base.config, key, None) is text]
    name = attention.Exchanged(text._attn_implementation)  # other threads may go through the model meanwhile
    try:
        base.set_attn_implementation({keys[0]: name} if keys else name)
        return [config for config in configs if getattr(config, _ATTENTION) == attention.NAME]
    finally:
        for config, value in zip(configs, before, strict=True):
            setattr(config, _ATTENTION, value)


def _configs(model: Any) -> list[Any]:
    """Every config within a model, each once."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if hasattr(config, _ATTENTION) and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, key, None) for key in config.sub_configs]
    return list(found.values())


def _probe(model: Any, make_cache: Callable[[], KVCache]) -> str:
    try:
        # not inference_mode: a model may keep what it computes, such as rotary tables; and in the model's own dtype
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            truth = _run(model, DynamicCache(config=decoder_config(model)))
            with make_cache() as cache:
                blocks = _run(model, cache)
    except _OF_THE_MOMENT:
        raise
    except BlockModeError as error:
        return str(error)
    except Exception as error:  # third-party modelling code may fail in any way; the reason is kept and shown
        if "DefaultCPUAllocator" in str(error):  # torch has no type for a CPU's memory that is used up
            raise
        return brief(error)
    scale, difference = truth.abs().max(), (truth - blocks).abs().max()
    if not difference <= _TOLERANCE.get(model.dtype, _COARSE) * scale:
        return f"its logits differ by {difference:.2g} of {scale:.2g}"
    return ""


def _run(model: Any, cache: Cache) -> torch.Tensor:
    """The logits of a few tokens, in a few forwards, in fp32 or better."""
    logits, at = [], 3
    for count in PROBE_TOKENS:
        ids = torch.arange(at, at + count, device=model.device)[None] % decoder_config(model).vocab_size
        output = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        logits.append(output.to(torch.promote_types(output.dtype, torch.float32)))
        at += count
    return torch.cat(logits, dim=1)
