"""Everything that a cache, streamed weights and statistics do to a model is gone with the last of them."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import weakref

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from ollm import changes, disk_cache
from ollm.errors import BlockModeError, ConfigurationError
from ollm.seam import attention, mode
from ollm.seam.meter import Meter
from ollm.seam.mode import switch_on
from ollm.stats import Stats
from together.architectures import make
from together.comparison import assert_close, cache_for, stock_cache, tokens
from together.streamed_models import load, longer, save_checkpoint, stock
from together.tiny_models import FAMILIES, make_model

IDS = tokens(1, 20)


def everything(model):
    """All that is in a model, its modules and its configs, by value where it may change."""
    modules = {}
    for name, module in model.named_modules():
        modules[name] = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
            if key != "config" and not key.startswith("generation_config")
        }
    configs = [copy.deepcopy(vars(config)) for config in mode._configs(model)]
    return modules, configs, copy.deepcopy(vars(model.generation_config))


@contextlib.contextmanager
def as_it_was(model):
    before, kept = everything(model), {*changes._settings}  # of caches that other tests left behind, too
    yield
    assert everything(model) == before
    assert {*changes._settings} <= kept


@pytest.fixture
def own():
    """A model that no other test has."""
    return make_model("llama")


@pytest.fixture
def tuned(own):
    """The same inside a PEFT model."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(own, config).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ending", ["close", "drop"])
def test_after_a_cache(model_of, family, ending, tmp_path):
    model = model_of(family)
    with as_it_was(model):
        cache = disk_cache(model, cache_dir=tmp_path, ram_budget=0)
        assert cache.state().mode == "block"
        model(IDS, past_key_values=cache)
        if ending == "close":
            cache.close()
        else:
            del cache
            gc.collect()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_after_caches_and_a_fork_closed_in_any_order(own, order, tmp_path):
    with as_it_was(own):
        caches = [disk_cache(own, cache_dir=tmp_path, dense_projection_chunk_rows=6) for _ in range(2)]
        caches.append(caches[0].fork())
        for index in order:
            assert own.config._attn_implementation == attention.NAME
            own(IDS, past_key_values=caches[index])
            caches[index].close()


@pytest.mark.parametrize("first", ["base", "peft"])
@pytest.mark.parametrize("closed_first", [0, 1])
def test_after_caches_of_a_model_and_of_the_peft_model_around_it(own, tuned, first, closed_first, tmp_path):
    models = [own, tuned] if first == "base" else [tuned, own]
    expected = tuned(IDS).logits
    with as_it_was(own):
        caches = [disk_cache(model, cache_dir=tmp_path, dense_projection_chunk_rows=6) for model in models]
        assert {cache.state().mode_reason for cache in caches} == {"a trial gave the same logits as stock attention"}
        for index in (closed_first, 1 - closed_first):
            assert_close(models[index](IDS, past_key_values=caches[index]).logits, expected)
            caches[index].close()
        assert own.config._attn_implementation != attention.NAME


@pytest.mark.parametrize("closed_first", [0, 1])
def test_after_caches_of_two_models_that_share_a_config(own, closed_first, tmp_path):
    torch.manual_seed(1)
    models = [own, LlamaForCausalLM(own.config).eval()]
    with as_it_was(models[0]), as_it_was(models[1]):
        caches = [disk_cache(model, cache_dir=tmp_path) for model in models]
        for index in (closed_first, 1 - closed_first):
            models[index](IDS, past_key_values=caches[index])
            caches[index].close()


def test_parts_with_an_attention_of_their_own_get_it_back(own):
    """It was set back for all alike before."""
    inner = copy.deepcopy(own.config)
    own.model.config = inner
    inner._attn_implementation = "eager"
    own.set_attn_implementation("sdpa")
    if inner._attn_implementation != "sdpa":
        pytest.skip("this transformers leaves parts that have a config of the same class as they are")
    inner._attn_implementation = "eager"
    undo = switch_on(own, ())
    assert (own.config._attn_implementation, inner._attn_implementation) == (attention.NAME,) * 2
    undo()
    undo()
    assert (own.config._attn_implementation, inner._attn_implementation) == ("sdpa", "eager")


def test_attention_that_the_user_has_set_meanwhile_stays(own, tmp_path):
    with cache_for(own, tmp_path):
        own.set_attn_implementation("eager")
        with cache_for(own, tmp_path) as second:
            own(IDS, past_key_values=second)
        assert own.config._attn_implementation == "eager"
    assert own.config._attn_implementation == "eager"


def test_a_foreign_wrapper_over_ours_goes_on_alone(own, tmp_path):
    """Nor does what is left below it come in the way of the next cache."""
    layer, calls = own.model.layers[0], []
    expected = own(IDS).logits
    with as_it_was(own):
        with cache_for(own, tmp_path):
            ours = layer.forward

            def theirs(*args, **kwargs):
                calls.append(1)
                return ours(*args, **kwargs)

            layer.forward = theirs
        for _ in range(2):
            with cache_for(own, tmp_path, dense_projection_chunk_rows=4) as cache:
                assert_close(own(IDS, past_key_values=cache).logits, expected)
        assert layer.forward is theirs
        assert len(calls) == 2, "prompts go through it whole"
        layer.forward = ours  # as whoever wraps takes his wrapper off
        assert torch.equal(own(IDS).logits, expected)


