"""A conversation may change between `inference_mode`, `no_grad`, neither and autocast at every turn, and so may its
forks. transformers' own cache is the truth, in `no_grad` where it cannot take an order itself."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollm.errors import BlockModeError, UnsupportedOperationError
from ollm.testing.case import depth
from together.comparison import STRATEGIES, assert_close, cache_for, stock_cache, tokens
from together.tiny_models import FAMILIES, RECURRENT, make_model

GRAD_MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "neither": torch.enable_grad,
}
TURNS = ("prompt", "step", "reorder", "fork", "crop")


@pytest.fixture(autouse=True)
def no_mode():
    """Tests here choose themselves."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    """Its weights are none of inference mode, and want gradients, as transformers loads them."""
    with torch.inference_mode(False):
        return make_model(request.param)


def autocast(on):
    return torch.autocast("cpu", torch.bfloat16) if on else contextlib.nullcontext()


def take_turn(model, cache, turn, seed):
    """The cache of the next turn, and the logits of this one."""
    if turn == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
    if turn == "crop" and model.config.model_type in ("llama", "qwen3"):  # which have no other than full layers
        cache.crop(-2)
    ids = tokens(2, {"prompt": 7}.get(turn, 1), seed=seed)
    return model(ids, past_key_values=cache).logits.detach().float()


def turn_of(kinds):
    return st.tuples(st.sampled_from(kinds), st.sampled_from(sorted(GRAD_MODES)), st.booleans())


turns = st.builds(lambda first, more: [first, *more], turn_of(["prompt"]), st.lists(turn_of(TURNS), max_size=4))


@settings(
    max_examples=depth(4),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(turns=turns, strategy=st.sampled_from(sorted(STRATEGIES)), casts=st.booleans())
def test_every_order_of_modes_is_right(model, tmp_path_factory, turns, strategy, casts):
    casts = casts and not hasattr(model.config, "num_experts_per_tok")  # another rounding may choose another expert
    stock, expected = stock_cache(model), []
    with torch.no_grad():
        for number, (turn, _, cast) in enumerate(turns):
            with autocast(casts and cast):
                expected.append(take_turn(model, stock, turn, number))
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(cache_for(model, tmp_path_factory.mktemp("kv"), strategy))
        for number, (turn, mode, cast) in enumerate(turns):
            with GRAD_MODES[mode](), autocast(casts and cast):
                if turn == "fork" and model.config.model_type not in RECURRENT:  # of which no row can be repeated
                    cache = stack.enter_context(cache.fork())
                found = take_turn(model, cache, turn, number)
            if casts:  # rounded to bfloat16 in other places
                scale = expected[number].abs().max().item()
                torch.testing.assert_close(found, expected[number], rtol=0, atol=0.1 * scale)
            else:
                assert_close(found, expected[number])


@pytest.mark.parametrize("strategy", ["chunked, nothing resident", "resident", "paged", "chunked, tensor mode"])
@pytest.mark.parametrize("first", [True, False])
def test_keys_become_as_wide_as_the_widest(strategy, first, tmp_path):
    """With autocast keys are of another dtype than values, and those of the next turn of a third."""
    with torch.inference_mode():
        model = make_model("llama")
        with cache_for(model, tmp_path, strategy) as cache:
            stock = stock_cache(model)
            for number in range(4):
                ids = tokens(2, 5, seed=number)
                with autocast((number % 2 == 0) == first):
                    ours, theirs = (model(ids, past_key_values=one).logits.float() for one in (cache, stock))
                scale = theirs.abs().max().item()
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05 * scale)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_may_be_made_under_autocast(family, tmp_path):
    with torch.inference_mode():
        model = make_model(family)
        with autocast(True), cache_for(model, tmp_path) as cache:
            assert cache.state().mode == "block"


@pytest.mark.parametrize("mode", ["block", "tensor"])
def test_a_gradient_that_would_be_incomplete_is_refused(mode, tmp_path):
    model = make_model("llama")
    error = BlockModeError if mode == "block" else UnsupportedOperationError
    with cache_for(model, tmp_path, mode=mode) as cache:
        model(tokens(1, 5), past_key_values=cache)
        logits = model(tokens(1, 5), past_key_values=cache).logits
        with pytest.raises(error, match="no gradient"):
            logits.sum().backward()


def test_gradients_of_what_no_gradient_goes_through_a_cache_for_are_those_of_stock(tmp_path):
    """In tensor mode: a first pass, and one after a past that was computed without."""
    gradients = []
    for ours in (True, False):
        model = make_model("llama")
        with cache_for(model, tmp_path, mode="tensor") if ours else contextlib.nullcontext() as cache:
            cache = cache or stock_cache(model)
            with torch.no_grad():
                model(tokens(1, 9), past_key_values=cache)
            model(tokens(1, 5), past_key_values=cache).logits.sum().backward()
            cache.reset() if ours else None
            model(tokens(1, 4), past_key_values=cache if ours else stock_cache(model)).logits.sum().backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)
