"""Any order of prefill chunks, decode steps, crops and batch operations, in both modes, against `DynamicCache`."""

from __future__ import annotations

import tempfile

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from ollm import KVCache
from together.comparison import STRATEGIES, assert_close, cache_for, stock_cache, tokens

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("forward"), st.integers(2, 30)),
        st.tuples(st.just("decode"), st.integers(1, 4)),
        st.tuples(st.just("crop"), st.floats(0, 1)),
        st.tuples(st.just("reorder"), st.integers(0, 5)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("select"), st.integers(0, 5)),
        st.tuples(st.just("fork"), st.integers(1, 3)),
    ),
    min_size=2,
    max_size=8,
)


def run(model, cache, steps):
    """The logits of every forward of a schedule."""
    rows, logits, forks = 2, [model(tokens(2, 5, seed=99), past_key_values=cache).logits], []
    for seed, (step, argument) in enumerate(steps):
        if step == "forward":
            logits.append(model(tokens(rows, argument, seed=seed), past_key_values=cache).logits)
        elif step == "decode":
            for token in tokens(rows, argument, seed=seed).split(1, dim=1):
                logits.append(model(token, past_key_values=cache).logits)
        elif step == "crop":
            cache.crop(-int(argument * (cache.get_seq_length() - 1)))
        elif step == "reorder":
            cache.reorder_cache(torch.arange(rows).roll(argument))
        elif step == "repeat" and rows <= 4:
            cache.batch_repeat_interleave(argument)
            rows *= argument
        elif step == "select":
            cache.batch_select_indices(torch.tensor([argument % rows]))
            rows = 1
        elif step == "fork" and rows <= 4:
            if isinstance(cache, KVCache):
                forks.append(cache := cache.fork(argument))
            else:
                cache.batch_repeat_interleave(argument)
            rows *= argument
    for fork in forks[::-1]:
        fork.close()
    return torch.cat([output.flatten() for output in logits])


@pytest.mark.parametrize("model", ["llama", "qwen3"], indirect=True)
@pytest.mark.parametrize("more", [{"mode": "block", "dense_projection_chunk_rows": 6}, {"mode": "tensor"}])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, strategy=st.sampled_from(list(STRATEGIES)), budget=st.sampled_from([0, 6000, 2**30]))
def test_any_schedule_gives_the_logits_of_dynamic_cache(model, more, steps, strategy, budget):
    truth = run(model, stock_cache(model), steps)
    more = {**more, "ram_budget": None if strategy == "resident" else budget}
    with tempfile.TemporaryDirectory() as folder, cache_for(model, folder, strategy, **more) as cache:
        assert_close(run(model, cache, steps), truth)
        assert cache.state().caches == 1
