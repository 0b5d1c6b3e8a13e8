"""`Pins`: which extents somebody is still reading, so that dropped ones are given back no earlier than that."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ollm.contracts.kv import Extent


class Pins:
    """Counts readers per extent. Thread-safe."""

    def __init__(self) -> None:
        self._readers: dict[Extent, int] = {}
        self._dropped: set[Extent] = set()
        self._lock = threading.Lock()

    def pin(self, extents: Sequence[Extent]) -> None:
        """One reader more: the bytes of these extents stay what they are until `unpin`."""
        with self._lock:
            for extent in extents:
                self._readers[extent] = self._readers.get(extent, 0) + 1

    def unpin(self, extents: Sequence[Extent]) -> None:
        """One reader less."""
        with self._lock:
            for extent in extents:
                left = self._readers.get(extent, 0) - 1
                if left > 0:
                    self._readers[extent] = left
                else:
                    self._readers.pop(extent, None)

    @contextmanager
    def pinned(self, extents: Sequence[Extent]) -> Iterator[None]:
        """Pin extents until the end of the `with` block."""
        self.pin(extents)
        try:
            yield
        finally:
            self.unpin(extents)

    def drop(self, extents: Sequence[Extent]) -> None:
        """The store does not list these any more."""
        with self._lock:
            self._dropped.update(extents)

    @property
    def dropped(self) -> frozenset[Extent]:
        """What was dropped and not yet taken by `take_unread`."""
        with self._lock:
            return frozenset(self._dropped)

    def take_unread(self) -> list[Extent]:
        """Dropped extents that nobody reads any more, each once, in order."""
        with self._lock:
            unread = [extent for extent in self._dropped if extent not in self._readers]
            self._dropped.difference_update(unread)
        return sorted(unread, key=lambda extent: (extent.layer, extent.start))
