"""A forward pass is a transaction: wherever it fails, the same tokens can be given again, and the logits are those of a
run in which nothing failed. And what a pass was given is in the cache afterwards, or there is no answer."""

from __future__ import annotations

import contextlib
import itertools
import threading

import pytest
import torch
from transformers import DynamicCache

from ollm.errors import (
    CacheBusyError,
    CacheClosedError,
    CacheNotFilledError,
    ConfigurationError,
    InterruptedForwardError,
    OllmError,
    UnsupportedOperationError,
)
from ollm.io import shim
from ollm.kv.history import LayerHistory
from ollm.testing.case import depth
from ollm.testing.faults import FAULTS, FaultyDisk
from together.architectures import make
from together.comparison import assert_close, assert_same, cache_for, generate, stock_cache, tokens

pytestmark = pytest.mark.timeout(120)

KINDS = ["llama", "gemma3", "qwen3_next"]  # every kind of layer: full, sliding, recurrent
MODES = pytest.mark.parametrize(
    "more", [{"dense_projection_chunk_rows": 6}, {"mode": "tensor"}], ids=["block", "tensor"]
)


@contextlib.contextmanager
def failing(module, error, *, after):
    """A hook of the user on a module."""

    def fail(*_):
        raise error

    hook = (module.register_forward_hook if after else module.register_forward_pre_hook)(fail)
    try:
        yield
    finally:
        hook.remove()


@MODES
@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_a_pass_that_fails_at_any_layer_can_be_given_again(model, more, tmp_path):
    """A prompt, then more tokens, one at a time and several, each failing once at every place; nothing is lost, nothing
    is there twice."""
    modules = [*model.get_decoder().layers, model.get_decoder(), model.lm_head, model]
    places = itertools.product(modules, [False, True])
    text, stock = tokens(1, 200), stock_cache(model)
    with cache_for(model, tmp_path, **more) as cache:
        for (module, after), count, error in zip(
            places, itertools.cycle([20, 1, 9]), itertools.cycle([KeyboardInterrupt, ValueError]), strict=False
        ):
            held = cache.get_seq_length()
            part = text[:, held : held + count]
            with failing(module, error, after=after), pytest.raises(error):
                model(part, past_key_values=cache)
            assert cache.get_seq_length() == held
            truth = model(part, past_key_values=stock).logits
            assert_close(model(part, past_key_values=cache).logits, truth)
        assert torch.equal(cache.token_ids, text[:, : cache.get_seq_length()])


