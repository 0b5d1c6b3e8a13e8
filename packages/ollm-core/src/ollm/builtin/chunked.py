"""`chunked`: one append-only file per layer. Chunks have the size of what was flushed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ollm.plugin import Extent, KVBlock, KVStore, LayerLayout, SegmentedStorage, unpack


class ChunkedStore(KVStore):
    """Segment number = layer number; the chunk list of a layer is its extents."""

    storage: SegmentedStorage

    def __init__(self, storage: SegmentedStorage) -> None:
        self.storage = storage
        self._extents: dict[int, tuple[Extent, ...]] = {}
        self._layouts: dict[int, LayerLayout] = {}

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        layout = LayerLayout.of(keys, values)
        before = self.extents(layer)
        extent = self.storage.write(
            [keys, values],
            segment=layer,
            layer=layer,
            start=before[-1].stop if before else 0,
            tokens=keys.shape[2],
            rows=keys.shape[0],
            dtype=layout.dtype_name,
        )
        self._layouts[layer] = layout
        self._extents[layer] = (*before, extent)

    def extents(self, layer: int) -> tuple[Extent, ...]:
        return self._extents.get(layer, ())

    def decode(self, extent: Extent, raw: Tensor, out: KVBlock | None) -> KVBlock:
        return unpack(self._layouts[extent.layer], extent, raw)

    def truncate(self, layer: int, length: int) -> None:
        self._extents[layer] = tuple(extent for extent in self.extents(layer) if extent.stop <= length)

    def release(self, extents: Sequence[Extent]) -> None:
        self.storage.release(extents)
