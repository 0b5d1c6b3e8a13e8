"""Policies, placements and adapters with one bug each, and the test of the kit that is named for it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from transformers import LlamaConfig

from core.testing.planted.catching import Table
from ollm.plugin import ModelAdapter, ModelParts, SpillPlan
from ollm.testing import ModelAdapterTests, OffloadPlacementTests, SpillPolicyTests

CAUGHT = Table()
caught_by = CAUGHT.caught_by


def plan(**more):
    return SpillPlan(flush_tokens=16, flush_bytes=2**20, **more)


class SoundPolicy(SpillPolicyTests):
    def plan(self, geometry, memory, budget):
        return plan(resident_bytes=0 if budget is None else budget)


class SoundPlacement(OffloadPlacementTests):
    def place(self, layer_bytes, *, count, budget):
        chosen, used = [], 0
        for index, size in enumerate(layer_bytes):
            if count is not None and len(chosen) == count:
                break
            if budget is not None and used + size > budget:
                break
            chosen.append(index)
            used += size
        return tuple(chosen)


class LlamaAdapter(ModelAdapter):
    def matches(self, config):
        return config.model_type == "llama"

    def parts(self, model):
        return ModelParts(layers=tuple(model.get_submodule("model.layers")), key_prefix="model.layers.")


class SoundAdapter(ModelAdapterTests):
    adapter_type = LlamaAdapter

    def adapter(self):
        return self.adapter_type()

    def config(self):
        return LlamaConfig(hidden_size=64, num_hidden_layers=3)


class TestSoundChoices(SoundPolicy, SoundPlacement, SoundAdapter):
    """Passes everything."""

    test_it_depends_on_its_arguments_alone = SoundPolicy.test_it_depends_on_its_arguments_alone


@caught_by("test_the_budget_is_never_exceeded", "assert")
class TestPolicyOverBudget(SoundPolicy):
    def plan(self, geometry, memory, budget):
        return plan(resident_bytes=budget or 0, resident_bytes_device=1)


@caught_by("test_it_always_answers_with_a_plan", "ZeroDivisionError|division")
class TestPolicyWithoutLayers(SoundPolicy):
    def plan(self, geometry, memory, budget):
        return plan(hot_tokens=min(2**30 // geometry.bytes_per_token, 8))


@caught_by("test_without_a_budget_no_more_than_is_free_is_taken", "assert")
class TestPolicyTakesEverything(SoundPolicy):
    def plan(self, geometry, memory, budget):
        return plan(resident_bytes=2**62 if budget is None else budget)


@caught_by("test_it_always_answers_with_a_plan", "hot_tokens=32: must be less than flush_tokens=16")
class TestPolicyThatKeepsMoreThanATail(SoundPolicy):
    def plan(self, geometry, memory, budget):
        return plan(hot_tokens=32 if geometry.layers else 0)


@caught_by("test_it_depends_on_its_arguments_alone", "assert|falsify|Flaky")
class TestPolicyWithMoods(SoundPolicy):
    calls = itertools.count(1)

    def plan(self, geometry, memory, budget):
        return plan(hot_tokens=next(self.calls) % 16)


@caught_by("test_it_depends_on_its_arguments_alone", "a pure function did: open")
class TestPolicyThatReadsFiles(SoundPolicy):
    def plan(self, geometry, memory, budget):
        return plan(hot_tokens=len(Path(__file__).read_text()) // 1000)


@caught_by("test_layers_that_exist_each_once_in_order", "ascending, without repeats")
class TestPlacementRepeats(OffloadPlacementTests):
    def place(self, layer_bytes, *, count, budget):
        return (0, 0) if layer_bytes else ()


@caught_by("test_layers_that_exist_each_once_in_order", "ascending")
class TestPlacementUnsorted(OffloadPlacementTests):
    def place(self, layer_bytes, *, count, budget):
        return tuple(reversed(range(len(layer_bytes))))


@caught_by("test_layers_that_exist_each_once_in_order", "there are . layers")
class TestPlacementOutOfRange(OffloadPlacementTests):
    def place(self, layer_bytes, *, count, budget):
        return (len(layer_bytes),)


@caught_by("test_layers_that_exist_each_once_in_order", "isinstance")
class TestPlacementGivesAList(OffloadPlacementTests):
    def place(self, layer_bytes, *, count, budget):
        return list(range(len(layer_bytes)))


@caught_by("test_never_more_than_were_asked_for", "assert")
class TestPlacementIgnoresTheCount(OffloadPlacementTests):
    def place(self, layer_bytes, *, count, budget):
        return tuple(range(len(layer_bytes)))


@caught_by("test_never_more_bytes_than_the_budget", "assert")
class TestPlacementOverBudget(OffloadPlacementTests):
    def place(self, layer_bytes, *, count, budget):
        return tuple(range(len(layer_bytes)))[:count]


@caught_by("test_it_depends_on_its_arguments_alone", "the sizes are the caller's")
class TestPlacementChangesItsArguments(OffloadPlacementTests):
    def place(self, layer_bytes, *, count, budget):
        if isinstance(layer_bytes, list):
            layer_bytes.append(0)
        return ()


@caught_by("test_it_depends_on_its_arguments_alone", "assert|falsify|Flaky")
class TestPlacementThrowsDice(OffloadPlacementTests):
    def place(self, layer_bytes, *, count, budget):
        return tuple(index for index in range(len(layer_bytes)) if random.random() < 0.5)


@caught_by("test_the_layers_are_those_of_the_model_in_order", "key_prefix and the number")
class TestAdapterInTheWrongOrder(SoundAdapter):
    class adapter_type(LlamaAdapter):
        def parts(self, model):
            return ModelParts(layers=tuple(model.get_submodule("model.layers"))[::-1], key_prefix="model.layers.")


@caught_by("test_the_prefix_is_that_of_the_weights", "weights whose names begin")
class TestAdapterWithTheWrongPrefix(SoundAdapter):
    class adapter_type(LlamaAdapter):
        def parts(self, model):
            return ModelParts(layers=tuple(model.get_submodule("model.layers")), key_prefix="transformer.h.")


@caught_by("test_it_claims_nothing_else", "assert")
class TestAdapterClaimsEverything(SoundAdapter):
    class adapter_type(LlamaAdapter):
        def matches(self, config):
            return True
