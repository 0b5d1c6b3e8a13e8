"""The spill policy `hot-tail`: what it keeps and flushes, and that it stays within any budget."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ollm.plugin import KVGeometry, MemorySnapshot
from ollm.testing import SpillPolicyTests
from ollm_kv_journal.spill import HotTail


def memory(device_type="cpu", free=2**34):
    return MemorySnapshot(
        device_type=device_type, host_total=2**35, host_free=free, device_total=2**35, device_free=free
    )


class TestHotTail(SpillPolicyTests):
    def plan(self, geometry, memory, budget):
        return HotTail().plan(geometry, memory, budget)


@pytest.mark.parametrize(("device_type", "flush", "hot"), [("cpu", 256, 128), ("cuda", 128, 64)])
def test_half_of_the_tail_stays_hot(device_type, flush, hot):
    plan = HotTail().plan(KVGeometry(()), memory(device_type), None)
    assert (plan.flush_tokens, plan.hot_tokens) == (flush, hot)


@given(
    budget=st.one_of(st.none(), st.integers(0, 2**40)),
    free=st.integers(0, 2**40),
    device_type=st.sampled_from(["cpu", "cuda"]),
)
def test_budget_and_memory_are_never_exceeded(budget, free, device_type):
    plan = HotTail().plan(KVGeometry(()), memory(device_type, free), budget)
    resident = plan.resident_bytes + plan.resident_bytes_device
    assert resident == budget if budget is not None else resident <= 2 * free
