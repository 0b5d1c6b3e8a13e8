"""`hot-tail`: a spill policy that keeps the newest tokens in memory when it flushes. Pure arithmetic."""

from __future__ import annotations

from ollm.plugin import KVGeometry, MemorySnapshot, SpillPlan, SpillPolicy

_MIB = 2**20


class HotTail(SpillPolicy):
    """Flush at 256 tokens or 8 MiB per layer on a CPU and leave 128 of them; half of that elsewhere. Flushing half of
    the tail makes extents as large as those of `auto`, while what was just generated stays at hand."""

    def plan(self, geometry: KVGeometry, memory: MemorySnapshot, budget: int | None) -> SpillPlan:
        share = 1 if memory.device_type == "cpu" else 2
        return SpillPlan.for_memory(
            memory, budget, flush_tokens=256 // share, flush_bytes=8 * _MIB // share, hot_tokens=128 // share
        )
