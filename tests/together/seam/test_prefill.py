"""Prompts in pieces: bounded activations, weights visited once, nothing read back, and progress that is true."""

from __future__ import annotations

import pytest
import torch

from ollm.errors import ConfigurationError
from together.architectures import TESTED, make
from together.comparison import assert_close, assert_same, cache_for, generate, stock_cache, tokens
from together.seam.test_architectures import TENSOR_MODE
from together.tiny_models import FAMILIES

each_family = pytest.mark.parametrize("model", FAMILIES, indirect=True)


def calling(monkeypatch, module, function):
    """Let a module's class call a function of the module and the arguments first: a hook would be noticed."""
    forward = type(module).forward

    def watched(self, *args, **kwargs):
        function(self, args)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(module), "forward", watched)


@each_family
@pytest.mark.parametrize("rows", [1, 7, 16, 64])
def test_pieces_of_any_size_give_the_logits_of_one(model, rows, tmp_path):
    ids, more = tokens(2, 45), tokens(2, 20, seed=1)
    mask = torch.ones(2, 65, dtype=torch.long)
    mask[0, :11] = 0

    def logits(cache):
        first = model(ids, attention_mask=mask[:, :45], past_key_values=cache).logits[:, 11:]
        return torch.cat([first, model(more, attention_mask=mask, past_key_values=cache).logits], dim=1)

    with cache_for(model, tmp_path, dense_projection_chunk_rows=rows) as cache:
        assert_close(logits(cache), logits(stock_cache(model)))


@pytest.mark.parametrize("model_type", [name for name in TESTED if name not in TENSOR_MODE])
def test_every_architecture_takes_pieces_or_says_that_it_does_not(model_type, tmp_path):
    model = make(model_type)
    ids = tokens(2, 30) % 98 + 3
    stock = generate(model, ids, stock_cache(model), new_tokens=6)
    with cache_for(model, tmp_path, dense_projection_chunk_rows=7) as cache:
        assert_same(generate(model, ids, cache, new_tokens=6), stock)
        assert cache.state().mode == "block"


@each_family
def test_a_layer_sees_no_more_than_a_piece_and_layers_come_one_after_the_other(model, tmp_path, monkeypatch):
    seen, mlps = [], [layer.mlp for layer in model.get_decoder().layers]
    calling(monkeypatch, mlps[0], lambda mlp, args: seen.append((mlps.index(mlp), args[0].shape[1])))
    with cache_for(model, tmp_path, dense_projection_chunk_rows=16) as cache:
        seen.clear()
        model(tokens(1, 40), past_key_values=cache)
    assert seen == [(index, rows) for index in range(len(mlps)) for rows in (16, 16, 8)]


