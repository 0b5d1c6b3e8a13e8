"""`resident`: every block in memory, no disk. The baseline that the other strategies are compared with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from ollm.plugin import BlockKey, Extent, KVBlock, KVStore, Location, StoreStats, pack, unpack


class ResidentStore(KVStore):
    """Keeps the bytes of each block as one tensor on the device that it came from."""

    in_memory = True

    def __init__(self) -> None:
        self._raw: dict[Location, Tensor] = {}
        self._numbers = itertools.count()

    def write(self, block: KVBlock, key: BlockKey) -> Location:
        raw = pack(block)
        location = Location(raw.numel(), offset=next(self._numbers))
        self._raw[location] = raw
        return location

    def read(self, extent: Extent) -> Tensor:
        return self._raw[extent.location]

    def decode(self, extent: Extent, raw: Tensor, out: KVBlock | None) -> KVBlock:
        return unpack(extent, raw)

    def free(self, locations: Sequence[Location]) -> None:
        for location in locations:
            self._raw.pop(location, None)

    def close(self) -> None:
        self._raw.clear()

    def stats(self) -> StoreStats:
        return StoreStats(memory_bytes=sum(raw.numel() for raw in self._raw.values()))
