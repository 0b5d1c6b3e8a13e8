"""Whether a model can attend block by block: decided by trying it, when a cache is made.

The probe runs a few tokens through the model twice, with stock attention and cache and with blocks, and compares the
logits. Whatever fails or differs, the model runs in tensor mode, which works everywhere. Nothing is decided by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache

from ollm.changes import Changes
from ollm.errors import BlockModeError, WeightsError
from ollm.seam import attention
from ollm.seam.cache import KVCache
from ollm.seam.geometry import decoder_config, without_adapter
from ollm.seam.prefill import take_in_pieces

PROBE_TOKENS = (7, 4, 1)
PROBE_ROWS = 3
"""A prompt of 7 tokens and a continuation of 4, in pieces of 3, then a single token."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_COARSE = 5e-2
_ATTENTION = "_attn_implementation_internal"
"""Where a config names its attention. Assigning to `_attn_implementation` would change its sub-configs, too."""

_verdicts: weakref.WeakKeyDictionary[Any, dict[bool, str]] = weakref.WeakKeyDictionary()


def why_not_blocks(model: Any, make_cache: Callable[[], KVCache], layers: Sequence[Any]) -> str:
    """Why a model cannot attend block by block; empty if it can. Tried once per model.

    Args:
        model: on its device, in evaluation mode.
        make_cache: an empty block-mode cache for it, in memory; it is given pieces of `PROBE_ROWS` tokens.
        layers: if not empty, its decoder layers, which then must be able to take a prompt in pieces, too.
    """
    verdicts = _verdicts.setdefault(model, {})
    if bool(layers) not in verdicts:
        verdicts[bool(layers)] = _probe(model, make_cache, layers)
    return verdicts[bool(layers)]


def switch_on(model: Any, layers: Sequence[Any]) -> Callable[[], None]:
    """Let the text model attend block by block, and its decoder layers take prompts in pieces; how to undo it.

    With the last one that is undone, in whatever order, the model is as it was before. What a model in this state gets
    from other caches than ours is the same as before.

    Raises:
        BlockModeError: when the model's attention cannot be exchanged; the model is as it was.
    """
    attention.register()
    changes = Changes()
    try:
        for config in _configs_that_take(attention.NAME, model):
            changes.set(config, _ATTENTION, attention.NAME)
        if decoder_config(model)._attn_implementation != attention.NAME:
            raise BlockModeError("its attention cannot be exchanged")
        take_in_pieces(layers, changes)
        return changes.close
    except BaseException:
        changes.close()
        raise


def _configs_that_take(name: str, model: Any) -> list[Any]:
    """The configs within a model that have this attention if transformers sets it for the text model only: vision and
    audio towers keep theirs. Leaves them as they are: what it says of one for all does not lead back to what was."""
    base = without_adapter(model)
    configs = _configs(base)
    before = [getattr(config, _ATTENTION) for config in configs]
    text = decoder_config(base)
    keys = [key for key in base.config.sub_configs if getattr(base.config, key, None) is text]
    try:
        base.set_attn_implementation({keys[0]: name} if keys else name)
        return [config for config in configs if getattr(config, _ATTENTION) == name]
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


def _probe(model: Any, make_cache: Callable[[], KVCache], layers: Sequence[Any]) -> str:
    try:
        with torch.no_grad():  # not inference_mode: a model may keep what it computes, such as rotary tables
            truth = _run(model, DynamicCache(config=decoder_config(model)))
            undo = switch_on(model, layers)
            try:
                with make_cache() as cache:
                    cache.piece_tokens = PROBE_ROWS
                    blocks = _run(model, cache)
            finally:
                undo()
    except WeightsError:  # says nothing of the model
        raise
    except BlockModeError as error:
        return str(error)
    except Exception as error:  # third-party modelling code may fail in any way; the reason is kept and shown
        return f"{type(error).__name__}: {error}"
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
