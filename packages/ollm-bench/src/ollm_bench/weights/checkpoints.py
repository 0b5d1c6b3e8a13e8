"""Checkpoints to measure with: the sizes of one, and writing a Llama of random weights. Knows transformers; measures
nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ollm.plugin import BuildContext, ConfigurationError, ModelAdapter, ModelParts, NoOptions, kv_geometry, strategies
from ollm_bench.checkpoints import check_fillable, read_config, weight_files
from ollm_bench.contexts import wait_for_disk
from ollm_bench.weights.records import Geometry

_SHARD_BYTES = 2**29
_DEVIATION = 0.02
_POSITIONS = 2**17


@attrs.frozen(kw_only=True)
class Llama:
    """The sizes of a Llama with random weights."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: str

    @property
    def config(self) -> LlamaConfig:
        """For transformers. Embeddings and head are not tied."""
        return LlamaConfig(
            num_hidden_layers=self.layers, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, vocab_size=self.vocabulary,
            max_position_embeddings=_POSITIONS, bos_token_id=1, eos_token_id=None, pad_token_id=0,
            tie_word_embeddings=False, dtype=getattr(torch, self.dtype),
        )  # fmt: skip


def generated_geometry(llama: Llama) -> Geometry:
    """Of a Llama that is in no folder yet."""
    return _geometry(llama.config, "Llama with random weights")


def checkpoint_geometry(folder: Path, *, fillable: bool) -> Geometry:
    """Of a checkpoint that is there.

    Args:
        folder: a model directory.
        fillable: whether it must take random keys and values.

    Raises:
        ConfigurationError: when it is not complete or no text model, or has layers that only a real prompt can fill.
    """
    weight_files(folder)
    config = read_config(folder)
    if config.get_text_config(decoder=True) is not config:
        raise ConfigurationError(f"--model {folder}: it is multimodal; give a text model.")
    if fillable:
        check_fillable(config, folder)
    return attrs.evolve(_geometry(config, str(folder)), model=str(folder))


def skeleton(folder: str) -> Any:
    """The model of a folder without weights, which imports all that loading it will."""
    return _without_weights(AutoConfig.from_pretrained(folder, local_files_only=True))


def parts_of(model: Any) -> ModelParts:
    """Where a model has its decoder layers, as ollm finds them in all but unusual families."""
    adapter: ModelAdapter = strategies("ollm_model_adapters", ["generic"])["generic"].build(BuildContext(NoOptions()))
    return adapter.parts(model)


def write_checkpoint(llama: Llama, folder: Path, done: Callable[[float], None]) -> None:
    """Write a complete model directory, in shards, of which one at a time is in memory.

    Args:
        llama: its sizes.
        folder: a new one; made here.
        done: called with the share that is written.
    """
    folder.mkdir()
    config = llama.config
    config.save_pretrained(folder)
    weights = _without_weights(config).state_dict()
    total = sum(weight.nbytes for weight in weights.values())
    places: dict[str, str] = {}
    written = 0
    torch.manual_seed(0)
    for number, names in enumerate(_shards(weights)):
        file = f"model-{number:05}.safetensors"
        save_file({name: _random_like(weights[name]) for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        written += sum(weights[name].nbytes for name in names)
        done(written / total)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
    words = {"<pad>": 0, "<unk>": 1}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    wait_for_disk(folder)


def _geometry(config: Any, name: str) -> Geometry:
    model = _without_weights(config)
    layers = [sum(weight.nbytes for weight in layer.parameters()) for layer in parts_of(model).layers]
    return Geometry(
        name=name,
        dtype=str(model.dtype).removeprefix("torch."),
        layer_bytes=layers,
        other_bytes=sum(weight.nbytes for weight in model.parameters()) - sum(layers),
        kv_bytes_per_token=kv_geometry(config, model.dtype).bytes_per_token,
    )


def _without_weights(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)


def _shards(weights: dict[str, Tensor]) -> Iterator[list[str]]:
    """Names in the model's order, as many for one file as are not too large."""
    names: list[str] = []
    size = 0
    for name, weight in weights.items():
        if names and size + weight.nbytes > _SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += weight.nbytes
    yield names


def _random_like(weight: Tensor) -> Tensor:
    if weight.dim() < 2:  # norms
        return torch.ones(weight.shape, dtype=weight.dtype)
    return torch.empty(weight.shape, dtype=weight.dtype).normal_(std=_DEVIATION)
