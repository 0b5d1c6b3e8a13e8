"""An append-only journal per layer and branch: frames that describe themselves, and a table of where they are.

Each flush adds a row to the table, and when there are enough, contiguous ones become one. That depends on nothing but
the sequence of flushes, and payloads are never rewritten: the idea is that of a log-structured file system (Rosenblum
and Ousterhout, 1992) without its cleaner. The table is core's; a commit writes it down, compacted by the same rule.
`tiered-write-back` is the same journal behind a hot tail.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from ollm.plugin import Extent, Location, SegmentedStore, Storage, StoreStats


@attrs.define
class _Journal:
    """Counts of one journal's table, as a commit would write it now."""

    segment: int
    rows: int = 0
    broken: int = 0
    """How many of them do not follow the row before: what is left when all that is contiguous is joined."""
    end: tuple[int, int, int] | None = None
    """Position, place and rows of the batch of a frame that would follow the last one."""


class JournalStore(SegmentedStore):
    """A record goes behind the last one of its layer and branch."""

    def __init__(self, storage: Storage, *, compaction_entries: int) -> None:
        """Over a storage whose manifests are compacted from as many rows on."""
        super().__init__(storage)
        self._threshold = compaction_entries
        self._journals: dict[tuple[int, int], _Journal] = {}
        self._compactions = 0

    def placed(self, extent: Extent) -> None:
        key, location = extent.key, extent.location
        journal = self._journals.setdefault((key.layer, key.branch), _Journal(location.segment))
        journal.rows += 1
        journal.broken += journal.end != (key.start, location.offset, key.rows)
        journal.end = extent.stop, location.offset + self.storage.record_bytes(location.nbytes), key.rows
        if journal.rows >= self._threshold and journal.broken < journal.rows:
            journal.rows = journal.broken
            self._compactions += 1

    def free(self, locations: Sequence[Location]) -> None:
        super().free(locations)
        for location in locations:
            if not self.storage.holds(location.segment):  # a journal that is empty begins anew
                self._journals = {key: one for key, one in self._journals.items() if one.segment != location.segment}

    def stats(self) -> StoreStats:
        return attrs.evolve(super().stats(), compactions=self._compactions)
