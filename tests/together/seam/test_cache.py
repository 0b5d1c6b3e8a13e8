"""What a cache refuses, what it says of itself, and that the comparisons of `test_parity` can fail."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import cache_utils

from ollm.errors import (
    BatchMismatchError,
    CacheClosedError,
    ConfigurationError,
    CorruptDataError,
    UnsupportedOperationError,
)
from ollm.io.buffers import ALIGNMENT
from together.comparison import assert_same, cache_for, generate, stock_cache, tokens
from together.tiny_models import FAMILIES, SLIDING_WINDOW, make_model

each_family = pytest.mark.parametrize("model", FAMILIES, indirect=True)


def damage_first_extent(cache, layer, new_bytes):
    """Overwrite the payload of a layer's first extent on disk."""
    cache._session.store.storage.flush()
    location = next(iter(cache.layers[layer].history.table.entries)).extent.location
    with (cache.state().directory / f"segment-{location.segment:06d}.kv").open("r+b") as file:
        assert location.offset % ALIGNMENT == 0
        file.seek(location.offset)
        file.write(new_bytes(location.nbytes))


def test_zeroing_one_stored_extent_changes_the_logits(model, tmp_path):
    """The proof that what is read from the disk is what the model attends to."""
    ids = tokens(1, 40)
    stock = stock_cache(model)
    model(ids, past_key_values=stock)
    truth = model(ids[:, :1], past_key_values=stock).logits
    with cache_for(model, tmp_path, options={"verify": "never"}) as cache:
        model(ids, past_key_values=cache)
        damage_first_extent(cache, 1, bytes)
        logits = model(ids[:, :1], past_key_values=cache).logits
    assert (logits - truth).abs().max() > 1e-2 * truth.abs().max()


def test_a_damaged_extent_is_an_error_not_an_answer(model, tmp_path):
    with cache_for(model, tmp_path) as cache:
        model(tokens(1, 40), past_key_values=cache)
        damage_first_extent(cache, 1, lambda length: b"\1" * length)
        with pytest.raises(CorruptDataError, match=r"Layer 1, tokens 0\.\.38"):
            model(tokens(1, 1), past_key_values=cache)


@each_family
def test_lengths_and_mask_sizes_are_those_of_stock(model, tmp_path):
    stock = stock_cache(model)
    with cache_for(model, tmp_path) as cache:
        for length in (1, 3, 20, 1, 1, 30):
            for layer in range(len(cache.layers)):
                if isinstance(cache.layers[layer], cache_utils.CacheLayerMixin):
                    assert cache.get_mask_sizes(length, layer) == stock.get_mask_sizes(length, layer)
            model(tokens(1, length), past_key_values=cache)
            model(tokens(1, length), past_key_values=stock)
            assert cache.get_seq_length() == stock.get_seq_length()
            assert cache.state().tokens == stock.get_seq_length()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("qwen3_next", "layer 0 a recurrent state cannot be rolled back"),
        ("gemma3", f"layer 0 the sliding window of {SLIDING_WINDOW} tokens has passed"),
        ("gpt_oss", f"layer 0 the sliding window of {SLIDING_WINDOW} tokens has passed"),
    ],
    indirect=["model"],
)
def test_cropping_what_cannot_forget_is_refused_before_anything_changes(model, reason, tmp_path):
    ids = tokens(1, 2 * SLIDING_WINDOW)
    with cache_for(model, tmp_path) as cache:
        generate(model, ids, cache, new_tokens=2)
        before = cache.state()
        with pytest.raises(UnsupportedOperationError, match=reason):
            cache.crop(-1)
        assert cache.state() == before
        cache.crop(0)
        assert cache.state() == before
        cache.reset()
        assert_same(generate(model, ids, cache), generate(model, ids, stock_cache(model)))


@pytest.mark.parametrize("remove", [1, 7, -11])
def test_cropping_a_wrong_number_of_tokens_is_refused(model, remove, tmp_path):
    with cache_for(model, tmp_path) as cache:
        model(tokens(1, 10), past_key_values=cache)
        with pytest.raises(ConfigurationError, match="at most the 10"):
            cache.crop(remove)
        assert cache.get_seq_length() == 10


@pytest.mark.parametrize("model", ["qwen3_next"], indirect=True)
@pytest.mark.parametrize(
    ("operation", "argument"), [("batch_repeat_interleave", 2), ("batch_select_indices", torch.tensor([0]))]
)
def test_batch_operations_on_recurrent_states_are_refused(model, operation, argument, tmp_path):
    with cache_for(model, tmp_path) as cache:
        model(tokens(1, 20), past_key_values=cache)
        before = cache.state()
        with pytest.raises(UnsupportedOperationError, match=f"{operation}.*layer 0"):
            getattr(cache, operation)(argument)
        assert cache.state() == before


