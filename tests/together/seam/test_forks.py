"""`cache.fork(n)`: many continuations of one document, each as if it had a cache of its own."""

from __future__ import annotations

import gc

import pytest
import torch

from ollm import disk_cache
from ollm.errors import CacheClosedError, ConfigurationError, UnsupportedOperationError
from together.comparison import STRATEGIES, assert_close, assert_same, cache_for, generate, stock_cache, tokens
from together.tiny_models import FAMILIES, RECURRENT, SLIDING_WINDOW

DOCUMENT = 2 * SLIDING_WINDOW + 21


def stock_with(model, ids, repeats=1):
    """transformers' own cache with a document, its rows repeated."""
    cache = stock_cache(model)
    model(ids, past_key_values=cache)
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
    return cache


def asked(document, questions):
    """The whole input of several questions about one document, and its mask: shorter ones are padded on the left."""
    longest = max(question.shape[1] for question in questions)
    ids = torch.zeros(len(questions), document.shape[1] + longest, dtype=torch.long)
    mask = torch.ones_like(ids)
    ids[:, : document.shape[1]] = document
    for row, question in enumerate(questions):
        gap = longest - question.shape[1]
        ids[row, document.shape[1] + gap :] = question
        mask[row, document.shape[1] : document.shape[1] + gap] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", [family for family in FAMILIES if family not in RECURRENT], indirect=True)
def test_questions_of_unequal_length_about_one_document(model, strategy, tmp_path):
    document = tokens(1, DOCUMENT)
    inputs = asked(document, [tokens(1, length, seed=length) for length in (3, 9, 1, 5)])
    stock = stock_with(model, document, repeats=4)
    settings = {"attention_mask": inputs["attention_mask"], "new_tokens": 14}
    truth = generate(model, inputs["input_ids"], stock, **settings)
    with cache_for(model, tmp_path, strategy) as cache:
        model(document, past_key_values=cache)
        before = cache.state()
        fork = cache.fork(4)
        assert_same(generate(model, inputs["input_ids"], fork, **settings), truth)
        assert (fork.state().rows, fork.state().shared_tokens) == (4, before.persisted_tokens)
        fork.close()
        assert (cache.state().disk_bytes, cache.state().tokens) == (before.disk_bytes, DOCUMENT)
        more, alone = tokens(1, 5, seed=1), stock_with(model, document)
        assert_close(model(more, past_key_values=cache).logits, model(more, past_key_values=alone).logits)
    assert list(tmp_path.iterdir()) == []


def test_a_fork_equals_a_batch_that_was_repeated(model, tmp_path):
    document = tokens(2, 30)
    stock = stock_with(model, document, repeats=3)
    with cache_for(model, tmp_path) as cache:
        model(document, past_key_values=cache)
        with cache.fork(3) as fork:
            for seed in range(1, 25):
                more = tokens(6, 1, seed=seed)
                assert_close(
                    model(more, past_key_values=fork).logits, model(more, past_key_values=stock).logits
                )  # fmt: skip


def test_origin_and_forks_take_turns(model, tmp_path):
    document = tokens(1, 30)
    truths = [stock_with(model, document), stock_with(model, document, 2), stock_with(model, document, 3)]
    with cache_for(model, tmp_path) as cache:
        model(document, past_key_values=cache)
        caches = [cache, cache.fork(2), cache.fork(3)]
        assert cache.state().caches == 3
        for seed in range(30):
            for rows, (ours, stock) in enumerate(zip(caches, truths, strict=True), 1):
                more = tokens(rows, 1 + seed % 3, seed=seed)
                assert_close(model(more, past_key_values=ours).logits, model(more, past_key_values=stock).logits)
        caches[0].close()  # the others need what it shares
        more = tokens(3, 4)
        assert_close(model(more, past_key_values=caches[2]).logits, model(more, past_key_values=truths[2]).logits)
        caches[1].close()
        caches[2].close()
    assert list(tmp_path.iterdir()) == []


