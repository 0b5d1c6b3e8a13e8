"""`resident`: every extent in memory, no disk. The baseline that the other strategies are compared with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ollm.plugin import Extent, KVBlock, KVStore, LayerLayout, StoreStats, unpack


class ResidentStore(KVStore):
    """Keeps each extent as one uint8 tensor on the device that it came from: keys, then values."""

    in_memory = True

    def __init__(self) -> None:
        self._extents: dict[int, tuple[Extent, ...]] = {}
        self._layouts: dict[int, LayerLayout] = {}
        self._raw: dict[Extent, Tensor] = {}
        # an extent that took the place of a dropped one must not equal it, for readers may still hold the old one
        self._serial = itertools.count()

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        layout = LayerLayout.of(keys, values)
        before = self.extents(layer)
        raw = torch.cat([tensor.detach().reshape(-1).view(torch.uint8) for tensor in (keys, values)])
        start = before[-1].stop if before else 0
        extent = Extent(layer, start, keys.shape[2], keys.shape[0], raw.numel(), offset=next(self._serial))
        self._raw[extent] = raw
        self._layouts[layer] = layout
        self._extents[layer] = (*before, extent)

    def extents(self, layer: int) -> tuple[Extent, ...]:
        return self._extents.get(layer, ())

    def read(self, extent: Extent) -> Tensor:
        return self._raw[extent]

    def decode(self, extent: Extent, raw: Tensor, out: KVBlock | None) -> KVBlock:
        return unpack(self._layouts[extent.layer], extent, raw)

    def truncate(self, layer: int, length: int) -> None:
        self._extents[layer] = tuple(extent for extent in self.extents(layer) if extent.stop <= length)

    def release(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            del self._raw[extent]

    def close(self) -> None:
        self._raw.clear()

    def stats(self) -> StoreStats:
        return StoreStats(memory_bytes=sum(raw.numel() for raw in self._raw.values()))
