"""The KV contract: where the keys and values of one cache live, and how their raw bytes become tensors again.

A store keeps what core hands it, in position order. It knows nothing of attention, masks, models, batches being
reordered, or readers: core does the reading, the pinning and the row bookkeeping for every store alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from torch import Tensor

    from ollm.storage.segments import SegmentedStorage

StorageFactory = Callable[..., "SegmentedStorage"]
"""Takes the keyword `write_buffers`, see `SegmentedStorage`."""


@attrs.frozen(cache_hash=True)  # a step looks up each several times
class Extent:
    """A run of consecutive tokens of one layer, stored as one piece. Immutable; compared by value."""

    layer: int
    """The number that `KVStore.append` was given."""
    start: int
    """Position of the first token, counted from the first one that was appended to the layer."""
    tokens: int
    rows: int
    """Batch rows it was written with. Core maps the rows of today onto them."""
    nbytes: int
    """Length of the raw bytes that `decode` takes."""
    segment: int = -1
    """Which file of the storage holds the bytes; -1 when they are in no file."""
    offset: int = -1
    """Where the raw bytes begin in that file. A store without files may number its extents here: one that takes the
    place of a dropped extent must not equal it, for a reader may still hold the old one."""

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.tokens


@attrs.frozen
class KVBlock:
    """Keys `[rows, kv_heads, tokens, key_size]` and values `[rows, kv_heads, tokens, value_size]` of an extent."""

    keys: Tensor
    values: Tensor
    key_scale: float = 1.0
    """What all keys must be multiplied by. Attention multiplies few scores instead of many keys."""
    value_scale: float = 1.0
    """The same for values."""


@attrs.frozen
class Commit:
    """What a durable store must be able to restore: committed tokens, and core's own tail and identity as JSON."""

    tokens: int
    entry: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class StoreStats:
    """Counters of a store. Sizes in bytes; counters since the store was made."""

    disk_bytes: int = 0
    """Bytes that the store's files take now, headers, alignment and holes included."""
    memory_bytes: int = 0
    """Bytes of keys and values that the store itself holds in memory."""
    bytes_written: int = 0
    bytes_read: int = 0
    compactions: int = 0
    representation: str = "exact"
    """How cold keys and values are represented, such as `exact` or `int8-symmetric-per-tensor`."""


class KVStore(ABC):
    """Keeps the keys and values of one cache. One writer at a time; any number of readers.

    Keys and values arrive per layer as `[rows, kv_heads, tokens, head_size]`, keys after RoPE and heads not
    repeated; key and value head sizes may differ. The first `append` to a layer fixes its shapes and dtype until the
    layer is truncated to zero.

    `layer` is a number and nothing more: that of the model's layer for the cache that was made, and numbers above all
    of these for its forks, whose tokens are counted from 0 again.
    """

    extent_tokens: int | None = None
    """The most tokens of an extent, and as many as core puts into one, whenever it has them; `None` lets core cut
    extents of any size. The last extent of a layer may be shorter: core drops it and appends it anew as it grows."""

    window: int | None = None
    """Newest tokens that a query may see, itself included; `None` for the full history. Core masks by it and evicts
    what has left it; strategies that set it state `full_history=False`."""

    sinks: int = 0
    """First tokens that stay visible for ever beside the window."""

    storage: SegmentedStorage | None = None
    """The storage that holds the extents' bytes, from which core reads, several adjacent extents at a time; `None` for
    stores that override `read`."""

    trims: bool = False
    """Whether `truncate` may cut the last extent in two, for formats that lose something each time that they encode:
    what stays of it keeps its bytes. Otherwise core appends the rest of such an extent again."""

    in_memory: bool = False
    """Whether `read` only looks something up. Core then calls it when the bytes are needed, on the thread that needs
    them, instead of ahead of that on a worker, and keeps no resident copies."""

    @abstractmethod
    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keep these tokens as one extent after the last one of `layer`.

        The tensors belong to the caller, who changes them later: copy, never alias. All or nothing: after an error
        `extents(layer)` is what it was.
        """

    @abstractmethod
    def extents(self, layer: int) -> Sequence[Extent]:
        """The extents of `layer`: immutable, in order of position and contiguous from position 0, but for those that
        were evicted. A later append or truncate makes a new sequence and leaves this one as it is."""

    @abstractmethod
    def decode(self, extent: Extent, raw: Tensor, out: KVBlock | None) -> KVBlock:
        """Turn raw bytes (uint8, on the compute device, exactly `extent.nbytes`) into keys and values.

        Where the format is raw this is a view of `raw`. A format that must compute writes into the tensors of `out`,
        if it is given, whatever is in them; either way the block that holds the result is returned.
        """

    @abstractmethod
    def truncate(self, layer: int, length: int) -> None:
        """Drop every token of `layer` from position `length` on; `length` is an extent's border, unless the store
        `trims`: then the extent that holds `length` becomes a shorter one of the same bytes.

        The bytes of dropped extents may still be read: they become free when core calls `release`.
        """

    def evict(self, layer: int, extents: Sequence[Extent]) -> None:
        """Drop these extents of `layer`, which have left the window; never the newest one, and nothing moves.

        Called for stores with a `window` only. Their bytes become free when core calls `release`.
        """
        raise NotImplementedError(f"{type(self).__name__} has a window: it must override `evict`.")

    def release(self, extents: Sequence[Extent]) -> None:  # noqa: B027
        """Dropped extents that no reader holds any more: their bytes may be reused now. Default: nothing."""

    def read(self, extent: Extent) -> Tensor:
        """The raw bytes of an extent as a uint8 tensor on the host, for stores without a `storage`.

        Called from core's I/O workers, several at once, unless the store is `in_memory`.

        Raises:
            CorruptDataError: when the bytes are not those that were appended.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `storage`: it must override `read`.")

    def commit(self, entry: Commit) -> None:  # noqa: B027
        """Make all that was appended durable. Called for persistent caches only. Default: nothing."""

    def close(self) -> None:
        """Free everything, on disk too for a runtime-scoped cache. May be called twice."""
        if self.storage is not None:
            self.storage.close()

    def stats(self) -> StoreStats:
        """Counters for `cache.state()`."""
        return self.storage.stats() if self.storage is not None else StoreStats()
