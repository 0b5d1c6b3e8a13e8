"""Caches at work: two at once, interrupted anywhere, and what they hold on to."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from ollm.attention import blockwise
from ollm.io.ledger import ledger
from together.comparison import assert_same, cache_for, generate, stock_cache, tokens

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def nothing_of_other_tests():
    """Models that earlier tests dropped keep their threads until they are collected."""
    gc.collect()


def test_two_caches_at_once_from_two_threads_are_both_right(model_of, tmp_path, workers):
    """Each with a model of its own: a model in block mode belongs to one thread at a time, like its cache."""
    results = {}

    def work(family, seed):
        model = model_of(family)
        ids = tokens(1, 60, seed=seed)
        with torch.inference_mode(), cache_for(model, tmp_path) as cache:
            results[family] = generate(model, ids, cache)

    families = {"llama": 1, "qwen3": 2}
    threads = [threading.Thread(target=work, args=pair) for pair in families.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    for family, seed in families.items():
        model = model_of(family)
        assert_same(results[family], generate(model, tokens(1, 60, seed=seed), stock_cache(model)))
    assert list(tmp_path.iterdir()) == []
    assert workers() == []


@pytest.mark.parametrize("at", [0, 1, 5, 9, 14])
@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_an_interrupt_anywhere_leaves_no_read_behind_and_a_cache_that_can_be_reset(
    model, tmp_path, monkeypatch, where, at
):
    ids = tokens(1, 60)
    real, count = blockwise.attend_tile, iter(range(10**6))

    def interrupted(*arguments, **more):
        if next(count) == at:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    with cache_for(model, tmp_path, dense_projection_chunk_rows=16) as cache:
        if where == "decode":
            model(ids, past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(blockwise, "attend_tile", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model(ids if where == "prefill" else ids[:, :1], past_key_values=cache)
        assert len(cache._session.source._reader._ahead) == 0
        assert cache.get_seq_length() == (60 if where == "decode" else 0)
        cache.reset()
        assert len(cache._session.source._reader._ahead) == 0
        assert cache.state().disk_bytes == 0
        assert_same(generate(model, ids, cache), generate(model, ids, stock_cache(model)))
    assert list(tmp_path.iterdir()) == []


def test_a_closed_cache_gives_back_all_that_it_claimed(model, tmp_path, claims):
    with cache_for(model, tmp_path, ram_budget="1MiB") as cache:
        generate(model, tokens(1, 60), cache, new_tokens=5)
        purposes = {claim.purpose for claim in claims()}
        state = cache.state()
    assert purposes == {"Read buffers", "Write buffers", "tails", "activations", "resident keys and values"}
    assert (state.read_buffers, state.buffer_bytes > 0, state.resident_bytes > 0) == (7, True, True)
    assert claims() == []


def test_a_cache_that_cannot_have_its_buffers_leaves_nothing_behind(model, tmp_path, monkeypatch, workers, claims):
    from ollm.errors import MemoryLimitError
    from ollm.io import buffers

    class Full(type(ledger)):
        def _claim(self, purpose, nbytes, device):
            return None if purpose == "Read buffers" else super()._claim(purpose, nbytes, device)

    full = Full()
    monkeypatch.setattr(buffers, "ledger", full)
    with pytest.raises(MemoryLimitError, match="Read buffers need"), cache_for(model, tmp_path):
        pass
    assert full._claims == []
    assert claims() == []
    assert list(tmp_path.iterdir()) == []
    assert workers() == []
