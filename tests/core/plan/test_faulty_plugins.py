"""What a plugin answers is checked, and what it raises names it: nobody has to guess whose fault it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ollm.contracts.spill import KVGeometry, LayerGeometry, MemorySnapshot
from ollm.errors import ConfigurationError, PluginError
from ollm.models.adapters import find_adapter
from ollm.plan import CacheRequest, ModelFacts, plan_cache
from ollm.plan.placement import plan_placement
from ollm.registry import registry

FREE = MemorySnapshot(device_type="cpu", host_total=2**33, host_free=2**32, device_total=2**33, device_free=2**32)
LAYER = LayerGeometry(layer=0, kv_heads=2, key_size=8, value_size=8, itemsize=4)
MODEL = ModelFacts(
    name="M", dtype="float32", device="cpu", geometry=KVGeometry((LAYER,)), activation_bytes=1000, prompt_bytes=100
)
PLUGIN = """
from ollm.plugin import ConfigurationError, ModelAdapter, OffloadPlacement, SpillPolicy


class Policy(SpillPolicy):
    def plan(self, geometry, memory, budget):
        PLAN


class Placement(OffloadPlacement):
    def place(self, layer_bytes, *, count, budget):
        PLACE


class Adapter(ModelAdapter):
    def matches(self, config):
        MATCHES

    def parts(self, model):
        raise NotImplementedError


def make(made):
    BUILD
    return made


@hookimpl
def ollm_spill_policies():
    return [Strategy(name="acme", summary="s", build=lambda context: make(Policy()))]


@hookimpl
def ollm_offload_placements():
    return [Strategy(name="acme", summary="s", build=lambda context: make(Placement()))]


@hookimpl
def ollm_model_adapters():
    return [Strategy(name="acme", summary="s", build=lambda context: make(Adapter()))]
"""
FAIL = "raise ValueError('dear me')"


@pytest.fixture
def install(installer):
    def install(**code):
        text = PLUGIN
        for name in ("plan", "place", "matches", "build"):
            text = text.replace(name.upper(), code.get(name, "pass"))
        installer.install("acme-kv", text)
        registry.cache_clear()

    yield install
    installer.remove()
    installer.paths.clear()
    registry.cache_clear()


def spill(budget=None):
    request = CacheRequest.from_arguments(cache_dir="/kv", spill_policy="acme", ram_budget=budget)
    return plan_cache(request, MODEL, FREE)


def place():
    return plan_placement("cpu", 2, "acme", [10, 10, 10]).layer_indices


def adapt():
    return find_adapter(SimpleNamespace(model_type="llama"))


KINDS = [("spill policy", spill), ("offload placement", place), ("model adapter", adapt)]
BLAMED = r"failed with ValueError: dear me\. Tell who made acme-kv, or switch it off with OLLM_DISABLE_PLUGINS"


@pytest.mark.parametrize(("kind", "use"), KINDS)
def test_a_build_that_fails_names_the_plugin(install, kind, use):
    install(build=FAIL)
    with pytest.raises(PluginError, match=rf"{kind} 'acme': build\(\) {BLAMED}") as caught:
        use()
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(("kind", "use", "call"), [(*KINDS[0], "plan"), (*KINDS[1], "place"), (*KINDS[2], "matches")])
def test_a_call_that_fails_names_the_plugin(install, kind, use, call):
    install(**{call: FAIL})
    with pytest.raises(PluginError, match=rf"{kind} 'acme': {call}\(\) {BLAMED}"):
        use()


@pytest.mark.parametrize("error", [ConfigurationError, MemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_the_plugin_stays_what_it_is(install, error):
    install(plan=f"raise {error.__name__}('no')")
    with pytest.raises(error, match=r"^no$"):
        spill()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("None", r"place\(\) failed with TypeError: 'NoneType' object is not iterable"),
        ("7", r"place\(\) failed with TypeError: 'int' object is not iterable"),
        ("[True]", r"chose \(True,\): it must be indices, ascending, for 2 of 3 layers"),
        ("(0.0, 1)", r"chose \(0\.0, 1\): it must be indices"),
        ("([0],)", r"chose \(\[0\],\): it must be indices"),
        ("'01'", r"chose \('0', '1'\): it must be indices"),
        ("(1, 0)", r"chose \(1, 0\): it must be indices"),
        ("(0, 0)", r"chose \(0, 0\): it must be indices"),
        ("(0, 3)", r"chose \(0, 3\): it must be indices"),
        ("(-1, 0)", r"chose \(-1, 0\): it must be indices"),
        ("(0, 1, 2)", r"chose \(0, 1, 2\): it must be indices"),
    ],
)
def test_a_placement_that_is_none_is_refused(install, answer, message):
    install(place=f"return {answer}")
    with pytest.raises(PluginError, match=f"^offload placement 'acme'.*{message}"):
        place()


@pytest.mark.parametrize("answer", ["(0, 2)", "[0, 2]", "iter((0, 2))"])
def test_a_placement_may_answer_with_any_sequence(install, answer):
    install(place=f"return {answer}")
    assert place() == (0, 2)


@pytest.mark.parametrize("answer", ["None", "(64, 2**20)"])
def test_a_spill_plan_that_is_none_is_refused(install, answer):
    install(plan=f"return {answer}")
    with pytest.raises(PluginError, match=r"^spill policy 'acme': plan\(\) answered .*: it must be a SpillPlan"):
        spill()


def test_a_spill_plan_beyond_the_budget_is_refused(install):
    install(plan="from ollm.plugin import SpillPlan; return SpillPlan(flush_tokens=1, flush_bytes=1, resident_bytes=9)")
    assert spill().spill.resident_bytes == 9
    assert spill(budget=9).spill.resident_bytes == 9
    with pytest.raises(PluginError, match=r"within the budget of 8 bytes"):
        spill(budget=8)
