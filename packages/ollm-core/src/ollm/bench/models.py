"""The model whose decode step is measured, and caches filled with random keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ollm.bench.records import Geometry
from ollm.errors import ModelDirectoryError


def make_model(geometry: Geometry) -> Any:
    """The checkpoint, or a Llama of this geometry with random weights; in evaluation mode, on the CPU."""
    dtype = getattr(torch, geometry.dtype)
    if geometry.model is not None:
        return AutoModelForCausalLM.from_pretrained(geometry.model, dtype=dtype, local_files_only=True).eval()
    hidden = geometry.kv_heads * geometry.head_dim
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=geometry.layers,
        num_attention_heads=2 * geometry.kv_heads, num_key_value_heads=geometry.kv_heads,
        head_dim=geometry.head_dim, vocab_size=4096, max_position_embeddings=2**20,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def checkpoint_geometry(directory: Path, dtype: str) -> Geometry:
    """What a checkpoint's config says.

    Raises:
        ModelDirectoryError: there is no checkpoint with safetensors in `directory`.
    """
    weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    if not weights or not (directory / "config.json").is_file():
        raise ModelDirectoryError(
            f"--model {directory}: no checkpoint there. Give a folder with config.json and *.safetensors."
        )
    config = AutoConfig.from_pretrained(directory, local_files_only=True).get_text_config(decoder=True)
    return Geometry(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        dtype=dtype,
        model=str(directory.absolute()),
        model_bytes=weights,
    )


def text_config(model: Any) -> Any:
    """The decoder's config."""
    return model.config.get_text_config(decoder=True)


def random_piece(model: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of so many tokens of one layer."""
    config = text_config(model)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = torch.randn(1, config.num_key_value_heads, tokens, size).to(model.dtype)
    return keys, keys.flip(2)


def fill(cache: Any, model: Any, tokens: int, piece: tuple[Tensor, Tensor]) -> Iterator[int]:
    """Append `tokens` to every layer, a piece at a time; yields how many every layer has."""
    size, layers = piece[0].shape[2], text_config(model).num_hidden_layers
    for start in range(0, tokens, size):
        count = min(size, tokens - start)
        for layer in range(layers):
            cache.update(piece[0][:, :, :count], piece[1][:, :, :count], layer)
        yield start + count


def decode_step(model: Any, cache: Any, length: int) -> Callable[[], None]:
    """One more token behind `length` and those before it."""
    lengths = iter(range(length + 1, 2**30))

    def step() -> None:
        mask = torch.ones(1, next(lengths), dtype=torch.long)
        model(torch.tensor([[7]]), attention_mask=mask, past_key_values=cache)

    return step