@pytest.mark.parametrize("fault", ["no room", "input/output error", "Ctrl-C after"])
@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_a_pass_that_fails_at_any_operation_of_the_disk_can_be_given_again(model, fault, tmp_path, monkeypatch):
    text, stock = tokens(1, 26), stock_cache(model)
    parts = text.split([15, 1, 6, 1, 1, 1, 1], dim=1)
    truth = [model(part, past_key_values=stock).logits for part in parts]

    def run(disk, folder):
        """Where it failed, the same tokens again; what fails in the background is told by the next call."""
        errors = 0
        with cache_for(model, folder, "paged", dense_projection_chunk_rows=6) as cache:
            with monkeypatch.context() as patch:
                patch.setattr(shim, "disk", disk)
                for part, logits in zip(parts, truth, strict=True):
                    held = cache.get_seq_length()
                    while True:
                        try:
                            ours = model(part, past_key_values=cache).logits
                            break
                        except (OllmError, KeyboardInterrupt):
                            errors += 1
                            assert errors < 5
                            assert cache.get_seq_length() == held
                    assert_close(ours, logits)
                with contextlib.suppress(OllmError, KeyboardInterrupt):
                    cache._session.store.storage.flush()
            assert torch.equal(cache.token_ids, text)
        assert list(folder.iterdir()) == []
        return errors

    sound = FaultyDisk()
    assert run(sound, tmp_path) == 0
    total = len(sound.operations)
    seen = 0
    for at in range(0, total, max(total // depth(5), 1)):
        seen += run(FaultyDisk(FAULTS[fault], at), tmp_path)
    assert seen > 0


def test_a_failing_pass_frees_what_it_wrote_and_nothing_else(model, tmp_path):
    with cache_for(model, tmp_path, "paged") as cache:
        model(tokens(1, 21), past_key_values=cache)
        before = cache.state()
        with failing(model.lm_head, ValueError, after=True), pytest.raises(ValueError):
            model(tokens(1, 50), past_key_values=cache)
        after = cache.state()
    for name in ("tokens", "persisted_tokens", "tail_tokens", "resident_bytes", "disk_bytes", "rows"):
        assert getattr(after, name) == getattr(before, name), name


def test_a_failing_pass_of_one_fork_leaves_the_others_alone(model, tmp_path):
    ids = tokens(1, 21)
    with cache_for(model, tmp_path, "paged") as cache:
        model(ids, past_key_values=cache)
        fork = cache.fork()
        with failing(model, ValueError, after=True), pytest.raises(ValueError):
            model(tokens(1, 30), past_key_values=fork)
        for one in (fork, cache):
            assert_same(generate(model, ids[:, :1], one, attention_mask=torch.ones(1, 22)), later(model, ids))
        fork.close()


def later(model, ids):
    stock = stock_cache(model)
    model(ids, past_key_values=stock)
    return generate(model, ids[:, :1], stock, attention_mask=torch.ones(1, 22))


def test_what_has_left_a_window_comes_back_after_a_failing_pass(model, tmp_path):
    """It is freed only when the pass is over."""
    arguments = {"cache_strategy": "sliding-window-ring-buffer", "cache_window_tokens": 8, "ram_budget": 0}
    ids = tokens(1, 40)

    def run(fail):
        with cache_for(model, tmp_path, **arguments) as cache:
            model(ids[:, :20], past_key_values=cache)
            if fail:
                with failing(model, ValueError, after=True), pytest.raises(ValueError):
                    model(tokens(1, 33, seed=5), past_key_values=cache)
            return model(ids[:, 20:], past_key_values=cache).logits, cache.state().evicted_tokens

    for ours, truth in zip(run(fail=True), run(fail=False), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_an_undoing_that_is_interrupted_is_finished_by_whoever_comes_next(model, tmp_path, monkeypatch):
    """A second Ctrl-C at any layer."""
    text = tokens(1, 60)
    undo, calls = LayerHistory.undo, []

    def interrupted(at, history):
        calls.append(history)
        if len(calls) == at:
            raise KeyboardInterrupt
        undo(history)

    for at in (1, 2):
        stock = stock_cache(model)
        with cache_for(model, tmp_path) as cache:
            model(text[:, :20], past_key_values=cache)
            model(text[:, :20], past_key_values=stock)
            calls.clear()
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(LayerHistory, "undo", lambda history, at=at: interrupted(at, history))
                with failing(model.lm_head, KeyboardInterrupt, after=False):
                    model(text[:, :7], past_key_values=cache)
            part = text[:, 20:29]
            assert_close(model(part, past_key_values=cache).logits, model(part, past_key_values=stock).logits)


def test_a_pass_that_cannot_be_undone_is_told_until_the_cache_is_reset(model, tmp_path, monkeypatch):
    def impossible(history):
        raise RuntimeError("the device is gone")

    ids = tokens(1, 20)
    with cache_for(model, tmp_path) as cache:
        model(ids, past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(LayerHistory, "undo", impossible)
            with failing(model.lm_head, ValueError, after=False), pytest.raises(ValueError):
                model(ids, past_key_values=cache)
            for use in (
                lambda: model(ids, past_key_values=cache),
                lambda: generate(model, ids, cache),
                lambda: cache.crop(-1),
                lambda: cache.fork(),
            ):
                with pytest.raises(InterruptedForwardError, match=r"the device is gone.*reset"):
                    use()
        cache.reset()
        assert_same(generate(model, ids, cache), generate(model, ids, stock_cache(model)))


def test_layers_that_were_filled_unevenly_by_hand_are_refused(model, tmp_path):
    keys = torch.zeros(1, 2, 5, 16)
    with cache_for(model, tmp_path) as cache:
        cache.update(keys, keys, 0)
        with pytest.raises(CacheNotFilledError, match=r"given 3 tokens behind 5, and layer 1 .* now has 3"):
            model(tokens(1, 3), past_key_values=cache)
        cache.update(keys[:, :, :2], keys[:, :, :2], 1)
        with pytest.raises(InterruptedForwardError, match="different numbers of tokens"):
            model(tokens(1, 3), past_key_values=cache)


@pytest.mark.parametrize("where", ["update", "lm_head"])
def test_a_cache_that_is_closed_during_a_pass_says_so(model, tmp_path, where):
    with cache_for(model, tmp_path) as cache:
        model(tokens(1, 20), past_key_values=cache)
        module = model.get_decoder().layers[1] if where == "update" else model.lm_head

        def close(*_):
            thread = threading.Thread(target=cache.close)
            thread.start()
            thread.join()

        hook = module.register_forward_pre_hook(close)
        with pytest.raises(CacheClosedError):
            model(tokens(1, 3), past_key_values=cache)
        hook.remove()
    assert list(tmp_path.iterdir()) == []


def test_another_thread_and_a_hook_are_refused_during_a_pass(model, tmp_path):
    caught = []

    def elsewhere(*_):
        with torch.inference_mode():
            for use in (lambda: model(tokens(1, 2), past_key_values=cache), cache.reset):
                try:
                    use()
                except CacheBusyError as error:
                    caught.append(str(error))

    def use(*_):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with pytest.raises(CacheBusyError, match="under way"):
            cache.crop(-1)

    with cache_for(model, tmp_path) as cache:
        model(tokens(1, 20), past_key_values=cache)
        hook = model.lm_head.register_forward_hook(use)
        model(tokens(1, 3), past_key_values=cache)
        hook.remove()
        assert cache.get_seq_length() == 23
    assert len(caught) == 2
    assert "another thread" in caught[0]


def replaced(kwargs):
    kwargs["past_key_values"] = DynamicCache()


def dropped(kwargs):
    kwargs["past_key_values"] = None


def fed_twice(kwargs):
    cache = kwargs["past_key_values"]
    keys = torch.zeros(1, 2, 1, 16)
    cache.update(keys, keys, 1)


@pytest.mark.parametrize("change", [replaced, dropped, fed_twice])
@pytest.mark.parametrize("at", [0, 5])
def test_model_code_that_does_not_fill_the_cache_gives_no_answer(model, change, at, tmp_path, monkeypatch):
    """From the beginning, or in the middle of a conversation; and what it does once is undone."""
    decoder, ids = model.get_decoder(), tokens(1, 20)
    forward, calls, armed = type(decoder).forward, itertools.count(), []

    def changed(self, *args, **kwargs):
        if armed and next(calls) == at:
            change(kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(decoder), "forward", changed)
    with cache_for(model, tmp_path) as cache:
        armed.append(True)
        with pytest.raises(CacheNotFilledError, match="undone"):
            generate(model, ids, cache)
        armed.clear()
        assert cache.get_seq_length() == (0 if at == 0 else 19 + at)
        text = torch.cat([cache.token_ids, tokens(1, 1, seed=9)], dim=1) if at else ids
        assert_same(generate(model, text, cache), generate(model, text, stock_cache(model)))


def test_a_model_that_is_called_with_another_cache_than_generate_is_told(model, tmp_path, monkeypatch):
    prepare = type(model).prepare_inputs_for_generation

    def other(self, *args, **kwargs):
        return {**prepare(self, *args, **kwargs), "past_key_values": DynamicCache()}

    with cache_for(model, tmp_path) as cache:
        monkeypatch.setattr(type(model), "prepare_inputs_for_generation", other)
        with pytest.raises(CacheNotFilledError, match="generate was given a KVCache"):
            generate(model, tokens(1, 9), cache)


@pytest.mark.parametrize("by", ["argument", "generation config", "forward"])
def test_use_cache_false_is_refused_before_any_work(model, by, tmp_path):
    ids = tokens(1, 9)
    use = {
        "argument": lambda: generate(model, ids, cache, use_cache=False),
        "generation config": lambda: generate(model, ids, cache),
        "forward": lambda: model(ids, past_key_values=cache, use_cache=False),
    }[by]
    with cache_for(model, tmp_path) as cache:
        before = model.generation_config.use_cache
        try:
            model.generation_config.use_cache = by != "generation config"
            with (
                failing(model.get_decoder().layers[0], AssertionError, after=False),
                pytest.raises(ConfigurationError, match=r"use_cache=False .* generation_config\.json"),
            ):
                use()
        finally:
            model.generation_config.use_cache = before
        assert_same(generate(model, ids, cache), generate(model, ids, stock_cache(model)))


@pytest.mark.parametrize(
    ("architecture", "stored", "growing"),
    [("falcon_h1", "all", 0), ("zamba2", "half", 0), ("deepseek_v32", "all", "all")],
)
def test_layers_that_grow_are_stored_whatever_their_type_is_called(architecture, stored, growing, tmp_path, caplog):
    model = make(architecture)
    ids = tokens(1, 30) % 90 + 3
    stock = generate(model, ids, stock_cache(model), new_tokens=10)
    with cache_for(model, tmp_path) as cache:
        assert_same(generate(model, ids, cache, new_tokens=10), stock)
        state = cache.state()
        layers = len(cache.layers)
        assert state.stored_layers == (layers if stored == "all" else layers // 2)
        assert state.growing_layers == (layers if growing == "all" else growing)
        assert state.memory_bytes > 0
        assert state.persisted_tokens > 0
    assert ("keep something of every token in memory" in caplog.text) == (growing == "all")


def test_rows_of_keys_are_not_repeated_where_those_of_a_recurrent_state_would_stay(tmp_path):
    """transformers' layers that have both inherit these operations, and do them for the keys only."""
    with cache_for(make("falcon_h1"), tmp_path) as cache:
        for operation in (
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.batch_select_indices(torch.tensor([0])),
        ):
            with pytest.raises(UnsupportedOperationError, match="layer 0, a StoredHybridLayer"):
                operation()
        with pytest.raises(UnsupportedOperationError):
            cache.fork(2)
