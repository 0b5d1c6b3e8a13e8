"""The spill contract: when the tail is flushed and how much stays in memory. Pure functions, no I/O."""

from __future__ import annotations

from abc import ABC, abstractmethod

import attrs

from ollm.contracts.blocks import EXTENT_BYTES

_READS = 7


@attrs.frozen
class LayerGeometry:
    """Shape of one stored layer's keys and values, as expected from the model's config."""

    layer: int
    kv_heads: int
    key_size: int
    value_size: int
    itemsize: int
    """Bytes per element."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values together, per token and row."""
        return self.kv_heads * (self.key_size + self.value_size) * self.itemsize


@attrs.frozen
class KVGeometry:
    """The layers of a model whose keys and values go to a store (full-attention layers only)."""

    layers: tuple[LayerGeometry, ...]

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token and row over all stored layers."""
        return sum(layer.bytes_per_token for layer in self.layers)


@attrs.frozen(kw_only=True)
class MemorySnapshot:
    """Memory as measured when the cache is made. Bytes; cgroup limits are taken into account."""

    device_type: str
    """`cpu` or `cuda`."""
    host_total: int
    host_free: int
    """What other caches of this process have claimed is not free."""
    device_total: int
    """Equals the host's on a CPU."""
    device_free: int


@attrs.frozen(kw_only=True)
class SpillPlan:
    """What a spill policy decides, applied by core to every layer alike."""

    flush_tokens: int = attrs.field(validator=attrs.validators.ge(1))
    """The tail is flushed when it holds this many tokens …"""
    flush_bytes: int = attrs.field(validator=attrs.validators.ge(1))
    """… or this many bytes, whichever comes first. Per layer."""
    hot_tokens: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    """The most recent tokens that a flush leaves in the tail."""
    resident_bytes: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    """Host bytes for extents that stay in memory besides being stored, over all layers. Core takes less where less is
    free by then."""
    resident_bytes_device: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    """The same on the accelerator; on a CPU it means nothing."""
    read_buffers: int = attrs.field(default=_READS, validator=attrs.validators.ge(2))
    """How many reads of up to 8 MiB may be in flight, each with a buffer on the host."""

    @classmethod
    def for_memory(
        cls,
        memory: MemorySnapshot,
        budget: int | None,
        *,
        flush_tokens: int,
        flush_bytes: int,
        hot_tokens: int = 0,
    ) -> SpillPlan:
        """A plan that keeps extents resident within the budget, on the accelerator first.

        Without a budget, half of the free memory holds them: the rest is left to activations, to the weights of other
        models and to other programs. Seven reads are in flight, fewer where their buffers would take more than a
        sixteenth of the free memory.
        """
        host, device = memory.host_free // 2, 0 if memory.device_type == "cpu" else memory.device_free // 2
        if budget is not None:
            device = min(budget, device)
            host = budget - device
        return cls(
            flush_tokens=flush_tokens,
            flush_bytes=flush_bytes,
            hot_tokens=hot_tokens,
            resident_bytes=host,
            resident_bytes_device=device,
            read_buffers=max(2, min(_READS, memory.host_free // 16 // EXTENT_BYTES)),
        )


class SpillPolicy(ABC):
    """Decides how much of a cache is in memory. A pure function of what was measured: no I/O, no state."""

    @abstractmethod
    def plan(self, geometry: KVGeometry, memory: MemorySnapshot, budget: int | None) -> SpillPlan:
        """Plan for a cache of this geometry.

        Args:
            geometry: the stored layers; may be empty.
            memory: what is free now.
            budget: the caller's `ram_budget` in bytes for resident extents on host and accelerator together, never to
                be exceeded; `None` lets the policy choose.
        """
