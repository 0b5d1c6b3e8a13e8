"""`auto`: the default spill policy, a pure function of the device and of the memory that is free."""

from __future__ import annotations

from ollm.plugin import KVGeometry, MemorySnapshot, SpillPlan, SpillPolicy

_MIB = 2**20


class AutoSpill(SpillPolicy):
    """Flush at 128 tokens or 8 MiB per layer on a CPU, 64 tokens or 4 MiB elsewhere, where memory is dearer. What stays
    resident is `SpillPlan.for_memory`'s."""

    def plan(self, geometry: KVGeometry, memory: MemorySnapshot, budget: int | None) -> SpillPlan:
        on_cpu = memory.device_type == "cpu"
        return SpillPlan.for_memory(
            memory, budget, flush_tokens=128 if on_cpu else 64, flush_bytes=(8 if on_cpu else 4) * _MIB
        )
