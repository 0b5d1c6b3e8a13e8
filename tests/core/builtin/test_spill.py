"""The default policy: within the budget, and less where less is free."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ollm.builtin.spill import AutoSpill
from ollm.contracts.spill import KVGeometry, MemorySnapshot, SpillPlan
from ollm.testing import SpillPolicyTests

GIB = 2**30


def memory(kind="cpu", host=16 * GIB, device=16 * GIB):
    return MemorySnapshot(
        device_type=kind, host_total=64 * GIB, host_free=host, device_total=80 * GIB, device_free=device
    )


class TestAuto(SpillPolicyTests):
    def plan(self, geometry, memory, budget):
        return AutoSpill().plan(geometry, memory, budget)


@given(
    kind=st.sampled_from(["cpu", "cuda"]),
    host=st.integers(0, 2**40),
    device=st.integers(0, 2**40),
    budget=st.none() | st.integers(0, 2**45),
)
def test_what_stays_is_within_the_budget_or_half_of_what_is_free(kind, host, device, budget):
    plan = AutoSpill().plan(KVGeometry(()), memory(kind, host, device), budget)
    if budget is None:
        assert plan.resident_bytes <= host // 2
        assert plan.resident_bytes_device <= (device // 2 if kind == "cuda" else 0)
    else:
        assert plan.resident_bytes + plan.resident_bytes_device == budget
    assert 2 <= plan.read_buffers <= 7
    assert plan.read_buffers == 2 or plan.read_buffers * 8 * 2**20 <= host // 16


def test_the_sizes_that_it_is_known_for():
    plan = AutoSpill().plan(KVGeometry(()), memory(), None)
    assert (plan.flush_tokens, plan.flush_bytes, plan.read_buffers) == (128, 8 * 2**20, 7)
    plan = AutoSpill().plan(KVGeometry(()), memory("cuda"), 20 * GIB)
    assert (plan.flush_tokens, plan.flush_bytes) == (64, 4 * 2**20)
    assert (plan.resident_bytes_device, plan.resident_bytes) == (8 * GIB, 12 * GIB)


@pytest.mark.parametrize("hot", [64, 65, 1000])
def test_a_plan_by_which_every_token_would_be_flushed_alone_is_refused(hot):
    assert SpillPlan(flush_tokens=64, flush_bytes=2**20, hot_tokens=63).hot_tokens == 63
    with pytest.raises(ValueError, match=f"hot_tokens={hot}: must be less than flush_tokens=64"):
        SpillPlan(flush_tokens=64, flush_bytes=2**20, hot_tokens=hot)
    with pytest.raises(ValueError, match="must be less than flush_tokens=64"):
        SpillPlan.for_memory(memory(), 0, flush_tokens=64, flush_bytes=2**20, hot_tokens=hot)


COUNTS = {
    "flush_tokens": 1, "flush_bytes": 1, "hot_tokens": 0, "resident_bytes": 0, "resident_bytes_device": 0,
    "read_buffers": 2,
}  # fmt: skip


@pytest.mark.parametrize(("name", "least"), COUNTS.items())
def test_a_plan_takes_whole_numbers_that_are_not_too_small(name, least):
    usual = {"flush_tokens": 16, "flush_bytes": 2**20}
    assert getattr(SpillPlan(**{**usual, name: least}), name) == least
    for wrong in (16.0, 2.5, True, "16", None):
        with pytest.raises(TypeError, match=f"{name}=.*: must be a whole number"):
            SpillPlan(**{**usual, name: wrong})
    with pytest.raises(ValueError, match=name):
        SpillPlan(**{**usual, name: least - 1})
