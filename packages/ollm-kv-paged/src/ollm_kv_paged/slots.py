"""Stores whose files are slots of one size. Which free slot comes next is a small policy of its own.

A slot takes one extent of at most so many tokens; its size in bytes follows from a layer's shapes and the number of
rows, so that there is a file for each size.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Sequence

from ollm.plugin import Extent, LayerLayout, SegmentedStorage, SegmentedStore


class Slots(ABC):
    """The slots of one file, numbered from 0; there are as many as were ever in use at once."""

    def __init__(self) -> None:
        self._end = 0

    @property
    def next(self) -> int:
        """The slot that `take` will take."""
        free = self._first_free()
        return self._end if free is None else free

    def take(self) -> None:
        """The next slot is in use from now on."""
        if self._first_free() is None:
            self._end += 1
        else:
            self._take_first_free()

    @abstractmethod
    def give_back(self, slot: int) -> None:
        """Nobody needs this slot any more."""

    @abstractmethod
    def _first_free(self) -> int | None: ...

    @abstractmethod
    def _take_first_free(self) -> None: ...


class Pool(Slots):
    """The lowest free slot comes first, so that the end of the file becomes free."""

    def __init__(self) -> None:
        super().__init__()
        self._free: list[int] = []

    def give_back(self, slot: int) -> None:
        heapq.heappush(self._free, slot)

    def _first_free(self) -> int | None:
        return self._free[0] if self._free else None

    def _take_first_free(self) -> None:
        heapq.heappop(self._free)


class Ring(Slots):
    """The slot that has been free for longest comes first: what leaves in order is replaced in order."""

    def __init__(self) -> None:
        super().__init__()
        self._free: deque[int] = deque()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)

    def _first_free(self) -> int | None:
        return self._free[0] if self._free else None

    def _take_first_free(self) -> None:
        self._free.popleft()


class SlottedStore(SegmentedStore):
    """Puts each extent into a slot. Layers for which `shares` answers the same share their slots."""

    def __init__(
        self,
        storage: SegmentedStorage,
        *,
        slot_tokens: int,
        make_slots: Callable[[], Slots],
        shares: Callable[[int], Hashable],
    ) -> None:
        super().__init__(storage)
        self.extent_tokens = self._slot_tokens = slot_tokens
        self._make_slots = make_slots
        self._shares = shares
        self._numbers: dict[Hashable, int] = {}  # of the files
        self._files: list[tuple[int, Slots]] = []  # bytes of a slot, and the slots

    def place(self, layer: int, layout: LayerLayout, rows: int) -> tuple[int, int | None]:
        slot_bytes = self.storage.record_bytes(layout.nbytes(rows, self._slot_tokens))
        number = self._numbers.setdefault((self._shares(layer), slot_bytes), len(self._files))
        if number == len(self._files):
            self._files.append((slot_bytes, self._make_slots()))
        return number, self._files[number][1].next * slot_bytes

    def placed(self, extent: Extent) -> None:
        self._files[extent.segment][1].take()

    def release(self, extents: Sequence[Extent]) -> None:
        super().release(extents)
        for extent in extents:
            self._files[extent.segment][1].give_back(self.slot(extent))

    def slot(self, extent: Extent) -> int:
        """The slot of an extent in its file."""
        return extent.offset // self._files[extent.segment][0]
