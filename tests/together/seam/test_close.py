"""Ctrl-C in `close()`: the next call does the rest, and nothing of the cache is left, on disk nor in the model."""

from __future__ import annotations

import gc

import pytest
import torch

from core.interrupts import interrupted, lines_of, places
from ollm import disk_cache
from ollm.io.ledger import ledger
from ollm.testing.processes import watchdog
from together.comparison import assert_close, stock_cache, tokens

pytestmark = pytest.mark.timeout(300)
IDS = tokens(1, 30)


def used(model, folder, forks):
    """A cache, and as many forks, with something on disk, in memory, and read ahead."""
    cache = disk_cache(model, cache_dir=folder, spill_policy="tiny", ram_budget="12KiB")
    caches = [cache, *(cache.fork() for _ in range(forks))]
    for one in caches:
        model(IDS, past_key_values=one)
        model(IDS[:, :1], past_key_values=one)
    return caches


def look(model):
    forwards = [vars(module).get("forward") for module in model.modules()]
    return model.config._attn_implementation, forwards, [dict(module._forward_pre_hooks) for module in model.modules()]


@pytest.fixture
def nothing_else():
    gc.collect()
    before = list(ledger._claims)
    return lambda: [claim.purpose for claim in ledger._claims if claim not in before]


@pytest.mark.parametrize("forks", [0, 1])
@pytest.mark.parametrize("how", ["closed again", "dropped"])
def test_an_interrupted_close_is_completed(model, tmp_path, workers, nothing_else, how, forks):
    before, truth = look(model), model(IDS, past_key_values=stock_cache(model)).logits
    caches = used(model, tmp_path, forks)
    count = sum(lines_of(cache.close) for cache in caches)
    for at in list(places(count))[:: 4 if how == "dropped" else 1]:  # collecting garbage takes long
        caches = used(model, tmp_path, forks)

        def close_all(caches=caches):
            for cache in caches:
                cache.close()

        with watchdog(60):
            where = interrupted(close_all, at)
            if how == "closed again":
                close_all()
            del caches, close_all
            if how == "dropped":
                gc.collect()
                for thread in workers():  # one that still reads holds what it reads from
                    thread.join(30)
        assert list(tmp_path.iterdir()) == [], where
        assert look(model) == before, where
        assert nothing_else() == [], where
        assert workers() == [], where
    assert_close(model(IDS, past_key_values=stock_cache(model)).logits, truth)


@pytest.mark.parametrize("gone", [1, 3])
def test_caches_that_are_dropped_give_their_claims_back(model, tmp_path, nothing_else, workers, gone):
    """And forks with them, in any order."""
    for _ in range(5):
        caches = used(model, tmp_path, 3)
        assert "tails" in nothing_else()
        del caches[gone]
        caches.reverse()
        del caches
    gc.collect()
    for thread in workers():
        thread.join(30)
    assert nothing_else() == []
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_was_closed_twice_does_not_end_a_later_fork(model, tmp_path):
    cache, first = used(model, tmp_path, 1)
    first.close()
    second = cache.fork()
    first.close()
    cache.close()
    with torch.inference_mode():
        assert model(IDS[:, :1], past_key_values=second).logits.shape[1] == 1
    second.close()
    assert list(tmp_path.iterdir()) == []
