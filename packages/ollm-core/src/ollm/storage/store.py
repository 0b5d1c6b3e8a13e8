"""`SegmentedStore`: what every store on `SegmentedStorage` has in common. A subclass says where records go.

Keeps the lists of extents and the layouts of layers. Knows nothing of bytes on disk, which are the storage's, nor of
when something is read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ollm.contracts.kv import Extent, KVBlock, KVStore
from ollm.storage.segments import SegmentedStorage
from ollm.storage.tensors import LayerLayout, unpack


class SegmentedStore(KVStore):
    """A store that keeps keys and values as they are, or as its `encode` and `decode` make them."""

    storage: SegmentedStorage

    def __init__(self, storage: SegmentedStorage) -> None:
        self.storage = storage
        self._extents: dict[int, tuple[Extent, ...]] = {}
        self._layouts: dict[int, LayerLayout] = {}

    @abstractmethod
    def place(self, layer: int, layout: LayerLayout, rows: int) -> tuple[int, int | None]:
        """Where the next record of a layer goes: a segment's number, and the byte in it where the record begins, or
        `None` for behind all others. Changes nothing: `placed` is called once the record is there.

        That byte is a multiple of 4096 and may lie behind the end of the file. A record takes
        `storage.record_bytes(payload_bytes)` bytes; its payload, which `Extent.offset` names, begins 4096 bytes later.
        How many tokens it will hold is not known here: a store that reckons with places sets `extent_tokens`, and a
        record then takes at most `storage.record_bytes(layout.nbytes(rows, extent_tokens))`.
        """

    def placed(self, extent: Extent) -> None:
        """A record went where `place` said. `layout` knows its layer already, `extents` does not list it yet. Default:
        nothing."""

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Sequence[Tensor], str]:
        """The tensors that make the payload of a record, and its dtype code. Default: both as they are."""
        return [keys, values], LayerLayout.of(keys, values).dtype_name

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        layout = LayerLayout.of(keys, values)
        before = self.extents(layer)
        payload, dtype = self.encode(keys, values)
        segment, at = self.place(layer, layout, keys.shape[0])
        extent = self.storage.write(
            payload,
            segment=segment,
            layer=layer,
            start=before[-1].stop if before else 0,
            tokens=keys.shape[2],
            rows=keys.shape[0],
            dtype=dtype,
            at=at,
        )
        self._layouts[layer] = layout
        self.placed(extent)
        self._extents[layer] = (*before, extent)

    def layout(self, layer: int) -> LayerLayout:
        """What the last keys and values of a layer had."""
        return self._layouts[layer]

    def extents(self, layer: int) -> tuple[Extent, ...]:
        return self._extents.get(layer, ())

    def decode(self, extent: Extent, raw: Tensor, out: KVBlock | None) -> KVBlock:
        return unpack(self._layouts[extent.layer], extent, raw)

    def truncate(self, layer: int, length: int) -> None:
        self._extents[layer] = tuple(extent for extent in self.extents(layer) if extent.stop <= length)

    def evict(self, layer: int, extents: Sequence[Extent]) -> None:
        gone = set(extents)
        self._extents[layer] = tuple(extent for extent in self.extents(layer) if extent not in gone)

    def release(self, extents: Sequence[Extent]) -> None:
        """Give their bytes back to the storage. Whoever overrides this calls it, too. Called, as every method but
        `read`, on the thread that appends."""
        self.storage.release(extents)