def test_beams_on_a_fork(model, tmp_path):
    document, question = tokens(1, 30), tokens(1, 4, seed=1)
    ids, settings = torch.cat([document, question], dim=1), {"num_beams": 4, "new_tokens": 12}
    truth = model.generate(ids, max_new_tokens=12, num_beams=4, do_sample=False)
    with cache_for(model, tmp_path) as cache:
        model(document, past_key_values=cache)
        with cache.fork(4) as fork:
            assert generate(model, ids, fork, **settings).sequences.equal(truth)


def test_an_empty_cache_can_be_forked(model, tmp_path):
    ids = tokens(1, 30)
    with cache_for(model, tmp_path) as cache, cache.fork(3) as fork:
        assert_same(generate(model, ids, fork), generate(model, ids, stock_cache(model)))


def test_a_window_goes_on_sliding_in_a_fork(model, tmp_path):
    document = tokens(1, 50)
    arguments = {"cache_strategy": "sliding-window-ring-buffer", "cache_window_tokens": 12, "ram_budget": None}
    one, two = (cache_for(model, tmp_path / name, **arguments) for name in ("one", "two"))
    with one as cache, two as alone:
        model(document, past_key_values=cache)
        model(document, past_key_values=alone)
        with cache.fork(1) as fork:
            for seed in range(25):
                more = tokens(1, 1, seed=seed)
                assert_close(model(more, past_key_values=fork).logits, model(more, past_key_values=alone).logits)
            assert fork.state().evicted_tokens > 0
            assert fork.state().shared_tokens < 12


def test_dropped_forks_leave_nothing_behind(model, tmp_path):
    with cache_for(model, tmp_path) as cache:
        model(tokens(1, 30), past_key_values=cache)
        before = cache.state().disk_bytes
        for _ in range(5):
            fork = cache.fork(2)
            model(tokens(2, 20), past_key_values=fork)
            del fork
            gc.collect()
        model(tokens(1, 1), past_key_values=cache)
        assert cache.state().caches == 1
        assert cache.state().disk_bytes <= before + 2**14 * 2
        files = len(list(cache.state().directory.iterdir()))
        assert files <= 2 + 2 * 2 * len(cache.layers), "numbers of layers are used again"


def test_the_model_stays_switched_while_a_fork_lives(model, tmp_path):
    before = model.config._attn_implementation
    cache = disk_cache(model, cache_dir=tmp_path, spill_policy="tiny", ram_budget=0)
    model(tokens(1, 30), past_key_values=cache)
    fork = cache.fork()
    cache.close()
    model(tokens(1, 3), past_key_values=fork)
    fork.close()
    fork.close()
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2", None])
def test_wrong_numbers_are_refused(model, tmp_path, wrong):
    with cache_for(model, tmp_path) as cache:
        with pytest.raises(ConfigurationError, match=r"fork\(n=.*1 or more"):
            cache.fork(wrong)
        assert cache.state().caches == 1


def test_a_closed_cache_cannot_be_forked(model, tmp_path):
    with cache_for(model, tmp_path) as cache:
        pass
    with pytest.raises(CacheClosedError):
        cache.fork(2)


@pytest.mark.parametrize("model", sorted(RECURRENT), indirect=True)
def test_what_transformers_cannot_repeat_is_refused(model, tmp_path):
    with cache_for(model, tmp_path) as cache:
        model(tokens(1, 30), past_key_values=cache)
        with pytest.raises(UnsupportedOperationError, match="batch_repeat_interleave: transformers has no such"):
            cache.fork(2)


def test_lossy_forks_share_what_was_rounded(model, tmp_path):
    document, question = tokens(1, 60), tokens(1, 5, seed=1)
    with disk_cache(model, cache_dir=tmp_path, cache_strategy="quantized-cold-tier", spill_policy="tiny") as cache:
        model(document, past_key_values=cache)
        fork = cache.fork(3)
        ours = model(question.expand(3, -1), past_key_values=fork).logits
        alone = model(question, past_key_values=cache).logits
        assert_close(ours, alone.expand(3, -1, -1))
