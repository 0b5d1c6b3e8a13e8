"""Models that take no cache are refused, in one way, before anything is made; no others are."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    DynamicCache,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from ollm import disk_cache
from ollm.errors import ConfigurationError
from ollm.seam.geometry import kv_geometry, layer_types
from ollm.seam.prefill import activation_bytes
from ollm.seam.support import check_takes_cache
from together.architectures import WITHOUT_CACHE, make
from together.comparison import tokens
from together.tiny_models import make_model

each_without = pytest.mark.parametrize("model_type", WITHOUT_CACHE)


def generate(model, **settings):
    ids = tokens(2, 30) % 98 + 3
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0, **settings
    )


@each_without
@pytest.mark.parametrize("head", [True, False])
def test_a_model_that_takes_no_cache_is_refused_before_anything_is_made(model_type, head, tmp_path):
    whole = make(model_type)
    model = whole if head else getattr(whole, whole.base_model_prefix)
    model.register_forward_pre_hook(lambda *_: pytest.fail("it was tried"))
    name = type(model).__name__
    with pytest.raises(ConfigurationError, match=f"^{name} takes no cache.*: .*Call its generate.. without past_key"):
        disk_cache(model, cache_dir=tmp_path / "kv")
    assert not (tmp_path / "kv").exists()


@each_without
def test_transformers_gives_them_no_use_of_a_cache_either(model_type):
    """So that it is the truth that is told: a stock cache is an error there, or stays empty."""
    model, cache = make(model_type), DynamicCache()
    try:
        generate(model, past_key_values=cache)
    except (ValueError, AttributeError):
        return
    assert not cache.layers


@each_without
def test_what_the_error_advises_works(model_type):
    assert generate(make(model_type)).shape == (2, 34)


def test_parts_that_take_a_cache_are_enough():
    """This one names no cache and passes on to its language model what it does not name."""
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={"image_size": 8, "patch_size": 4, **tiny},
        qformer_config={"encoder_hidden_size": 16, "vocab_size": 20, **tiny},
        text_config={"model_type": "opt", "word_embed_proj_dim": 16, "ffn_dim": 16, "vocab_size": 101, **tiny},
    )
    check_takes_cache(Blip2ForConditionalGeneration(config))


def test_wrapped_and_headless_models_take_a_cache(model):
    class Unnamed(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    for other in (Unnamed(model.config), Around(), model.model):
        check_takes_cache(other)


@pytest.mark.parametrize("name", ["num_key_value_heads", "head_dim", "hidden_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [[4, "2", 2], 2.5, "2"])
def test_a_size_that_is_no_number_is_a_typed_error(name, value, tmp_path):
    model = make_model("llama")
    if name == "hidden_size":
        object.__setattr__(model.config, "head_dim", None)
    object.__setattr__(model.config, name, value)
    with pytest.raises(ConfigurationError, match=rf"LlamaConfig\.{name} is .*whole numbers are needed"):
        disk_cache(model, cache_dir=tmp_path / "kv")
    assert not (tmp_path / "kv").exists()


def test_layers_of_different_sizes_are_planned_each_by_its_own():
    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=10,
        per_layer_config={1: {"num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 1000}},
    )  # fmt: skip
    layers = kv_geometry(config, torch.float32).layers
    assert [(layer.kv_heads, layer.key_size) for layer in layers] == [(2, 16), (4, 8), (2, 16)]
    assert activation_bytes(config, 1) == 8 * 64 + 3 * 1000


def test_a_config_of_which_transformers_makes_no_cache_is_a_typed_error():
    config = Gemma4TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    config.num_kv_shared_layers = 2
    with pytest.raises(ValueError):
        DynamicCache(config=config)
    with pytest.raises(ConfigurationError, match="cannot tell from this Gemma4TextConfig what its layers keep"):
        layer_types(config)