def test_a_prompt_is_whole_while_outputs_are_recorded_or_somebody_watches_and_in_pieces_again_afterwards(
    tmp_path, monkeypatch
):
    model, seen = make("mixtral"), []
    ids = tokens(1, 20) % 98 + 3
    calling(monkeypatch, model.model.layers[0].mlp, lambda mlp, args: seen.append(args[0].shape[1]))

    def rows(cache, **settings):
        seen.clear()
        model(ids, past_key_values=cache, **settings)
        return seen[: len(seen) // len(model.model.layers)]

    with cache_for(model, tmp_path, dense_projection_chunk_rows=8) as cache:
        assert rows(cache) == [8, 8, 4]
        assert rows(cache, output_router_logits=True) == [20]
        assert rows(cache) == [8, 8, 4], "its hooks are still there"
        handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        assert rows(cache)[0] == 20
        handle.remove()
        assert rows(cache) == [8, 8, 4]


def test_a_piece_has_so_many_tokens_of_all_rows(model, tmp_path, monkeypatch):
    """Not of each row: a batch would take as many times the memory that is counted for a piece."""
    seen = []
    first = model.get_decoder().layers[0].mlp
    calling(monkeypatch, first, lambda mlp, args: seen.append(args[0].shape[:2]) if mlp is first else None)
    with cache_for(model, tmp_path, dense_projection_chunk_rows=16) as cache:
        model(tokens(4, 10), past_key_values=cache)
        model(tokens(4, 1), past_key_values=cache)
    with cache_for(model, tmp_path, dense_projection_chunk_rows=3) as cache:
        model(tokens(4, 3), past_key_values=cache)
    assert seen == [(4, 4), (4, 4), (4, 2), (4, 1), *[(4, 1)] * 3]


def test_what_a_layer_has_just_stored_is_not_read_back(model, tmp_path):
    with cache_for(model, tmp_path, dense_projection_chunk_rows=8) as cache:
        model(tokens(1, 100), past_key_values=cache)
        assert cache.state().persisted_tokens > 90
        assert cache.counters.loaded_bytes == 0
        saved = cache.counters.saved_bytes
        model(tokens(1, 1), past_key_values=cache)
        assert cache.counters.loaded_bytes == saved


def test_a_prompt_that_stops_between_two_pieces_leaves_its_layer_as_it_was(tmp_path, monkeypatch):
    """With a single attention layer there is no other one whose length could give the accident away."""
    model = make("llama")
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    ids = tokens(1, 30) % 98 + 3
    with cache_for(model, tmp_path, dense_projection_chunk_rows=8) as cache:
        model(ids, past_key_values=cache)
        passes = iter([None, None])

        def stop(*_):
            if next(passes, "stop") == "stop":
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            calling(patch, model.model.layers[0].mlp, stop)
            model(ids, past_key_values=cache)
        assert cache.get_seq_length() == 30
        stock = stock_cache(model)
        model(ids, past_key_values=stock)
        assert_close(model(ids, past_key_values=cache).logits, model(ids, past_key_values=stock).logits)


def test_nothing_of_it_is_left_on_the_model(model, tmp_path):
    layers = list(model.model.layers)
    before = [dict(vars(layer)) for layer in layers]
    with cache_for(model, tmp_path) as cache, cache_for(model, tmp_path):
        assert all("forward" in vars(layer) for layer in layers)
        model(tokens(1, 5), past_key_values=cache)
    assert [dict(vars(layer)) for layer in layers] == before


def test_a_wrapper_that_was_there_before_is_there_afterwards(model, tmp_path):
    layer, calls = model.model.layers[0], []
    original = layer.forward

    def wrapper(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = wrapper
    try:
        with cache_for(model, tmp_path, dense_projection_chunk_rows=4) as cache:
            calls.clear()
            model(tokens(1, 8), past_key_values=cache)
            assert len(calls) == 1, "it sees the prompt whole"
        assert vars(layer)["forward"] is wrapper
    finally:
        del layer.forward


def test_progress_is_reported_for_every_piece_of_every_layer(model, tmp_path):
    reports = []
    with cache_for(model, tmp_path, dense_projection_chunk_rows=10, progress=reports.append) as cache:
        model(tokens(1, 30), past_key_values=cache)
        assert len(reports) == 9
        model(tokens(1, 1), past_key_values=cache)
        assert len(reports) == 9, "a decode step is no prefill"
    assert [round(report.layers_done * 3) for report in reports] == list(range(1, 10))
    assert reports[-1].eta_seconds == 0
    assert reports[0].eta_seconds > 0
    assert all(report.tokens == 30 and report.layers == 3 for report in reports)
    assert [report.saved_bytes for report in reports] == sorted(report.saved_bytes for report in reports)


@pytest.mark.parametrize("rows", [0, -4, 1.5, True, "many"])
def test_a_wrong_number_of_rows_is_refused(model, rows, tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"dense_projection_chunk_rows=.*(give 1 or more tokens|is not a whole number)"
    ):
        cache_for(model, tmp_path, dense_projection_chunk_rows=rows).__enter__()
