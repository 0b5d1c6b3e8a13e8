"""Extents that stay in memory besides being stored.

Decoding reads the same extents in the same order at every step, the worst case of an LRU. So the resident set is
fixed: an extent that found room stays until it is dropped, the rest is read; the hit rate is budget / size.
"""

from __future__ import annotations

from ollm.contracts.kv import Extent, KVBlock

MOST_EXTENT_BYTES = 4 * 2**20
LEAST_EXTENT_BYTES = 2**20
"""Reads of 1 – 4 MiB run at the speed of the disk."""


class Residency:
    """Keeps blocks within a byte budget that is shared evenly between layers."""

    def __init__(self, budget: int, layers: int) -> None:
        self._share = budget // layers if layers else 0
        self._blocks: dict[Extent, KVBlock] = {}
        self._used: dict[int, int] = {}

    @property
    def extent_bytes(self) -> int:
        """The largest extent that core should cut: pieces that fill a layer's share, within what disks like."""
        if self._share < LEAST_EXTENT_BYTES:
            return MOST_EXTENT_BYTES
        return self._share // -(-self._share // MOST_EXTENT_BYTES)

    @property
    def nbytes(self) -> int:
        """Bytes of all resident blocks."""
        return sum(self._used.values())

    def offer(self, extent: Extent, block: KVBlock) -> None:
        """Keep a copy of a block on the host if its layer's share has room."""
        nbytes = block.keys.nbytes + block.values.nbytes
        used = self._used.get(extent.layer, 0)
        if used + nbytes <= self._share:
            keys, values = block.keys.detach().to("cpu", copy=True), block.values.detach().to("cpu", copy=True)
            self._blocks[extent] = KVBlock(keys.contiguous(), values.contiguous())
            self._used[extent.layer] = used + nbytes

    def get(self, extent: Extent) -> KVBlock | None:
        """The block, if it is resident."""
        return self._blocks.get(extent)

    def drop(self, extent: Extent) -> None:
        """Forget a block."""
        block = self._blocks.pop(extent, None)
        if block is not None:
            self._used[extent.layer] -= block.keys.nbytes + block.values.nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self._used.clear()
