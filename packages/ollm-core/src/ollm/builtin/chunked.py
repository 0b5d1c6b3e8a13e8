"""`chunked`: one append-only file per layer. Chunks have the size of what was flushed."""

from __future__ import annotations

from ollm.plugin import LayerLayout, SegmentedStore


class ChunkedStore(SegmentedStore):
    """Segment number = layer number; the chunk list of a layer is its extents."""

    def place(self, layer: int, layout: LayerLayout, rows: int) -> tuple[int, int | None]:
        return layer, None
