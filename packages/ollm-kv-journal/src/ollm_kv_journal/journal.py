"""An append-only journal per layer: frames that describe themselves, and an index of where they are.

The index is what a reader needs to know without reading frames. Its entries are runs of frames that follow each other
in position and place; each flush adds one, and when there are enough, contiguous ones become one. That depends on
nothing but the sequence of flushes. Payloads are never rewritten: the idea is that of a log-structured file system
(Rosenblum and Ousterhout, 1992) without its cleaner. `tiered-write-back` is the same journal behind a hot tail.
"""

from __future__ import annotations

import attrs

from ollm.plugin import Extent, LayerLayout, SegmentedStorage, SegmentedStore, StoreStats


@attrs.frozen
class Entry:
    """One entry of an index: frames one behind the other, with one number of rows."""

    start: int
    """Position of the first token."""
    offset: int
    """Where the payload of the first frame begins."""
    rows: int
    frames: tuple[int, ...]
    """Tokens of each."""

    def extents(self, layer: int, layout: LayerLayout, storage: SegmentedStorage) -> list[Extent]:
        """The extents that the entry stands for."""
        extents, start, offset = [], self.start, self.offset
        for tokens in self.frames:
            nbytes = layout.nbytes(self.rows, tokens)
            extents.append(Extent(layer, start, tokens, self.rows, nbytes, layer, offset))
            start, offset = start + tokens, offset + storage.record_bytes(nbytes)
        return extents


class JournalStore(SegmentedStore):
    """Segment number = layer number."""

    def __init__(self, storage: SegmentedStorage, *, compaction_entries: int) -> None:
        super().__init__(storage)
        self._threshold = compaction_entries
        self._indices: dict[int, list[Entry]] = {}
        self._compactions = 0

    def index(self, layer: int) -> tuple[Entry, ...]:
        """The index of a layer's journal; together its entries stand for all extents of the layer."""
        return tuple(self._indices.get(layer, ()))

    def recover(self, layer: int) -> tuple[Extent, ...]:
        """The extents that the journal's own frames tell of, whatever the index says: those before the first frame that
        is damaged or cut off. A frame takes the place of everything from its position on."""
        extents: list[Extent] = []
        for extent in self.storage.frames(layer):
            extents = [earlier for earlier in extents if earlier.stop <= extent.start]
            if extent.start != (extents[-1].stop if extents else 0):
                break
            extents.append(extent)
        return tuple(extents)

    def place(self, layer: int, layout: LayerLayout, rows: int) -> tuple[int, int | None]:
        return layer, None

    def placed(self, extent: Extent) -> None:
        index = self._indices.setdefault(extent.layer, [])
        index.append(Entry(extent.start, extent.offset, extent.rows, (extent.tokens,)))
        if len(index) >= self._threshold:
            self._compact(extent.layer)

    def truncate(self, layer: int, length: int) -> None:
        super().truncate(layer, length)
        kept = []
        for entry in self._indices.get(layer, ()):
            stops = [entry.start + sum(entry.frames[: count + 1]) for count in range(len(entry.frames))]
            frames = tuple(tokens for tokens, stop in zip(entry.frames, stops, strict=True) if stop <= length)
            if frames:
                kept.append(attrs.evolve(entry, frames=frames))
        self._indices[layer] = kept

    def stats(self) -> StoreStats:
        return attrs.evolve(super().stats(), compactions=self._compactions)

    def _end(self, entry: Entry, layer: int) -> tuple[int, int, int]:
        """Position, offset and rows of a frame that would follow directly."""
        layout = self.layout(layer)
        length = sum(self.storage.record_bytes(layout.nbytes(entry.rows, tokens)) for tokens in entry.frames)
        return entry.start + sum(entry.frames), entry.offset + length, entry.rows

    def _compact(self, layer: int) -> None:
        """Join what is contiguous. Frames of other rows, or behind bytes that are still being read, begin an entry."""
        merged: list[Entry] = []
        for entry in self._indices[layer]:
            if merged and self._end(merged[-1], layer) == (entry.start, entry.offset, entry.rows):
                merged[-1] = attrs.evolve(merged[-1], frames=(*merged[-1].frames, *entry.frames))
            else:
                merged.append(entry)
        if len(merged) < len(self._indices[layer]):
            self._indices[layer] = merged
            self._compactions += 1
