"""Spill policies beside core's `auto`. Pure arithmetic on what was measured."""

from __future__ import annotations

from ollm.plugin import KVGeometry, MemorySnapshot, SpillPlan, SpillPolicy

_MIB = 2**20


class WriteThrough(SpillPolicy):
    """Tokens go to the store 16 at a time, so that next to nothing is in memory only. Nothing else stays in memory
    unless the caller's budget says so."""

    def plan(self, geometry: KVGeometry, memory: MemorySnapshot, budget: int | None) -> SpillPlan:
        return SpillPlan(flush_tokens=16, flush_bytes=_MIB, resident_bytes=budget or 0)


class FixedBudget(SpillPolicy):
    """The caller's budget, or 256 MiB, and fixed sizes for the rest: the same on every machine, whatever is free."""

    def plan(self, geometry: KVGeometry, memory: MemorySnapshot, budget: int | None) -> SpillPlan:
        return SpillPlan(
            flush_tokens=128, flush_bytes=8 * _MIB, resident_bytes=256 * _MIB if budget is None else budget
        )
