"""The default policy: within the budget, and less where less is free."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from ollm.builtin.spill import AutoSpill
from ollm.contracts.spill import KVGeometry, MemorySnapshot
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
