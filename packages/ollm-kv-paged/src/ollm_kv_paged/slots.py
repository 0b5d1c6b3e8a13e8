"""Stores whose files are slots of one size. Which free slot comes next is a small policy of its own.

A slot takes one extent of at most so many tokens; its size in bytes follows from a layer's shapes and the number of
rows, so that there is a file for each size.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress

from ollm.plugin import BlockKey, CorruptDataError, Extent, KVLayout, Location, SegmentedStore, Storage


class Slots(ABC):
    """The slots of one file, numbered from 0; there are as many as were ever in use at once. Which are in use is known
    in one place: the order of those that are free may name others, as after an interrupt."""

    def __init__(self) -> None:
        self._used: set[int] = set()
        self._end = 0

    @property
    def next(self) -> int:
        """The free slot whose turn it is."""
        while (slot := self._first_free()) is not None:
            if slot not in self._used:
                return slot
            self._remove_free(slot)
        while self._end in self._used:
            self._end += 1
        return self._end

    def take(self, slot: int) -> None:
        """A slot is in use from now on: the next one, or any, where an earlier store put something into it."""
        self._used.add(slot)
        if slot < self._end:
            self._remove_free(slot)
        for skipped in range(self._end, slot):
            self._add_free(skipped)
        self._end = max(self._end, slot + 1)

    def give_back(self, slot: int) -> None:
        """Nobody needs this slot any more. Does nothing if it is not in use."""
        if slot in self._used:
            self._used.discard(slot)
            self._add_free(slot)

    @abstractmethod
    def _add_free(self, slot: int) -> None: ...

    @abstractmethod
    def _first_free(self) -> int | None: ...

    @abstractmethod
    def _remove_free(self, slot: int) -> None: ...


class Pool(Slots):
    """The lowest free slot comes first, so that the end of the file becomes free."""

    def __init__(self) -> None:
        super().__init__()
        self._free: list[int] = []

    def _add_free(self, slot: int) -> None:
        heapq.heappush(self._free, slot)

    def _first_free(self) -> int | None:
        return self._free[0] if self._free else None

    def _remove_free(self, slot: int) -> None:
        if self._free[:1] == [slot]:
            heapq.heappop(self._free)
        elif slot in self._free:
            self._free.remove(slot)
            heapq.heapify(self._free)


class Ring(Slots):
    """The slot that has been free for longest comes first: what leaves in order is replaced in order."""

    def __init__(self) -> None:
        super().__init__()
        self._free: deque[int] = deque()

    def _add_free(self, slot: int) -> None:
        self._free.append(slot)

    def _first_free(self) -> int | None:
        return self._free[0] if self._free else None

    def _remove_free(self, slot: int) -> None:
        with suppress(ValueError):
            self._free.remove(slot)


class SlottedStore(SegmentedStore):
    """Puts each record into a slot. Those for whose keys `shares` answers the same share a file, if their slots have
    one size."""

    extent_tokens: int

    def __init__(
        self,
        storage: Storage,
        *,
        slot_tokens: int,
        make_slots: Callable[[], Slots],
        shares: Callable[[BlockKey], Hashable],
    ) -> None:
        super().__init__(storage)
        self.extent_tokens = slot_tokens
        self._shares = shares
        self._slots: defaultdict[int, Slots] = defaultdict(make_slots)  # by the number of their file
        self._taken: dict[Location, int] = {}  # the slot of each record

    def file(self, key: BlockKey, layout: KVLayout) -> Hashable:
        return self._shares(key), self._bytes(key, layout)

    def place(self, key: BlockKey, layout: KVLayout) -> tuple[int, int | None]:
        number = self.number(self.file(key, layout))
        return number, self._slots[number].next * self._bytes(key, layout)

    def placed(self, extent: Extent) -> None:
        location = extent.location
        slot = location.offset // self._bytes(extent.key, extent.layout)
        self._taken[location] = slot
        self._slots[location.segment].take(slot)

    def adopt(self, extents: Sequence[Extent]) -> None:
        sizes: dict[int, int] = {}
        for extent in extents:
            location, size = extent.location, self._bytes(extent.key, extent.layout)
            taken = self.storage.record_bytes(location.nbytes)
            begins = location.offset % size == self.storage.record_bytes(0)  # a header, and the payload behind it
            if not begins or taken > size or sizes.setdefault(location.segment, size) != size:
                raise CorruptDataError(f"{extent} is not in a slot of segment {location.segment}.")
        super().adopt(extents)

    def free(self, locations: Sequence[Location]) -> None:
        super().free(locations)
        for location in locations:
            slot = self._taken.pop(location, None)
            if slot is not None:
                self._slots[location.segment].give_back(slot)
        for number in {location.segment for location in locations}:
            if not self.storage.holds(number):  # the number may be given to slots of another size
                self._slots.pop(number, None)

    def _bytes(self, key: BlockKey, layout: KVLayout) -> int:
        """Of the slot that a record takes."""
        return self.storage.record_bytes(layout.nbytes(key.rows, self.extent_tokens))
