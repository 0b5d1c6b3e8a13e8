"""Which mode a cache is in, who decides, and that nothing of it is left when the cache is closed."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ollm import disk_cache
from ollm.attention.masks import Visible
from ollm.errors import BlockModeError, ConfigurationError, DiskFullError, MemoryLimitError, WeightsError
from ollm.seam import attention
from together.architectures import make
from together.comparison import assert_close, assert_same, cache_for, generate, stock_cache, tokens
from together.tiny_models import FAMILIES, make_model

each_family = pytest.mark.parametrize("model", FAMILIES, indirect=True)


def implementation(model):
    return model.config._attn_implementation


@each_family
def test_blocks_are_chosen_by_trial_and_everything_is_undone_at_close(model, tmp_path):
    before = implementation(model)
    with cache_for(model, tmp_path) as cache:
        assert (cache.state().mode, implementation(model)) == ("block", attention.NAME)
        assert "same logits" in cache.state().mode_reason
        with cache_for(model, tmp_path) as second:
            assert second.state().mode == "block"
        assert implementation(model) == attention.NAME, "the first cache still needs it"
    assert implementation(model) == before


def test_a_cache_that_is_only_dropped_undoes_it_too(model, tmp_path):
    before = implementation(model)
    cache = disk_cache(model, cache_dir=tmp_path)
    assert implementation(model) == attention.NAME
    del cache
    gc.collect()
    assert implementation(model) == before
    assert list(tmp_path.iterdir()) == []


def test_tensor_mode_on_request(model, tmp_path):
    before = implementation(model)
    with cache_for(model, tmp_path, mode="tensor") as cache:
        assert (cache.state().mode, cache.state().mode_reason) == ("tensor", "asked for")
        assert implementation(model) == before


def test_block_mode_on_request_says_why_it_cannot_be(tmp_path):
    model = make("bloom")
    before = implementation(model)
    with pytest.raises(ConfigurationError, match="BloomForCausalLM cannot attend block by block: its attention"):
        cache_for(model, tmp_path / "kv", mode="block").__enter__()
    assert implementation(model) == before
    assert not (tmp_path / "kv").exists()


def test_layers_that_need_the_whole_prompt_take_blocks_but_no_pieces(tmp_path, monkeypatch):
    """Each adds the mean over all tokens that it is given."""
    model = make_model("llama")
    kind = type(model.model.layers[0].mlp)
    forward = kind.forward

    def mixing(self, hidden):
        output = forward(self, hidden)
        return output + output.mean(1, keepdim=True)

    monkeypatch.setattr(kind, "forward", mixing)
    ids, more = tokens(2, 30), tokens(2, 9, seed=1)

    def logits(cache):
        return torch.cat([model(part, past_key_values=cache).logits for part in (ids, more)], dim=1)

    with cache_for(model, tmp_path, dense_projection_chunk_rows=7) as cache:
        assert cache.state().mode == "block"
        assert "but not for prompts in pieces: its logits differ" in cache.state().mode_reason
        assert cache.piece_tokens is None
        assert_close(logits(cache), logits(stock_cache(model)))


def cpu_is_out_of_memory():
    torch.empty(10**15, dtype=torch.uint8)


def raises(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    ("fail", "error"),
    [
        (cpu_is_out_of_memory, RuntimeError),
        (raises(torch.OutOfMemoryError("CUDA out of memory")), torch.OutOfMemoryError),
        (raises(MemoryError()), MemoryError),
        (raises(MemoryLimitError("so much is not free")), MemoryLimitError),
        (raises(DiskFullError("no room")), DiskFullError),
        (raises(WeightsError("cannot be read")), WeightsError),
        (raises(OSError(5, "Input/output error")), OSError),
        (raises(KeyboardInterrupt()), KeyboardInterrupt),
    ],
)
def test_a_failure_of_the_moment_is_no_verdict(fail, error, tmp_path):
    model = make_model("llama")
    before = implementation(model)
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: fail())
    with pytest.raises(error), cache_for(model, tmp_path / "kv"):
        pass
    hook.remove()
    assert implementation(model) == before
    assert not (tmp_path / "kv").exists()
    with cache_for(model, tmp_path / "kv") as cache:
        assert cache.state().mode == "block"


def test_an_unknown_mode_lists_the_choices(model, tmp_path):
    with pytest.raises(ConfigurationError, match="mode='fast': choose one of auto, block, tensor"):
        cache_for(model, tmp_path, mode="fast").__enter__()


@each_family
def test_any_other_cache_works_as_before_meanwhile(model, tmp_path):
    """Attention takes plain tensors as well: sliding layers, and whole caches that are not ours."""
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    stock = generate(model, ids, stock_cache(model), attention_mask=mask)
    with cache_for(model, tmp_path):
        assert_same(generate(model, ids, stock_cache(model), attention_mask=mask), stock)
        assert_same(generate(model, ids, stock_cache(model), attention_mask=mask, prefill_chunk_size=7), stock)


def test_attention_switched_back_is_noticed_before_any_token(model, tmp_path):
    with cache_for(model, tmp_path) as cache:
        model.set_attn_implementation("sdpa")
        with pytest.raises(BlockModeError, match="used as tensors, by code that does not know blocks"):
            model(tokens(1, 5), past_key_values=cache)
        model.set_attn_implementation("eager")
        with pytest.raises(BlockModeError):
            model(tokens(1, 5), past_key_values=cache)
    model.set_attn_implementation("sdpa")


def test_a_cache_given_to_another_model_is_noticed(model, tmp_path):
    other = make_model("llama", seed=9)
    with cache_for(model, tmp_path) as cache, pytest.raises(BlockModeError):
        other(tokens(1, 5), past_key_values=cache)


def test_training_with_dropout_is_refused(model, tmp_path):
    with cache_for(model, tmp_path) as cache:
        layer = model.model.layers[0].self_attn
        layer.attention_dropout = 0.5
        model.train()
        try:
            with pytest.raises(BlockModeError, match=r"no dropout and no gradients: call model\.eval"):
                model(tokens(1, 5), past_key_values=cache)
        finally:
            layer.attention_dropout = 0.0
            model.eval()


def test_gradients_are_refused_not_lost(tmp_path):
    with torch.inference_mode(False), torch.enable_grad():
        model = make_model("llama").train()  # made here, for inference tensors have no gradients at all
        with cache_for(model, tmp_path, mode="auto") as cache:
            assert cache.state().mode == "block"
            with pytest.raises(BlockModeError, match="no gradients"):
                model(tokens(1, 5), past_key_values=cache)
            model(tokens(1, 5), use_cache=False).logits.sum().backward()
            meanwhile = [weight.grad.clone() for weight in model.parameters()]
        model.zero_grad()
        model(tokens(1, 5), use_cache=False).logits.sum().backward()
        assert all(map(torch.equal, meanwhile, [weight.grad for weight in model.parameters()]))


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask_the_newest_query_belongs_to_the_newest_key(causal):
    """For attention that is called with no mask at all, over a past."""
    module = torch.nn.Module()
    module.is_causal = causal
    query, keys, values = (torch.randn(1, 2, count, 8) for count in (3, 10, 10))
    position = torch.arange(7, 10)[:, None]
    seen = torch.arange(10) <= position if causal else torch.ones(3, 10, dtype=torch.bool)
    truth = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
    ours, _ = attention.block_attention(module, query, keys, values, None)
    assert_close(ours.transpose(1, 2), truth)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("rows", [4096, 5])
def test_a_four_dimensional_mask_equals_stock(model, tmp_path, kind, rows):
    """As given by callers who make their own: here a prefix that every query sees."""
    ids = tokens(2, 12)
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    visible[:, :5] = True
    mask = visible[None, None].expand(2, 1, 12, 12)
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    truth = model(ids, attention_mask=mask, past_key_values=stock_cache(model)).logits
    with cache_for(model, tmp_path, dense_projection_chunk_rows=rows) as cache:
        assert_close(model(ids, attention_mask=mask, past_key_values=cache).logits, truth)


IMAGES = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, 2, 2]])
"""Which image a token belongs to; its tokens see each other."""


def _prefix(rows, heads, queries, keys):
    return (keys < 6) & (queries < 6)


@pytest.mark.parametrize("make_mask", [create_causal_mask, create_sliding_window_causal_mask])
@pytest.mark.parametrize(
    "more",
    [{}, {"or_mask_function": _prefix}, {"block_sequence_ids": IMAGES}],
)
def test_mask_objects_agree_with_stock_masks_tile_by_tile(model, tmp_path, make_mask, more):
    """Plain, prefix-LM and image-token masks, with padding and a past."""
    config = model_config_with_window()
    embeddings = torch.zeros(1, 10, 64)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]])
    arguments = {
        "config": config,
        "inputs_embeds": embeddings,
        "attention_mask": padding,
        "past_key_values": None,
        **more,
    }
    config._attn_implementation = "eager"
    stock = make_mask(**arguments) == 0
    with cache_for(model, tmp_path):
        config._attn_implementation = attention.NAME
        ours = make_mask(**arguments)
        for low, high in ((0, 3), (3, 4), (4, 10)):
            for first, last in ((0, 1), (1, 6), (6, 10)):
                answer = ours.tile(low, high, first, last)
                shape = (1, 1, high - low, last - first)
                if answer is Visible.DIAGONAL:
                    answer = torch.ones(shape, dtype=torch.bool).tril()
                elif isinstance(answer, Visible):
                    answer = torch.full(shape, answer is Visible.ALL)
                assert torch.equal(answer.expand(shape), stock[:, :, low:high, first:last])


def model_config_with_window():
    config = make_model("gemma3").config
    config.sliding_window = 4
    return config


def test_importing_ollm_changes_nothing_in_transformers():
    script = """
import transformers, transformers.cache_utils as cache, transformers.masking_utils as masks
import transformers.modeling_utils as modeling
from transformers import AttentionInterface
modules = (transformers, cache, masks, modeling)
def look():
    names = {(module.__name__, name): id(value) for module in modules for name, value in vars(module).items()}
    tables = (cache.DYNAMIC_LAYER_TYPE_MAPPING, AttentionInterface._global_mapping,
              masks.AttentionMaskInterface._global_mapping)
    return names, [dict(table) for table in tables]
look(); before = look()
import ollm.api.inference, ollm.api.cache, ollm.seam.attention, ollm.seam.mode
after = look()
assert before[1] == after[1]
changed = {key for key in before[0] if before[0][key] != after[0].get(key)}
assert not changed, changed
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, capture_output=True)