@pytest.mark.parametrize("at", range(3))
def test_an_error_in_the_middle_of_switching_undoes_what_was_done(own, at, tmp_path, monkeypatch):
    disk_cache(own, cache_dir=tmp_path).close()  # tried, so that the error is not taken for the model's
    wrap, wrapped = changes.Changes.wrap, []

    def failing(self, module, around, *name):
        if len(wrapped) == at:
            raise MemoryError("in the middle")
        wrapped.append(module)
        wrap(self, module, around, *name)

    monkeypatch.setattr(changes.Changes, "wrap", failing)
    with as_it_was(own), pytest.raises(MemoryError, match="in the middle"):
        disk_cache(own, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_made_changes_nothing(own, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ConfigurationError("no such layer")

    with as_it_was(own), monkeypatch.context() as patch:
        disk_cache(own, cache_dir=tmp_path).close()
        patch.setattr("ollm.seam.cache.stored_layer", refuse)
        with pytest.raises(ConfigurationError, match="no such layer") as caught:
            disk_cache(own, cache_dir=tmp_path)
        assert caught.tb is not None  # which keeps all that was half made
        assert own.config._attn_implementation != attention.NAME


def test_a_model_whose_attention_cannot_be_exchanged_is_as_it_was():
    model = make("bloom")
    with as_it_was(model), pytest.raises(BlockModeError, match="its attention cannot be exchanged"):
        switch_on(model, list(model.transformer.h))


def test_after_statistics(own):
    with as_it_was(own):
        meters = [Meter(own, Stats()), Meter(own, Stats())]
        own(IDS)
        meters[0].remove()
        own(IDS)
        meters[1].remove()
        assert [meter._stats.prefill_tokens for meter in meters] == [20, 40]


def test_neither_a_closed_cache_nor_a_meter_keeps_a_model_alive(tmp_path):
    model = make_model("llama")
    meter = Meter(model, Stats())
    cache = disk_cache(model, cache_dir=tmp_path)
    model(IDS, past_key_values=cache)
    cache.close()
    gone = weakref.ref(model), weakref.ref(model.model.layers[0])
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert cache.state().mode == "block"
    meter.remove()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("llama"), longer("llama"))


@pytest.fixture
def streamed(checkpoint):
    o = load(checkpoint, logging=True)
    o.offload_layers_to_cpu(3)
    return o


def size(o):
    return o.model.generation_config.prefill_chunk_size


@pytest.mark.parametrize("mode", ["block", "tensor"])
def test_the_size_of_prompts_is_set_while_a_cache_is_open(streamed, mode, tmp_path):
    with as_it_was(streamed.model):
        first = streamed.DiskCache(tmp_path, mode=mode)
        second = streamed.DiskCache(tmp_path, mode=mode)
        fork = first.fork()
        first.close()
        second.close()
        assert isinstance(size(streamed), int)
        fork.close()
        dropped = streamed.DiskCache(tmp_path, mode=mode)
        assert isinstance(size(streamed), int)
        del dropped
        gc.collect()
        assert size(streamed) is None


def test_a_size_that_the_user_has_set_stays(streamed, tmp_path):
    streamed.model.generation_config.prefill_chunk_size = 5
    with streamed.DiskCache(tmp_path):
        assert size(streamed) == 5
    assert size(streamed) == 5
    streamed.model.generation_config.prefill_chunk_size = None
    with streamed.DiskCache(tmp_path):
        streamed.model.generation_config.prefill_chunk_size = 7
        with streamed.DiskCache(tmp_path):
            assert size(streamed) == 7
    assert size(streamed) == 7


def test_a_model_saved_after_a_cache_does_not_have_its_size(streamed, tmp_path):
    with streamed.DiskCache(tmp_path / "kv") as cache:
        streamed.model.generate(IDS, past_key_values=cache, max_new_tokens=3)
    streamed.offload_layers_to_cpu(99)
    streamed.model.save_pretrained(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").prefill_chunk_size is None
    assert stock(tmp_path / "saved").generation_config.to_dict() == streamed.model.generation_config.to_dict()


def test_everything_at_once_is_undone_in_any_order(streamed, tmp_path):
    """Weights, statistics and two caches on one model; its layers are then without weights, as the streamer says."""
    expected = streamed.model(IDS).logits
    first, second = streamed.DiskCache(tmp_path), streamed.DiskCache(tmp_path)
    streamed.model(IDS, past_key_values=first)
    streamed._meter.remove()
    first.close()
    assert_close(streamed.model(IDS, past_key_values=second).logits, expected)
    streamed._streamer.remove()
    second.close()
    model = streamed.model
    assert model.config._attn_implementation != attention.NAME
    assert size(streamed) is None
    assert all("forward" not in vars(module) for module in model.modules())
    for module in model.modules():
        assert not any(value for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict))


def test_a_stock_cache_goes_through_wrapped_layers_as_before(own, tmp_path):
    ids = tokens(2, 9)
    with cache_for(own, tmp_path), cache_for(own, tmp_path):
        ours = own(ids, past_key_values=stock_cache(own)).logits
    assert_close(ours, own(ids, past_key_values=stock_cache(own)).logits)
