"""The spill contract: when the tail is flushed and how much stays in memory. Pure functions, no I/O."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import attrs

from ollm.contracts.blocks import EXTENT_BYTES

_READS = 7


@attrs.frozen
class LayerGeometry:
    """Shape of one stored layer's keys and values, as expected from the model's config.

    Attributes:
        layer: its number in the model.
        kv_heads: heads of keys and values.
        key_size: elements of a key.
        value_size: elements of a value.
        itemsize: bytes per element.
    """

    layer: int
    kv_heads: int
    key_size: int
    value_size: int
    itemsize: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values together, per token and row."""
        return self.kv_heads * (self.key_size + self.value_size) * self.itemsize


@attrs.frozen
class KVGeometry:
    """The layers of a model whose keys and values go to a store (full-attention layers only).

    Attributes:
        layers: those whose keys and values are stored, in order.
    """

    layers: tuple[LayerGeometry, ...]

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token and row over all stored layers."""
        return sum(layer.bytes_per_token for layer in self.layers)


@attrs.frozen(kw_only=True)
class MemorySnapshot:
    """Memory as measured when the cache is made. Bytes; cgroup limits are taken into account.

    Attributes:
        device_type: `cpu` or `cuda`.
        host_total: all that there is.
        host_free: what other caches of this process have claimed is not free.
        device_total: equals the host's on a CPU.
        device_free: what is free there; on a CPU, the host's.
    """

    device_type: str
    host_total: int
    host_free: int
    device_total: int
    device_free: int


def _is_whole(_: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{attribute.name}={value!r}: must be a whole number")


def _at_least(least: int) -> Any:
    return attrs.validators.and_(_is_whole, attrs.validators.ge(least))


def _is_less_than_a_tail(plan: SpillPlan, attribute: Any, value: int) -> None:
    if value >= plan.flush_tokens:
        raise ValueError(
            f"hot_tokens={value}: must be less than flush_tokens={plan.flush_tokens}. A flush writes what is in the "
            "tail but for these; else each token would be flushed alone, into a record of its own."
        )


@attrs.frozen(kw_only=True)
class SpillPlan:
    """What a spill policy decides, applied by core to every layer alike.

    Attributes:
        flush_tokens: the tail is flushed when it holds this many tokens …
        flush_bytes: … or this many bytes, whichever comes first. Per layer.
        hot_tokens: the most recent tokens that a flush leaves in the tail; fewer than `flush_tokens`. What is between
            the two is what a flush writes, and so the size of an extent, unless the store has a size of its own.
        resident_bytes: host bytes for extents that stay in memory besides being stored, over all layers. Core takes
            less where less is free by then.
        resident_bytes_device: the same on the accelerator; on a CPU it means nothing.
        read_buffers: how many reads of up to 8 MiB may be in flight, each with a buffer on the host. At least 2: while
            attention computes with one, the next is filled.

    Raises:
        ValueError, TypeError: from the constructor, for what is no whole number, negative or too small, and for
            `hot_tokens` that are not fewer than `flush_tokens`.
    """

    flush_tokens: int = attrs.field(validator=_at_least(1))
    flush_bytes: int = attrs.field(validator=_at_least(1))
    hot_tokens: int = attrs.field(default=0, validator=[_at_least(0), _is_less_than_a_tail])
    resident_bytes: int = attrs.field(default=0, validator=_at_least(0))
    resident_bytes_device: int = attrs.field(default=0, validator=_at_least(0))
    read_buffers: int = attrs.field(default=_READS, validator=_at_least(2))

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
