"""Windows that a strategy declares: core masks by position and lets the store drop what nobody will see again."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from ollm import disk_cache
from ollm.errors import ConfigurationError, UnsupportedOperationError
from together.architectures import make
from together.comparison import assert_close, assert_same, cache_for, generate, stock_cache, tokens

WINDOW = 12


STRATEGIES = ("tiny-window", "sliding-window-ring-buffer")


def windowed(model, tmp_path, window=WINDOW, **more):
    arguments = {"cache_strategy": "tiny-window", "ram_budget": None, "cache_window_tokens": window, **more}
    return cache_for(model, tmp_path, **arguments)


@pytest.fixture
def sliding_twin(model):
    """The same weights in an architecture that slides in every layer: what transformers itself makes of a window."""
    settings = {name: value for name, value in model.config.to_dict().items() if name in MistralConfig().to_dict()}
    settings.update(model_type="mistral", architectures=None, sliding_window=WINDOW, layer_types=None)
    twin = MistralForCausalLM(MistralConfig(**settings)).eval()
    twin.load_state_dict(model.state_dict())
    twin.generation_config.eos_token_id = None
    return twin


@pytest.mark.parametrize("prompt", [5, WINDOW, WINDOW + 1, 50])
@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 7}])
@pytest.mark.parametrize("rows", [4096, 5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_window_is_exactly_transformers_sliding_window(
    model, sliding_twin, prompt, settings, rows, strategy, tmp_path
):
    """Prompts shorter and much longer than the window, whole and in pieces, then far beyond it."""
    ids = tokens(2, prompt)
    stock = generate(sliding_twin, ids, stock_cache(sliding_twin), new_tokens=40, **settings)
    with windowed(model, tmp_path, dense_projection_chunk_rows=rows, cache_strategy=strategy) as cache:
        assert_same(generate(model, ids, cache, new_tokens=40, **settings), stock)
        state = cache.state()
        assert state.tokens == prompt + 39, "the true length, not the window's"
        assert state.window_tokens == WINDOW
        assert state.evicted_tokens > 0


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sinks_stay_visible(model, sinks, strategy, tmp_path):
    ids = tokens(1, 60)
    position = torch.arange(60)
    seen = (position[None] <= position[:, None]) & (
        (position[None] > position[:, None] - WINDOW) | (position[None] < sinks)
    )
    truth = model(ids, attention_mask=seen[None, None], use_cache=False).logits
    with windowed(model, tmp_path, cache_strategy=strategy, options={"sink_tokens": sinks}) as cache:
        ours = [model(part, past_key_values=cache).logits for part in ids.split([33, 1, 1, 20, 1, 4], dim=1)]
    assert_close(torch.cat(ours, dim=1), truth)


def test_memory_stays_bounded(model, tmp_path):
    sizes = []
    with windowed(model, tmp_path) as cache:
        for _ in range(12):
            model(tokens(1, 10), past_key_values=cache)
            sizes.append(cache.state().resident_bytes + cache.state().tail_bytes)
        assert cache.state().tokens == 120
    assert max(sizes) <= 4 * sizes[0]
    assert sizes[-1] <= max(sizes[:4])


def test_cropping_back_to_what_has_left_the_window_is_refused(model, tmp_path):
    with windowed(model, tmp_path) as cache:
        for part in tokens(1, 40).split(8, dim=1):
            model(part, past_key_values=cache)
        before = cache.state()
        with pytest.raises(UnsupportedOperationError, match=r"in layer 0 tokens before \d+ have left the window of 12"):
            cache.crop(-20)
        assert cache.state() == before
        cache.reset()
        assert cache.get_seq_length() == 0


def test_that_it_changes_the_model_is_said(model, tmp_path, caplog):
    with caplog.at_level(logging.WARNING), windowed(model, tmp_path):
        pass
    assert "keeps the newest 12 tokens only: the model forgets what is older" in caplog.text


@pytest.mark.parametrize(
    ("window", "message"),
    [
        *((window, "'tiny-window': give the number of newest tokens") for window in (None, 0, -3)),
        *((window, f"{window} is not a whole number") for window in (1.5, True)),
    ],
)
def test_a_windowed_strategy_needs_a_window(model, window, message):
    with pytest.raises(ConfigurationError, match=f"cache_window_tokens={window}.*{message}"):
        disk_cache(model, cache_strategy="tiny-window", cache_window_tokens=window)


def test_a_full_strategy_names_those_that_keep_a_window(model, tmp_path):
    with pytest.raises(
        ConfigurationError, match="Strategies that keep a window: sliding-window-ring-buffer, tiny-window"
    ):
        disk_cache(model, cache_dir=tmp_path, cache_window_tokens=64)


def test_a_window_needs_blocks():
    with pytest.raises(ConfigurationError, match="keeps a window, which needs mode='block'; blocks do not work"):
        disk_cache(make("bloom"), cache_strategy="tiny-window", cache_window_tokens=8)


def test_three_and_three_tokens_in_a_window_of_four(model, tmp_path):
    with windowed(model, tmp_path, window=4, cache_strategy="sliding-window-ring-buffer", spill_policy=None) as cache:
        for part in tokens(1, 6).split(3, dim=1):
            model(part, past_key_values=cache)
        state = cache.state()
    assert (state.tokens, state.evictions, state.evicted_tokens) == (6, 1, 2)


def test_a_ring_takes_no_more_disk_however_long_it_runs(model, tmp_path):
    sizes = []
    with windowed(model, tmp_path, cache_strategy="sliding-window-ring-buffer") as cache:
        for _ in range(20):
            model(tokens(1, 10), past_key_values=cache)
            sizes.append(cache.state().disk_bytes)
    assert max(sizes) == max(sizes[:4]), "it has turned around once by then"
