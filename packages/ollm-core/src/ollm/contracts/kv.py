"""The KV contract: a store moves and codes the keys and values of one cache, and nothing else.

Core owns the table of what is where: positions, forks, crops, windows, readers. A store is told to write a block, says
where its bytes are, turns them back into a block, and is told when nobody needs them any more. It knows nothing of
attention, masks, models, batches being reordered, or readers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ollm.contracts.blocks import BlockKey, Extent, KVBlock, Location, StoreStats
from ollm.contracts.storage import Storage
from ollm.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from torch import Tensor


class KVStore(ABC):
    """Moves and codes the keys and values of one cache. One writer at a time; any number of readers.

    Keys and values arrive as `[rows, kv_heads, tokens, head_size]`, keys after RoPE and heads not repeated; key and
    value head sizes may differ, from one layer to another too.

    Attributes:
        extent_tokens: the most tokens of an extent, and as many as core puts into one, whenever it has them; `None`
            lets core cut extents of any size. The last extent of a layer may be shorter: core writes its tokens
            anew as it grows, but not where the rows of the batch were picked since, or where the store loses
            something: then it stays as it is.
        window: newest tokens that a query may see, itself included; `None` for the full history. Core masks by it
            and drops what has left it; strategies that set it state `full_history=False`.
        sinks: first tokens that stay visible for ever beside the window.
        storage: the storage that holds the bytes, from which core reads, several adjacent extents at a time, or
            parts of one; `None` for stores that override `read`.
        in_memory: whether `read` only looks something up. Core then calls it when the bytes are needed, on the
            thread that needs them, instead of ahead of that on a worker, and keeps no resident copies.
        decodes_ahead: whether `decode` may run on several threads at once, and beside `write` and `free`: it depends
            on nothing but its arguments and what never changes. Where attention runs on the host, core then decodes
            on the threads that read, ahead of attention: worth it for what takes long and leaves Python's lock alone,
            as decompression does.
    """

    extent_tokens: int | None = None

    window: int | None = None

    sinks: int = 0

    storage: Storage | None = None

    in_memory: bool = False

    decodes_ahead: bool = False

    @abstractmethod
    def write(self, block: KVBlock, key: BlockKey) -> Location:
        """Keep a block and say where its bytes are. All or nothing: after an error nothing is kept.

        The tensors belong to the caller, who changes them later: copy, never alias. Blocks of a layer come in order of
        position, but for those that are written anew after others were dropped. What is at other locations that were
        not freed stays as it is.
        """

    @abstractmethod
    def decode(self, extent: Extent, raw: Tensor, out: KVBlock | None) -> KVBlock:
        """Turn the bytes of a block (uint8, on the compute device, `extent.location.nbytes` of them) into all of its
        keys and values, visible or not, of `extent.layout`.

        Where the format is raw this is a view of `raw`. A format that must compute writes into the tensors of `out`,
        if it is given, whatever is in them; either way the block that holds the result is returned.
        """

    @abstractmethod
    def free(self, locations: Sequence[Location]) -> None:
        """Nobody reads these any more: their bytes may be used for others. After Ctrl-C it is called for them again,
        before anything else is written."""

    def read(self, extent: Extent) -> Tensor:
        """The bytes of a block as a uint8 tensor on the host, for stores without a `storage`.

        Called from core's I/O workers, several at once, unless the store is `in_memory`.

        Raises:
            CorruptDataError: when the bytes are not those that were written for this key.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `storage`: it must override `read`.")

    def adopt(self, extents: Sequence[Extent]) -> None:
        """Go on with what an earlier store wrote into the same folder: these are in use, all else is free.

        Called once, before anything else, on a store over a folder that was kept. Reads nothing yet: whatever is wrong
        with the bytes is noticed when they are read.

        Raises:
            UnsupportedOperationError: by default; a store that keeps nothing beyond its process need not override it.
            CorruptDataError: an extent cannot be where it is said to be.
        """
        raise UnsupportedOperationError(f"{type(self).__name__} cannot go on with what an earlier one wrote.")

    def close(self) -> None:
        """Free everything that is in memory; the folder is closed, and removed unless it is to be kept. May be called
        twice."""
        if self.storage is not None:
            self.storage.close()

    def stats(self) -> StoreStats:
        """Counters for `cache.state()`."""
        return self.storage.stats() if self.storage is not None else StoreStats()
