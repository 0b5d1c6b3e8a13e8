"""Opening a plan: when any step of it fails, nothing is left of those before, and the next attempt works."""

from __future__ import annotations

import pytest
import torch

from ollm import disk_cache
from ollm.api import opening
from ollm.contracts.kv import KVStore
from ollm.io.ledger import MemoryLedger
from ollm.registry import Registry
from ollm.seam.cache import KVCache
from together.comparison import tokens
from together.tiny_models import make_model


class Stop(BaseException):
    """Like Ctrl-C: no handler of ordinary errors sees it."""


@pytest.fixture
def model():
    """One that was tried before, so that every step that fails is one of opening."""
    model = make_model("llama")
    disk_cache(model, cache_strategy="resident").close()
    return model


def stop(*args, **kwargs):
    raise Stop


def fail(name):
    """Instead of what it should do."""
    return lambda patch: patch.setattr(f"ollm.api.opening.{name}", stop)


def fail_building(after):
    """A store's constructor fails, before it asked for its storage or after."""

    def install(patch):
        build = Registry.build

        def broken(self, offer, context, contract):
            if contract is not KVStore:
                return build(self, offer, context, contract)
            if after:
                context.storage()
            raise Stop

        patch.setattr(Registry, "build", broken)

    return install


def fail_claiming(number):
    def install(patch):
        calls, claim = [], MemoryLedger.try_claim

        def broken(self, purpose, nbytes, device):
            calls.append(purpose)
            if [call for call in calls if call in ("tails", "activations")][number:]:
                raise Stop
            return claim(self, purpose, nbytes, device)

        patch.setattr(MemoryLedger, "try_claim", broken)

    return install


def fail_in_the_cache(patch):
    """After the cache has joined the session."""
    patch.setattr(KVCache, "_new_layer", stop)


def fail_the_window(patch):
    """The store does not do what was asked for."""
    patch.setattr("ollm.builtin.chunked.ChunkedStore.window", property(stop), raising=False)


STEPS = {
    "folder": fail("CacheFolder.create"),
    "storage": fail("SegmentedStorage"),
    "store": fail_building(after=False),
    "store, after its storage": fail_building(after=True),
    "window": fail_the_window,
    "first claim": fail_claiming(0),
    "second claim": fail_claiming(1),
    "session": fail("KVSession"),
    "cache": fail("KVCache"),
    "layers of the cache": fail_in_the_cache,
    "model": fail("switch_on"),
}


@pytest.fixture
def look(claims):
    """`look(model)`: what opening a cache changes."""

    def see(model):
        layers = model.model.layers
        return model.config._attn_implementation, [vars(layer).get("forward") for layer in layers], claims()

    return see


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_leaves_nothing(model, look, step, tmp_path, monkeypatch):
    before = look(model)
    with monkeypatch.context() as patch:
        STEPS[step](patch)
        with pytest.raises(Stop) as caught:
            disk_cache(model, cache_dir=tmp_path / "kv")
    assert caught.tb is not None  # and with it everything that was half made is still alive: nothing went by itself
    assert list(tmp_path.glob("kv/*")) == []
    assert look(model) == before
    with disk_cache(model, cache_dir=tmp_path / "kv") as cache, torch.inference_mode():
        model(tokens(1, 9), past_key_values=cache)
        assert cache.get_seq_length() == 9
    assert list(tmp_path.glob("kv/*")) == []
    assert look(model) == before


def test_the_steps_do_their_work_where_nothing_fails(model, look, tmp_path):
    """What the test above looks at does change when a cache is opened."""
    before = look(model)
    with disk_cache(model, cache_dir=tmp_path / "kv"):
        after = look(model)
        assert all(mine != theirs for mine, theirs in zip(before, after, strict=True))
        assert list(tmp_path.glob("kv/kv_cache_chunked/run-*")) != []


def test_a_trial_that_fails_comes_before_anything_is_made(look, tmp_path, monkeypatch):
    model = make_model("llama")
    before = look(model)
    monkeypatch.setattr(opening, "try_blocks", stop)
    with pytest.raises(Stop):
        disk_cache(model, cache_dir=tmp_path / "kv")
    assert not (tmp_path / "kv").exists()
    assert look(model) == before


def test_a_trial_leaves_nothing_behind(look, tmp_path):
    model = make_model("llama")
    before = look(model)
    cache = disk_cache(model, cache_dir=tmp_path / "kv")
    assert "a trial gave the same logits" in cache.state().mode_reason
    cache.close()
    assert look(model) == before
