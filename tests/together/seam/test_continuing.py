"""The ids of what a cache holds are known: a text that does not continue them is an error that says where, and what to
do."""

from __future__ import annotations

import contextlib

import pytest
import torch

from ollm.errors import ConfigurationError, ContinuationError
from together.comparison import assert_same, cache_for, generate, stock_cache, tokens
from together.tiny_models import FAMILIES, make_model

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


def tuned(config):
    from peft import get_peft_model

    torch.manual_seed(0)
    with torch.inference_mode(False):
        return get_peft_model(make_model("llama"), config).eval()


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_virtual_tokens_of_a_peft_model_count(tmp_path):
    peft = pytest.importorskip("peft")
    model = tuned(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    ids = tokens(1, 12)
    truth = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    with cache_for(model, tmp_path) as cache:
        ours = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        assert torch.equal(ours, truth)
        assert cache.get_seq_length() == 4 + 12 + 5
        assert torch.equal(cache.token_ids, torch.cat([torch.full((1, 16), -1), ours[:, 12:-1]], dim=1))


def test_prefix_tuning_which_brings_a_cache_of_its_own_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = tuned(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ConfigurationError, match=r"PREFIX_TUNING\) is a cache of its own"), cache_for(model, tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("whole", [True, False])
def test_a_lora_model_and_its_base_go_on_with_one_cache(whole, tmp_path):
    peft = pytest.importorskip("peft")
    model = tuned(peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))
    ids = tokens(1, 30)
    truth = generate(model, ids, stock_cache(model), new_tokens=6)
    with cache_for(model if whole else model.get_base_model(), tmp_path) as cache:
        generate(model, ids[:, :20], cache, new_tokens=1)
        with pytest.raises(ContinuationError, match="token 5 of row 0"):
            generate(model, ids.index_fill(1, torch.tensor([5]), 4), cache)
        with failing(model.lm_head, ValueError), pytest.raises(ValueError):
            model(ids[:, 20:], past_key_values=cache)
        assert_same(generate(model, ids, cache, new_tokens=6), truth)


@contextlib.contextmanager
def failing(module, error):
    def fail(*_):
        raise error

    hook = module.register_forward_hook(fail)
    try:
        yield
    finally:
        hook.remove()


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
