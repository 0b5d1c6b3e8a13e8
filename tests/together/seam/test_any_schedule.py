"""Any order of passes, failing ones too, crops, batch operations, forks and resets, over every store and its odd
options, in both modes and for every kind of layer. The truth is the text itself: computed anew, without any cache."""

from __future__ import annotations

import contextlib
import functools
import tempfile

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from ollm.errors import UnsupportedOperationError
from ollm.testing.case import depth
from together.comparison import cache_for, tokens
from together.tiny_models import make_model

truth_of = functools.cache(make_model)  # no cache of ours ever touches these

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("forward"), st.integers(2, 30)),
        st.tuples(st.just("decode"), st.integers(1, 4)),
        st.tuples(st.just("fail"), st.tuples(st.integers(1, 12), st.floats(0, 1), st.booleans())),
        st.tuples(st.just("crop"), st.floats(0, 1)),
        st.tuples(st.just("reorder"), st.integers(0, 5)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("select"), st.integers(0, 5)),
        st.tuples(st.just("fork"), st.integers(1, 3)),
        st.tuples(st.just("reset"), st.none()),
    ),
    min_size=2,
    max_size=8,
)
STORES = st.one_of(
    st.fixed_dictionaries({"cache_strategy": st.sampled_from(["chunked", "tiered-write-back"])}),
    st.fixed_dictionaries(
        {
            "cache_strategy": st.just("paged"),
            "options": st.fixed_dictionaries({"page_tokens": st.sampled_from([1, 3, 7, 64])}),
        }
    ),
    st.fixed_dictionaries(
        {
            "cache_strategy": st.just("streamed-segmented"),
            "options": st.fixed_dictionaries({"segment_bytes": st.sampled_from(["4KiB", "40KiB"])}),
        }
    ),
    st.fixed_dictionaries(
        {
            "cache_strategy": st.just("log-structured-journal"),
            "options": st.fixed_dictionaries({"compaction_entries": st.sampled_from([2, 5])}),
        }
    ),
)
WINDOWS = st.fixed_dictionaries(
    {
        "cache_strategy": st.just("sliding-window-ring-buffer"),
        "cache_window_tokens": st.sampled_from([1, 4, 12]),
        "options": st.fixed_dictionaries(
            {"slot_tokens": st.sampled_from([1, 5, 16, 40]), "sink_tokens": st.sampled_from([0, 3])}
        ),
    }
)
MORE = st.fixed_dictionaries(
    {
        "ram_budget": st.sampled_from([0, 6000, 2**30]),
        "spill_policy": st.sampled_from(["tiny", "write-through", "hot-tail"]),
    }
)
PIECES = st.sampled_from([4, 4096])


class Broken(Exception):
    """Some hook of a user failed."""


@contextlib.contextmanager
def broken(model, place, *, after):
    """A hook fails somewhere between the first layer and the end of the model."""
    layers = [*model.get_decoder().layers, model.lm_head, model]
    module = layers[round(place * (len(layers) - 1))]

    def fail(*_):
        raise Broken

    hook = (module.register_forward_hook if after else module.register_forward_pre_hook)(fail)
    try:
        yield
    finally:
        hook.remove()


def seen(length, window, sinks):
    """Which key a query of a window sees."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    return ((key <= query) & ((key > query - window) | (key < sinks)))[None, None]


class Run:
    """A schedule, with what the cache ought to hold beside it."""

    def __init__(self, model, truth, cache, *, window=None, sinks=0):
        self.model, self.truth, self.cache = model, truth, cache
        self.window, self.sinks = window, sinks
        self.text = tokens(2, 0)
        self.forks = []

    def step(self, number, kind, argument):
        rows = len(self.text)
        if kind in ("forward", "decode"):
            new = tokens(rows, argument, seed=number)
            for part in new.split(1, dim=1) if kind == "decode" else [new]:
                self.give(part)
        elif kind == "fail":
            count, place, after = argument
            new = tokens(rows, count, seed=number)
            with broken(self.model, place, after=after), pytest.raises(Broken):
                self.model(new, past_key_values=self.cache)
            self.give(new)
        elif kind == "crop":
            remove = int(argument * (self.text.shape[1] - 1)) if self.text.shape[1] else 0
            with contextlib.suppress(UnsupportedOperationError):
                self.cache.crop(-remove)
                self.text = self.text[:, : self.text.shape[1] - remove]
        elif kind == "reset":
            self.cache.reset()
            self.text = self.text[:, :0]
        else:
            self.change_rows(kind, argument, rows)
        assert self.cache.get_seq_length() == self.text.shape[1]
        if self.text.shape[1]:
            assert torch.equal(self.cache.token_ids, self.text)

    def give(self, new):
        """Some tokens, and whether the logits are right."""
        self.text = torch.cat([self.text, new], dim=1)
        mask = None if self.window is None else seen(self.text.shape[1], self.window, self.sinks)
        truth = self.truth(self.text, attention_mask=mask, use_cache=False).logits[:, -new.shape[1] :]
        ours, scale = self.model(new, past_key_values=self.cache).logits, truth.abs().max()
        # a recurrence that is computed at once, as the truth is, rounds otherwise than one that goes step by step
        assert (ours - truth).abs().max() <= 1e-3 * scale

    def change_rows(self, kind, argument, rows):
        if kind != "select" and rows > 4:
            return
        index = {
            "reorder": lambda: torch.arange(rows).roll(argument),
            "repeat": lambda: torch.arange(rows).repeat_interleave(argument),
            "select": lambda: torch.tensor([argument % rows]),
            "fork": lambda: torch.arange(rows).repeat_interleave(argument),
        }[kind]()
        with contextlib.suppress(UnsupportedOperationError):
            if kind == "reorder":
                self.cache.reorder_cache(index)
            elif kind == "repeat":
                self.cache.batch_repeat_interleave(argument)
            elif kind == "select":
                self.cache.batch_select_indices(index)
            else:
                self.forks.append(fork := self.cache.fork(argument))
                self.cache = fork
            self.text = self.text[index]

    def close_forks(self):
        for fork in self.forks[::-1]:
            fork.close()


def check(family, model, steps, arguments, **window):
    with tempfile.TemporaryDirectory() as folder, cache_for(model, folder, **arguments) as cache:
        run = Run(model, truth_of(family), cache, **window)
        try:
            run.step(99, "forward", 5)
            for number, (kind, argument) in enumerate(steps):
                run.step(number, kind, argument)
        finally:
            run.close_forks()
        assert cache.state().caches == 1


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
@pytest.mark.parametrize("mode", ["block", "tensor"])
@settings(max_examples=depth(8), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, store=STORES, more=MORE, pieces=PIECES)
def test_any_schedule_gives_the_logits_of_the_text(family, model_of, mode, steps, store, more, pieces):
    pieces = {"dense_projection_chunk_rows": pieces} if mode == "block" else {}
    check(family, model_of(family), steps, {"options": {}, **store, **more, "mode": mode, **pieces})


@settings(max_examples=depth(16), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, store=WINDOWS, more=MORE, pieces=PIECES)
def test_any_schedule_over_a_window_gives_the_logits_of_what_is_seen(model_of, steps, store, more, pieces):
    window = {"window": store["cache_window_tokens"], "sinks": store["options"]["sink_tokens"]}
    arguments = {**store, **more, "dense_projection_chunk_rows": pieces}
    check("llama", model_of("llama"), steps, arguments, **window)
