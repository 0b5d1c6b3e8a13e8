"""`CacheState`: what a cache can say of itself, the same record for every strategy."""

from __future__ import annotations

from pathlib import Path

import attrs


@attrs.frozen(kw_only=True)
class CacheState:
    """A snapshot of a cache. Token counts are sequence lengths; sizes in bytes."""

    strategy: str
    spill_policy: str
    lifecycle: str
    lossless: bool
    directory: Path | None
    """This cache's private folder; `None` for strategies that never touch a disk."""
    tokens: int
    """True sequence length."""
    rows: int
    stored_layers: int
    """Layers whose keys and values go to the store (full attention); the others keep transformers' own."""
    persisted_tokens: int
    """Tokens that the store holds."""
    tail_tokens: int
    """The newest tokens, in memory only."""
    tail_bytes: int
    resident_bytes: int
    """Stored keys and values that are in memory: copies of what is on disk, or the store itself for `resident`."""
    disk_bytes: int
    """What the store's files take now."""
    bytes_written: int
    bytes_read: int
    spills: int
    """Flushes of a layer's tail."""
    evictions: int
    evicted_tokens: int
    compactions: int
    window_tokens: int | None
    cold_representation: str
