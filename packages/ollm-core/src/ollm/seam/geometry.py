"""What a transformers config says about its layers: their types, and the shapes of their keys and values."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

from ollm.contracts.spill import KVGeometry, LayerGeometry
from ollm.errors import ConfigurationError, brief
from ollm.seam.layers import is_stored


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
    """The cache layer type of every decoder layer, with the arguments of its stock class.

    Raises:
        ConfigurationError: transformers cannot make a cache for such a config either.
    """
    try:
        types, arguments = get_layer_types_and_kwargs(config)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"transformers cannot tell from this {type(config).__name__} what its layers keep: {brief(error)}"
        ) from error
    if isinstance(arguments, dict):  # up to 5.17 one dict serves all layers, whose classes ignore what is not theirs
        arguments = [arguments] * len(types)
    return list(zip(types, arguments, strict=True))


def kv_geometry(config: Any, dtype: torch.dtype) -> KVGeometry:
    """Expected shapes of the layers whose keys and values go to a store: those that attend to every token. For
    planning: what a model really appends decides.

    Args:
        config: transformers' config of a decoder, without parts for images or sound.
        dtype: of keys and values.

    Raises:
        ConfigurationError: a size in the config is no number.
    """
    kinds = [kind for kind, _ in layer_types(config)]
    return KVGeometry(
        tuple(
            _layer_geometry(_of_layer(config, index), index, dtype)
            for index, kind in enumerate(kinds)
            if is_stored(kind)
        )
    )


def largest(config: Any, name: str) -> int | None:
    """A size from the config, of the layer where it is largest; `None` where there is none, or 0.

    Raises:
        ConfigurationError: it is no number.
    """
    layers = list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]
    return max((size or 0 for layer in layers for size in _sizes(layer, name)), default=0) or None


def _layer_geometry(config: Any, index: int, dtype: torch.dtype) -> LayerGeometry:
    query_heads = _size(config, "num_attention_heads", index) or 1  # models without attention have none
    heads = _size(config, "num_key_value_heads", index) or query_heads
    key_size = _size(config, "head_dim", index) or (_size(config, "hidden_size", index) or 0) // query_heads
    value_size = _size(config, "v_head_dim", index) or key_size
    return LayerGeometry(index, heads, key_size, value_size, dtype.itemsize)


def _of_layer(config: Any, index: int) -> Any:
    """The config of one layer, where layers differ in more than their type."""
    return config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config


def _size(config: Any, name: str, index: int) -> int | None:
    """Of one layer, where a config lists them."""
    sizes = _sizes(config, name)
    return sizes[index] if index < len(sizes) else sizes[0]


def _sizes(config: Any, name: str) -> list[int | None]:
    """One for all layers, or one for each."""
    value = getattr(config, name, None)
    sizes: list[Any] = list(value) if isinstance(value, (list, tuple)) and value else [value]
    if any(size is not None and (not isinstance(size, int) or isinstance(size, bool)) for size in sizes):
        raise ConfigurationError(
            f"{type(config).__name__}.{name} is {value!r}; whole numbers are needed to tell how much memory keys and "
            "values take, one for all layers or one for each."
        )
    return sizes
