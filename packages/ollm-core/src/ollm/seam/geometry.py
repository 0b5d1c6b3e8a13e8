"""What a transformers config says about its layers: their types, and the shapes of their keys and values."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

from ollm.contracts.spill import KVGeometry, LayerGeometry
from ollm.errors import ConfigurationError

STORED_LAYER_TYPE = "full_attention"
"""The only layer type whose keys and values grow without bound, and so the only one that goes to a store."""


def decoder_config(model: Any) -> Any:
    """The config of the text decoder of a model, multimodal or not.

    Raises:
        ConfigurationError: for what is no transformers model, and for encoder-decoder models, which keep two caches.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise ConfigurationError(f"model={type(model).__name__}: give a model that transformers loaded.")
    if config.is_encoder_decoder:
        raise ConfigurationError(
            f"{type(model).__name__} has an encoder and a decoder; a KVCache is for decoder-only models."
        )
    return config.get_text_config(decoder=True)


def without_adapter(model: Any) -> Any:
    """The model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layer_types(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """The cache layer type of every decoder layer, with the arguments of its stock class."""
    types, arguments = get_layer_types_and_kwargs(config)
    if isinstance(arguments, dict):  # up to 5.17 one dict serves all layers, whose classes ignore what is not theirs
        arguments = [arguments] * len(types)
    return list(zip(types, arguments, strict=True))


def kv_geometry(config: Any, dtype: torch.dtype) -> KVGeometry:
    """Expected shapes of the layers whose keys and values go to a store: those with full attention. For planning: what
    a model really appends decides.

    Args:
        config: transformers' config of a decoder, without parts for images or sound.
        dtype: of keys and values.
    """
    query_heads = getattr(config, "num_attention_heads", None) or 1  # models without attention have none
    heads = getattr(config, "num_key_value_heads", None) or query_heads
    key_size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // query_heads
    value_size = getattr(config, "v_head_dim", None) or key_size
    return KVGeometry(
        tuple(
            LayerGeometry(index, heads, key_size, value_size, dtype.itemsize)
            for index, (kind, _) in enumerate(layer_types(config))
            if kind == STORED_LAYER_TYPE
        )
    )
