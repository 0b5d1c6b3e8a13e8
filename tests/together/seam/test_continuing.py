"""The ids of what a cache holds are known: a text that does not continue them is an error that says where, and what to
do."""

from __future__ import annotations

import pytest
import torch

from ollm.errors import ContinuationError
from together.comparison import assert_same, cache_for, generate, stock_cache, tokens
from together.tiny_models import FAMILIES

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 7}, {"num_beams": 2}])
@pytest.mark.parametrize("model", ["llama", "gemma3"], indirect=True)
def test_another_text_is_refused_with_the_first_difference_and_the_cure(model, settings, tmp_path):
    ids = tokens(2, 12)
    other = ids.clone()
    other[1, 7] += 1
    with cache_for(model, tmp_path) as cache:
        generate(model, ids, cache, new_tokens=3, **settings)
        before, text = cache.state(), cache.token_ids
        longer = torch.cat([other, tokens(2, 9)], dim=1)
        with pytest.raises(ContinuationError, match=r"token 7 of row \d is another.*reset\(\), or cache.crop\(-7\)"):
            generate(model, longer, cache, **settings)
        assert (cache.get_seq_length(), cache.state().tail_tokens) == (14, before.tail_tokens)
        assert torch.equal(cache.token_ids, text)
        cache.crop(-7)
        if not settings.get("num_beams"):
            assert_same(generate(model, longer, cache), generate(model, longer, stock_cache(model)))
        cache.reset()
        assert_same(generate(model, longer, cache, **settings), generate(model, longer, stock_cache(model), **settings))


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_a_text_of_another_document_is_refused(model, tmp_path):
    with cache_for(model, tmp_path) as cache:
        generate(model, tokens(1, 20), cache, new_tokens=4)
        for length in (9, 50):
            with pytest.raises(ContinuationError, match=r"token 0 of row 0 is another.*call cache.reset\(\)\."):
                generate(model, tokens(1, length, seed=4) + 0, cache)


def test_the_same_question_twice_is_refused_with_the_cure(model, tmp_path):
    ids = tokens(1, 20)
    truth = generate(model, ids, stock_cache(model), new_tokens=5)
    with cache_for(model, tmp_path) as cache:
        for _ in range(3):
            assert_same(generate(model, ids, cache, new_tokens=5), truth)
            with pytest.raises(ContinuationError, match=r"holds 24 tokens, and all 20 .*cache.crop\(-5\)"):
                generate(model, ids, cache, new_tokens=5)
            cache.crop(-5)
        assert cache.get_seq_length() == 19


def test_a_conversation_goes_on_with_all_ids_or_with_new_ones_and_a_mask(model, tmp_path):
    ids = tokens(1, 20)
    with cache_for(model, tmp_path) as cache:
        answer = generate(model, ids, cache, new_tokens=5).sequences
        assert torch.equal(cache.token_ids, answer[:, :-1])
        text = torch.cat([answer, tokens(1, 6, seed=1)], dim=1)
        truth = generate(model, text, stock_cache(model), new_tokens=5)
        assert_same(generate(model, text, cache, new_tokens=5), truth)
        cache.crop(24 - cache.get_seq_length())
        new = text[:, 24:]
        ours = generate(model, new, cache, new_tokens=5, attention_mask=torch.ones(1, 31))
        assert torch.equal(ours.sequences[:, -5:], truth.sequences[:, -5:])


@pytest.mark.parametrize("length", [6, 24, 29, 31])
def test_a_mask_of_another_length_is_refused(model, length, tmp_path):
    with cache_for(model, tmp_path) as cache:
        model(tokens(1, 24), past_key_values=cache)
        for use in (
            lambda: model(tokens(1, 6), past_key_values=cache, attention_mask=torch.ones(1, length)),
            lambda: model.get_decoder()(tokens(1, 6), past_key_values=cache, attention_mask=torch.ones(1, length)),
        ):
            with pytest.raises(ContinuationError, match=f"for {length} tokens; the cache holds 24, and 6 were passed"):
                use()
        assert cache.get_seq_length() == 24
        model(tokens(1, 6), past_key_values=cache, attention_mask=torch.ones(1, 30))


def test_embeddings_are_tokens_of_which_nothing_is_known(model, tmp_path):
    ids = tokens(1, 20)
    embeddings = model.get_input_embeddings()(ids)
    truth = generate(model, ids, stock_cache(model), new_tokens=5)
    with cache_for(model, tmp_path) as cache:
        ours = model.generate(inputs_embeds=embeddings, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert torch.equal(ours, truth.sequences[:, 20:])
        assert torch.equal(cache.token_ids, torch.cat([torch.full((1, 20), -1), ours[:, :-1]], dim=1))
        with pytest.raises(ContinuationError, match="Nothing is new: the cache holds 24 tokens, and all 20"):
            model.generate(inputs_embeds=embeddings, past_key_values=cache, max_new_tokens=5)
        text = torch.cat([truth.sequences, tokens(1, 3)], dim=1)
        assert_same(generate(model, text, cache), generate(model, text, stock_cache(model)))


def test_assisted_decoding_of_a_text_that_is_held_in_part_is_refused(model, tmp_path):
    """transformers gives the whole text again there."""
    ids = tokens(1, 30) % 7 + 3
    with cache_for(model, tmp_path) as cache:
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(ContinuationError, match=r"10 of the tokens are new.*without an assistant"):
            generate(model, ids, cache, prompt_lookup_num_tokens=4)
        assert cache.get_seq_length() == 20
        assert_same(generate(model, ids, cache), generate(model, ids, stock_cache(model)))


def test_no_id_is_in_a_message(model, tmp_path):
    with cache_for(model, tmp_path) as cache:
        generate(model, torch.full((1, 5), 187), cache, new_tokens=2)
        with pytest.raises(ContinuationError) as caught:
            generate(model, torch.full((1, 9), 188), cache)
    assert not {"187", "188"} & set(str(caught.value).replace(",", " ").split())


@pytest.mark.parametrize("model", ["llama", "gemma3"], indirect=True)
def test_batch_operations_on_an_empty_cache_do_nothing(model, tmp_path):
    ids = tokens(2, 20)
    with cache_for(model, tmp_path) as cache:
        cache.batch_select_indices(torch.tensor([1, 0]))
        cache.batch_select_indices(torch.tensor([True, False]))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert_same(generate(model, ids, cache), generate(model, ids, stock_cache(model)))
