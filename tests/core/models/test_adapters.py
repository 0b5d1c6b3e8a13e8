"""Which adapter a model gets: a third party's before ollm's own, `generic` last, and what `generic` cannot tell."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn
from transformers import LlamaConfig, Qwen3Config

from ollm.builtin.adapters import GenericAdapter, LlamaAdapter
from ollm.contracts.strategy import BuildContext
from ollm.errors import OllmError, PluginError
from ollm.models.adapters import find_adapter
from ollm.registry import Kind, registry
from ollm.testing import ModelAdapterTests

ADAPTER = """
from ollm.plugin import ModelAdapter


class Adapter(ModelAdapter):
    def matches(self, config):
        return config.model_type == "llama"

    def parts(self, model):
        raise NotImplementedError


@hookimpl
def ollm_model_adapters():
    return [Strategy(name=NAME, summary="s", build=lambda context: Adapter())]
"""


def adapter_named(name):
    return ADAPTER.replace("NAME", repr(name))


@pytest.fixture
def install(installer):
    def install(distribution, name):
        installer.install(distribution, adapter_named(name), point=distribution)
        registry.cache_clear()

    registry.cache_clear()
    yield install
    installer.remove()
    installer.paths.clear()
    registry.cache_clear()


class TestLlama(ModelAdapterTests):
    def adapter(self):
        return LlamaAdapter()

    def config(self):
        return LlamaConfig(hidden_size=64, num_hidden_layers=3)


class TestGeneric(ModelAdapterTests):
    def adapter(self):
        return GenericAdapter()

    def config(self):
        return Qwen3Config(hidden_size=64, num_hidden_layers=3)

    def test_it_claims_nothing_else(self):
        """It takes what nobody else does."""
        assert self.adapter().matches(SimpleNamespace(model_type="anything"))


class Model(nn.Module):
    """A model with so many lists of two modules each."""

    def __init__(self, lists):
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(num_hidden_layers=2))
        for index in range(lists):
            self.add_module(f"list{index}", nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)]))


def generic():
    offer = registry().get(Kind.MODEL_ADAPTER, "generic")
    return registry().build(offer, BuildContext(None), object)


@pytest.mark.parametrize(("model_type", "expected"), [("llama", "llama"), ("qwen3", "generic")])
def test_ollms_own(install, model_type, expected):
    assert find_adapter(SimpleNamespace(model_type=model_type))[0] == expected


def test_a_third_partys_goes_first_where_it_matches(install):
    install("acme-kv", "acme")
    assert find_adapter(SimpleNamespace(model_type="llama"))[0] == "acme"
    assert find_adapter(SimpleNamespace(model_type="qwen3"))[0] == "generic"


def test_two_third_parties_that_claim_one_model_are_an_error(install):
    install("acme-kv", "acme")
    install("beta-kv", "beta")
    with pytest.raises(PluginError, match=r"claim models of type 'llama': acme, beta.*OLLM_DISABLE_PLUGINS"):
        find_adapter(SimpleNamespace(model_type="llama"))


def test_generic_finds_the_only_list_that_fits(install):
    model = Model(1)
    parts = generic().parts(model)
    assert parts.layers == tuple(model.list0)
    assert parts.key_prefix == "list0."


@pytest.mark.parametrize(("lists", "found"), [(0, "no list of modules would fit"), (2, "list0, list1 would fit")])
def test_generic_does_not_guess(install, lists, found):
    with pytest.raises(OllmError, match=rf"{found}.*docs/how-to/write-a-plugin\.md"):
        generic().parts(Model(lists))
