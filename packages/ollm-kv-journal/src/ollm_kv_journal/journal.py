"""An append-only journal per layer and branch: frames that describe themselves, and a table of where they are.

Each flush adds a row to the table, and when there are enough, contiguous ones become one. That depends on nothing but
the sequence of flushes, and payloads are never rewritten: the idea is that of a log-structured file system (Rosenblum
and Ousterhout, 1992) without its cleaner. The table is core's, and a commit writes it down; so all that a journal says
of its own is from how many rows on. `tiered-write-back` is the same journal behind a hot tail.
"""

from __future__ import annotations

from ollm.plugin import SegmentedStore


class JournalStore(SegmentedStore):
    """A record goes behind the last one of its layer and branch, as in any store that says nothing else. The storage is
    opened with `compact_from`."""
