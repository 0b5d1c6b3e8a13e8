"""What a plan must know of a model: read from its config before it is loaded, or from the model, or found by trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ollm.errors import OllmError
from ollm.models.adapters import find_adapter
from ollm.plan import BlockVerdict, ModelFacts
from ollm.seam.cache import KVCache
from ollm.seam.geometry import decoder_config, kv_geometry, without_adapter
from ollm.seam.mode import why_not_blocks
from ollm.seam.prefill import activation_bytes, prompt_bytes
from ollm.seam.support import check_takes_cache

if TYPE_CHECKING:
    from torch import nn


def facts_of(model: nn.Module) -> ModelFacts:
    """What is known of a loaded model, without trying it.

    Raises:
        ConfigurationError: it is no decoder of transformers', or takes no cache.
    """
    check_takes_cache(model)
    parameter = next(model.parameters())
    return facts_of_config(decoder_config(model), type(model).__name__, parameter.dtype, parameter.device)


def facts_of_config(config: Any, name: str, dtype: torch.dtype, device: torch.device) -> ModelFacts:
    """What is known of a model that would be loaded with this decoder config, dtype and device."""
    return ModelFacts(
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        geometry=kv_geometry(config, dtype),
        activation_bytes=activation_bytes(config, dtype.itemsize),
        prompt_bytes=prompt_bytes(config, dtype),
    )


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The model's decoder layers, as its adapter knows them; none if no adapter does."""
    try:
        return find_adapter(model.config)[1].parts(without_adapter(model)).layers
    except OllmError:
        return ()


def try_blocks(model: nn.Module, make_cache: Callable[[bool], KVCache]) -> BlockVerdict:
    """Run a few tokens through the model, with stock attention and with blocks; once per model.

    Args:
        model: on its device.
        make_cache: an empty block-mode cache for it, in memory, that has decoder layers take prompts in pieces or not.

    Raises:
        MemoryError, torch.OutOfMemoryError, OSError, PluginError, StorageError, WeightsError: as `why_not_blocks`.
    """
    pieces = bool(decoder_layers(model))
    reason = why_not_blocks(model, make_cache, pieces=pieces)
    if not reason:
        return BlockVerdict(blocks=True, pieces=pieces, reason="a trial gave the same logits as stock attention")
    if pieces and not why_not_blocks(model, make_cache, pieces=False):  # it only takes no pieces
        return BlockVerdict(
            blocks=True,
            pieces=False,
            reason=f"a trial gave the same logits as stock attention, but not for prompts in pieces: {reason}",
        )
    return BlockVerdict(blocks=False, pieces=False, reason=reason)
