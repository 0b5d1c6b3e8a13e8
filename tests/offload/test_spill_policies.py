"""The two policies as pure functions, and as `ollm plugins` finds them."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from ollm.plugin import BuildContext, KVGeometry, LayerGeometry, MemorySnapshot, NoOptions, SpillPolicy
from ollm.registry import Kind, registry
from ollm.testing import SpillPolicyTests

geometries = st.integers(0, 80).map(
    lambda layers: KVGeometry(tuple(LayerGeometry(index, 8, 128, 128, 2) for index in range(layers)))
)
snapshots = st.builds(
    lambda kind, total, free: MemorySnapshot(
        device_type=kind, host_total=total, host_free=total // free, device_total=total, device_free=total // free
    ),
    st.sampled_from(["cpu", "cuda"]), st.integers(2**28, 2**40), st.integers(1, 100),
)  # fmt: skip


def build(name) -> SpillPolicy:
    found = registry()
    return found.build(found.get(Kind.SPILL_POLICY, name), BuildContext(NoOptions()), SpillPolicy)


class TestWriteThrough(SpillPolicyTests):
    def plan(self, geometry, memory, budget):
        return build("write-through").plan(geometry, memory, budget)


class TestFixedBudget(SpillPolicyTests):
    def plan(self, geometry, memory, budget):
        return build("fixed-budget").plan(geometry, memory, budget)


@given(geometry=geometries, one=snapshots, other=snapshots, budget=st.none() | st.integers(0, 2**45))
def test_a_fixed_budget_is_the_same_on_every_machine(geometry, one, other, budget):
    policy = build("fixed-budget")
    plan = policy.plan(geometry, one, budget)
    assert plan == policy.plan(geometry, other, budget)
    assert plan.resident_bytes == (256 * 2**20 if budget is None else budget)


@given(geometry=geometries, memory=snapshots)
def test_write_through_leaves_little_in_memory_only(geometry, memory):
    plan = build("write-through").plan(geometry, memory, None)
    assert (plan.flush_tokens, plan.hot_tokens, plan.resident_bytes) == (16, 0, 0)