@pytest.mark.parametrize("model", ["llama", "gemma3", "gpt_oss"], indirect=True)
def test_assisted_decoding_gives_the_same_tokens(model, tmp_path):
    """Candidates are appended and cropped again, in sliding layers through transformers' recording of the past."""
    ids = tokens(1, 3 * SLIDING_WINDOW) % 7 + 3
    settings = {"prompt_lookup_num_tokens": 4}
    stock = generate(model, ids, stock_cache(model), new_tokens=40, **settings)
    with cache_for(model, tmp_path) as cache:
        assert_same(generate(model, ids, cache, new_tokens=40, **settings), stock)


@pytest.mark.parametrize("model", ["gemma3", "gpt_oss"], indirect=True)
def test_sliding_layers_do_not_keep_the_prompt_alive(model, tmp_path):
    """Stock layers keep a view into the whole prompt."""

    def bytes_alive(cache):
        return cache.layers[0].keys.untyped_storage().nbytes() / cache.layers[0].keys.nbytes

    with cache_for(model, tmp_path) as cache:
        model(tokens(1, 300), past_key_values=cache)
        assert bytes_alive(cache) == 1
        stock = stock_cache(model)
        model(tokens(1, 300), past_key_values=stock)
        assert bytes_alive(stock) == 20


def test_another_batch_size_without_reset_is_refused(model, tmp_path):
    with cache_for(model, tmp_path) as cache:
        model(tokens(1, 20), past_key_values=cache)
        with pytest.raises(BatchMismatchError, match="serves one batch"):
            model(tokens(2, 1), past_key_values=cache)


def test_a_closed_cache_says_so(model, tmp_path):
    with cache_for(model, tmp_path) as cache:
        model(tokens(1, 20), past_key_values=cache)
    cache.close()
    for use in (lambda: model(tokens(1, 1), past_key_values=cache), cache.reset, lambda: cache.crop(-1)):
        with pytest.raises(CacheClosedError):
            use()
    assert list(tmp_path.iterdir()) == []


def test_a_cache_is_neither_copied_nor_pickled(model, tmp_path):
    with cache_for(model, tmp_path) as cache:
        with pytest.raises(UnsupportedOperationError, match="cannot be copied"):
            copy.deepcopy(cache)
        with pytest.raises(UnsupportedOperationError, match="cannot be pickled"):
            pickle.dumps(cache)


def test_two_caches_of_one_model_do_not_disturb_each_other(model, tmp_path):
    ids = [tokens(1, 30, seed=seed) for seed in (1, 2)]
    with cache_for(model, tmp_path) as one, cache_for(model, tmp_path) as two:
        for cache, prompt in zip((one, two), ids, strict=True):
            model(prompt[:, :17], past_key_values=cache)
        for cache, prompt in zip((one, two), ids, strict=True):
            assert_same(generate(model, prompt, cache), generate(model, prompt, stock_cache(model)))


def test_bfloat16_in_tensor_mode_is_the_same_bit_for_bit(tmp_path):
    """Attention gets the very same bits, so even rounding is the same."""
    model = make_model("llama").to(torch.bfloat16)
    ids = tokens(2, 40)
    with cache_for(model, tmp_path, mode="tensor") as cache:
        ours, stock = generate(model, ids, cache), generate(model, ids, stock_cache(model))
    assert torch.equal(torch.stack(ours.logits), torch.stack(stock.logits))


def test_bfloat16_in_block_mode_differs_by_rounding(tmp_path):
    """No farther from fp32 than stock attention in bfloat16 is, give or take."""
    model = make_model("llama")
    ids = tokens(2, 60)
    exact = model(ids).logits
    model = model.to(torch.bfloat16)
    stock = (model(ids, past_key_values=stock_cache(model)).logits - exact).abs().mean()
    with cache_for(model, tmp_path, dense_projection_chunk_rows=16) as cache:
        assert cache.state().mode == "block"
        ours = (model(ids, past_key_values=cache).logits - exact).abs().mean()
    assert ours < 1.2 * stock


def test_transformers_own_layers_are_left_alone():
    """A cache layer with a `_layer_type` would replace transformers' own in the whole process."""
    assert cache_utils.DYNAMIC_LAYER_TYPE_MAPPING["full_attention"] is cache_utils.DynamicLayer
    assert cache_utils.DYNAMIC_LAYER_TYPE_MAPPING["sliding_attention"] is cache_utils.DynamicSlidingWindowLayer
    assert all("ollm" not in kind.__module__ for kind in cache_utils.DYNAMIC_LAYER_TYPE_MAPPING.values())


def test_a_state_reads_well(model, tmp_path):
    ids = tokens(2, 40)
    with cache_for(model, tmp_path) as cache:
        generate(model, ids, cache, new_tokens=5)
        state = cache.state()
    lines = str(state).splitlines()
    assert lines[0] == f"chunked, lossless, block mode ({state.mode_reason})"
    assert lines[1].startswith(f"{state.tokens} tokens in 2 rows: {state.persisted_tokens} stored (")
    assert f"{state.tail_tokens} in memory only (" in lines[1]
    assert lines[2].startswith("memory: 0 B of what is stored, ")
    assert lines[3].startswith("written ") and "attention waited" in lines[3]
    assert lines[4:] == [f"folder: {state.directory}"]
    assert f"tokens={state.tokens}" in repr(state)
