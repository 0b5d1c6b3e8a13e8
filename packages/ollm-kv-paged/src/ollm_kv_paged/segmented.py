"""`streamed-segmented`: extents of all layers one behind the other, in large files.

A prompt is stored layer after layer, and a decode step reads layer after layer: the disk goes through the files from
the beginning to the end, without seeking. Core reads neighbours of one layer at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ollm.plugin import BlockKey, Extent, KVLayout, SegmentedStore, Storage


class SegmentedFilesStore(SegmentedStore):
    """Records go to the current file until it has reached its size; then to the first file that holds nothing."""

    def __init__(self, storage: Storage, *, segment_bytes: int) -> None:
        super().__init__(storage)
        self._segment_bytes = segment_bytes
        self._current = 0
        self._end = 0  # of the current file

    def place(self, key: BlockKey, layout: KVLayout) -> tuple[int, int | None]:
        if self._end < self._segment_bytes or not self.storage.holds(self._current):
            return self._current, None
        return next(number for number in itertools.count() if not self.storage.holds(number)), None

    def placed(self, extent: Extent) -> None:
        location, storage = extent.location, self.storage
        self._current = location.segment
        self._end = location.offset + storage.record_bytes(location.nbytes) - storage.record_bytes(0)

    def adopt(self, extents: Sequence[Extent]) -> None:
        super().adopt(sorted(extents, key=lambda one: (one.location.segment, one.location.offset)))
