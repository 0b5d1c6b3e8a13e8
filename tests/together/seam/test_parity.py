"""Every lossless strategy gives the logits and tokens of stock transformers, whatever the schedule."""

from __future__ import annotations

import pytest
import torch

from together.comparison import (
    STRATEGIES,
    assert_close,
    assert_same,
    cache_for,
    generate,
    stock_cache,
    tokens,
)
from together.tiny_models import FAMILIES, RECURRENT, SLIDING_WINDOW

each_family = pytest.mark.parametrize("model", FAMILIES, indirect=True)
# transformers can neither crop nor select rows of a recurrent state: see test_cache.py for what is refused
each_family_without_recurrence = pytest.mark.parametrize(
    "model", [family for family in FAMILIES if family not in RECURRENT], indirect=True
)
pytestmark = pytest.mark.parametrize("strategy", STRATEGIES)

PROMPT = 2 * SLIDING_WINDOW + 5


@each_family
def test_one_shot_prefill_and_greedy_decoding(model, strategy, tmp_path):
    ids = tokens(1, PROMPT)
    stock = generate(model, ids, stock_cache(model))
    assert len(set(stock.sequences[0, PROMPT:].tolist())) > 4, "a comparison of one repeated token would show little"
    with cache_for(model, tmp_path, strategy) as cache:
        assert_same(generate(model, ids, cache), stock)
        assert cache.get_seq_length() == PROMPT + 23
        assert cache.state().persisted_tokens > PROMPT - 7


@each_family
def test_chunked_prefill(model, strategy, tmp_path):
    ids = tokens(1, PROMPT)
    stock = generate(model, ids, stock_cache(model), prefill_chunk_size=10)
    with cache_for(model, tmp_path, strategy) as cache:
        assert_same(generate(model, ids, cache, prefill_chunk_size=10), stock)


@each_family
def test_continued_generation(model, strategy, tmp_path):
    first, more = tokens(1, PROMPT), tokens(1, 9, seed=1)

    def converse(cache):
        answer = generate(model, first, cache, new_tokens=11)
        return generate(model, torch.cat([answer.sequences, more], dim=1), cache, new_tokens=12)

    with cache_for(model, tmp_path, strategy) as cache:
        assert_same(converse(cache), converse(stock_cache(model)))


@each_family
def test_left_padded_batch(model, strategy, tmp_path):
    ids = tokens(3, PROMPT)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 7, PROMPT - 3)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    stock = generate(model, ids, stock_cache(model), attention_mask=mask)
    with cache_for(model, tmp_path, strategy) as cache:
        assert_same(generate(model, ids, cache, attention_mask=mask), stock)
        assert cache.state().rows == 3


@each_family
def test_beams(model, strategy, tmp_path):
    ids = tokens(2, PROMPT)
    settings = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    stock = generate(model, ids, stock_cache(model), **settings)
    with cache_for(model, tmp_path, strategy) as cache:
        ours = generate(model, ids, cache, **settings)
    assert torch.equal(ours.sequences, stock.sequences)
    assert_close(ours.sequences_scores, stock.sequences_scores)


@each_family
def test_sampling(model, strategy, tmp_path):
    ids = tokens(2, PROMPT)

    def sample(cache):
        torch.manual_seed(5)
        return generate(model, ids, cache, do_sample=True, top_k=20, temperature=0.9)

    with cache_for(model, tmp_path, strategy) as cache:
        assert_same(sample(cache), sample(stock_cache(model)))


@each_family_without_recurrence
def test_crop_within_every_window(model, strategy, tmp_path):
    """Below the sliding window everything can be cropped, to any length."""
    ids, other = tokens(2, SLIDING_WINDOW - 2), tokens(2, 8, seed=1)

    def forward(cache, remove):
        model(ids, past_key_values=cache)
        cache.crop(-remove)
        return model(other, past_key_values=cache).logits

    for remove in (1, 4, 9, SLIDING_WINDOW - 2):
        with cache_for(model, tmp_path, strategy) as cache:
            assert_close(forward(cache, remove), forward(stock_cache(model), remove))
            assert cache.get_seq_length() == SLIDING_WINDOW - 2 - remove + 8


@each_family_without_recurrence
def test_rows_selected_and_repeated(model, strategy, tmp_path):
    """Batch operations between forwards, on top of each other."""
    ids, more = tokens(3, PROMPT), tokens(4, 3, seed=1)

    def forward(cache):
        model(ids, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        outputs = [model(more, past_key_values=cache).logits]
        cache.reorder_cache(torch.tensor([3, 3, 0, 1]))
        for step in range(8):
            outputs.append(model(more[:, step % 3, None], past_key_values=cache).logits[:, -1:])
            cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
        cache.batch_select_indices(torch.tensor([True, False, True, False]))
        outputs.append(model(more[:2], past_key_values=cache).logits)
        return torch.cat([output.flatten() for output in outputs])

    with cache_for(model, tmp_path, strategy) as cache:
        assert_close(forward(cache), forward(stock_cache(model)))


@each_family
def test_reset_makes_it_reusable_for_another_batch(model, strategy, tmp_path):
    with cache_for(model, tmp_path, strategy) as cache:
        generate(model, tokens(1, PROMPT), cache, new_tokens=4)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.state().disk_bytes == 0
        ids = tokens(3, PROMPT, seed=2)
        assert_same(generate(model, ids, cache), generate(model, ids, stock_cache(model)))
