"""What a cache can say of itself: running counters, and a state record that is the same for every strategy."""

from __future__ import annotations

from pathlib import Path

import attrs

from ollm.units import format_size


@attrs.define
class KVCounters:
    """What went to and came from a store since the cache was made. Bytes of keys and values, without headers."""

    saved_bytes: int = 0
    """Each token once, even if it was stored again later."""
    save_seconds: float = 0.0
    """What handing them to the store took: the disk's own work goes on behind that."""
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    """What attention waited for them."""
    spills: int = 0
    """Flushes of a layer's tail."""


@attrs.frozen(kw_only=True)
class PrefillProgress:
    """How far a prefill is."""

    tokens: int
    """Of the prompt that is being read."""
    layers_done: float
    """With fractions."""
    layers: int
    saved_bytes: int
    """Keys and values that the cache stored so far."""
    seconds: float
    eta_seconds: float


@attrs.frozen(kw_only=True)
class CacheState:
    """A snapshot of a cache. Token counts are sequence lengths; sizes in bytes."""

    strategy: str
    spill_policy: str
    lifecycle: str
    mode: str
    """`block`: attention reads blocks, one at a time; `tensor`: it gets all of a layer's keys and values."""
    mode_reason: str
    """Why it is that mode."""
    lossless: bool
    directory: Path | None
    """This cache's private folder; `None` for strategies that never touch a disk."""
    tokens: int
    """True sequence length."""
    rows: int
    stored_layers: int
    """Layers whose keys and values go to the store: those that attend to every token. The others keep transformers'
    own, such as windows and recurrent states."""
    growing_layers: int
    """Layers that keep something of every token in memory, beside what they store or instead of it."""
    memory_bytes: int
    """What all layers keep in memory beside the store and its tails: windows, recurrent states, what grows."""
    persisted_tokens: int
    """Tokens that the store holds, those of `shared_tokens` included."""
    shared_tokens: int
    """Tokens whose extents belong to the cache that this one was forked from."""
    caches: int
    """How many caches share the store: the first one and its forks. Bytes on disk, and moved, are those of all."""
    tail_tokens: int
    """The newest tokens, in memory only."""
    tail_bytes: int
    resident_bytes: int
    """Stored keys and values that are in memory: copies of what is on disk, or the store itself for `resident`."""
    read_buffers: int
    """How many reads may be in flight."""
    buffer_bytes: int
    """Memory of the buffers for reading and writing."""
    unbuffered: bool
    """Whether the disk is read and written past the page cache."""
    disk_bytes: int
    """What the store's files take now."""
    bytes_written: int
    """Bytes that the store wrote since the start: what a flash disk wears by."""
    write_amplification: float
    """`bytes_written` by the bytes of the keys and values that were stored, each counted once, in the model's dtype;
    0 if there are none."""
    bytes_read: int
    save_seconds: float
    load_seconds: float
    spills: int
    """Flushes of a layer's tail."""
    evictions: int
    """How often tokens left the window."""
    evicted_tokens: int
    """How many tokens the store dropped since they left the window."""
    compactions: int
    window_tokens: int | None
    cold_representation: str

    def __str__(self) -> str:
        """What people ask first, in a few lines; `repr` has every field."""
        size, disk = format_size, self.directory is not None
        where = [f"{self.persisted_tokens:,} stored" + (f" ({size(self.disk_bytes)} on disk)" if disk else "")]
        where += [f"{self.tail_tokens:,} in memory only ({size(self.tail_bytes)})"]
        if self.evicted_tokens:
            where.append(f"{self.evicted_tokens:,} dropped, for the window keeps {self.window_tokens:,}")
        kind = f"{self.strategy}, {'lossless' if self.lossless else 'not lossless'}"
        lines = [
            f"{kind}, {self.mode} mode ({self.mode_reason})",
            f"{self.tokens:,} tokens in {self.rows} rows: {', '.join(where)}",
            f"memory: {size(self.resident_bytes)} of what is stored, {size(self.buffer_bytes)} of buffers",
            f"written {size(self.bytes_written)}, read {size(self.bytes_read)}; attention waited "
            f"{self.load_seconds:.2f} s, storing took {self.save_seconds:.2f} s",
        ]
        if disk:
            lines.append(f"folder: {self.directory}")
        return "\n".join(lines)
