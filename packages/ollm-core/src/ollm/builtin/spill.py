"""`auto`: the default spill policy, a pure function of the device and of the memory that is free."""

from __future__ import annotations

from ollm.plugin import KVGeometry, MemorySnapshot, SpillPlan, SpillPolicy

_MIB = 2**20


_READ_BYTES = 4 * _MIB


class AutoSpill(SpillPolicy):
    """Flush at 128 tokens or 8 MiB per layer on a CPU, 64 tokens or 4 MiB elsewhere, where memory is dearer.

    Without a budget, half of the free memory holds resident extents, on the accelerator first: the rest is left to
    activations, to the weights of other models and to other programs. Twelve reads are in flight, fewer where their
    buffers would take more than a sixteenth of the free memory.
    """

    def plan(self, geometry: KVGeometry, memory: MemorySnapshot, budget: int | None) -> SpillPlan:
        on_cpu = memory.device_type == "cpu"
        host, device = memory.host_free // 2, 0 if on_cpu else memory.device_free // 2
        if budget is not None:
            device = min(budget, device)
            host = budget - device
        return SpillPlan(
            flush_tokens=128 if on_cpu else 64,
            flush_bytes=(8 if on_cpu else 4) * _MIB,
            resident_bytes=host,
            resident_bytes_device=device,
            read_buffers=max(2, min(12, memory.host_free // 16 // _READ_BYTES)),
        )
