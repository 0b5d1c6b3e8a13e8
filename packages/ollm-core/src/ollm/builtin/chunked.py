"""`chunked`: one append-only file per layer. Chunks have the size of what was flushed."""

from __future__ import annotations

from ollm.plugin import SegmentedStore


class ChunkedStore(SegmentedStore):
    """A record goes behind the last one of its layer and branch, as in any store that says nothing else."""
