"""`streamed-segmented`: extents of all layers one behind the other, in large files.

A prompt is stored layer after layer, and a decode step reads layer after layer: the disk goes through the files from
the beginning to the end, without seeking. Core reads neighbours of one layer at once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from ollm.plugin import Extent, LayerLayout, SegmentedStorage, SegmentedStore


class SegmentedFilesStore(SegmentedStore):
    """Records go to the current file until it has reached its size; then to the first file that holds nothing."""

    def __init__(self, storage: SegmentedStorage, *, segment_bytes: int) -> None:
        super().__init__(storage)
        self._segment_bytes = segment_bytes
        self._current = 0
        self._end = 0  # of the current file
        self._live: Counter[int] = Counter()  # records of each file that somebody may still read

    def place(self, layer: int, layout: LayerLayout, rows: int) -> tuple[int, int | None]:
        if self._end < self._segment_bytes or not self._live[self._current]:
            return self._current, None
        return next(number for number in itertools.count() if not self._live[number]), None

    def placed(self, extent: Extent) -> None:
        self._current = extent.segment
        self._end = extent.offset + self.storage.record_bytes(extent.nbytes) - self.storage.record_bytes(0)
        self._live[extent.segment] += 1

    def release(self, extents: Sequence[Extent]) -> None:
        super().release(extents)
        self._live.subtract(extent.segment for extent in extents)
