"""What core hands to a store that keeps bytes on disk: a private folder, and a storage of records in it.

Core's own are in `ollm.storage`; a store knows them through these classes. So does the engine that reads, but it also
reckons with three facts of the format: which records are neighbours, where in one the bytes of a head are, and how
large a buffer must be.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from ollm.contracts.blocks import BlockKey, Extent, KVBlock, Location, StoreStats

if TYPE_CHECKING:
    from torch import Tensor


class Folder(ABC):
    """The private folder of one cache. Whoever made it decides what becomes of it: when it is closed it is removed, or
    kept for later.

    Attributes:
        path: private to this user: mode 0700.
    """

    path: Path

    @abstractmethod
    def open_file(self, name: str, flags: int = 0) -> int:
        """A descriptor, for reading and writing, of a file of mode 0600 that belongs to the folder: made, if it is not
        there yet.

        Args:
            name: `store-` and letters, digits, dots, dashes or underscores, for a store's own files.
            flags: more flags of `os.open`.

        Raises:
            StorageError: for a name that would be left behind.
            CacheDirectoryError: something else has that name: a link, a folder, another user's file.
            OSError: as the system says.
        """

    @abstractmethod
    def close(self) -> None:
        """Give up the lock; the folder is removed, unless it is to be kept. Does nothing in a forked child or twice.

        Raises:
            OSError: as the system says; what is left goes when the next cache is made beside it.
        """


@attrs.frozen
class Pieces:
    """A run of pieces of one block's bytes: what can be read and verified without the rest.

    Attributes:
        extent: the block's.
        start: first byte, counted from the beginning of the block's bytes; a piece begins there.
        stop: byte after the last; a piece, or the block, ends there.
    """

    extent: Extent
    start: int
    stop: int


class Storage(ABC):
    """Numbered files that hold records, of which each holds one block. Everything about bytes, headers, hashes, limits
    and cleaning up is its business; which file a record goes to is the store's.

    Attributes:
        path: the private folder.
        unbuffered: whether records are read and written past the page cache.
    """

    path: Path
    unbuffered: bool

    @abstractmethod
    def write(
        self,
        block: KVBlock,
        key: BlockKey,
        *,
        segment: int,
        at: int | None = None,
        encoded: Sequence[Tensor] | None = None,
    ) -> Location:
        """Put one record into a file, which is made if it is new. All or nothing.

        What is written is copied, and a worker writes it; if the disk refuses, it stays readable from memory, the next
        call raises, and the call after that tries again.

        Args:
            block: on any device; kept as it is, unless `encoded` is given.
            key: which block it is; checked again on every read.
            segment: number of the file, from 0.
            at: where the record begins, a multiple of 4096; by default behind all others. It may lie behind the end of
                the file: what is between counts as used.
            encoded: tensors whose elements are written in its place, one behind the other, little-endian: an encoding
                of the store's own.

        Raises:
            StoreContractError: `at` is no place for it: something there may still be read.
            DiskFullError: no room; the message names the bytes needed and free. Nothing was added.
            StorageError: the system refused this or an earlier record. Nothing was added.
        """

    @abstractmethod
    def record_bytes(self, payload_bytes: int) -> int:
        """What a record of so long a payload takes on disk, header and padding included."""

    @abstractmethod
    def free(self, locations: Sequence[Location]) -> None:
        """Nobody reads these records any more: later ones may take their place."""

    @abstractmethod
    def holds(self, segment: int) -> bool:
        """Whether a file has any record that was not freed."""

    @abstractmethod
    def adopt(self, extents: Sequence[Extent]) -> None:
        """These records are in the files already; all other bytes are free.

        Raises:
            CorruptDataError: some lie over each other, behind the end of their file, or in none that there is.
        """

    @abstractmethod
    def read(self, extents: Sequence[Extent], buffer: Tensor) -> list[Tensor]:
        """The payloads of extents as uint8 views of `buffer`, checked as the `verify` option says.

        Args:
            extents: records that lie one directly behind the other in one file.
            buffer: uint8 on the host, aligned, as long as the records from the first to the last.

        Raises:
            CorruptDataError: when another, a damaged or an incomplete record lies there.
            StorageError: when the system cannot read.
        """

    @abstractmethod
    def pieces(self, extent: Extent, start: int, stop: int) -> Pieces:
        """The fewest pieces that hold bytes `start … stop - 1` of a block."""

    @abstractmethod
    def read_pieces(self, pieces: Pieces, buffer: Tensor) -> Tensor:
        """The bytes of some pieces as a uint8 view of `buffer`, their hashes checked unless `verify` is `never`.

        Args:
            pieces: as `pieces` gave them, or several that are neighbours as one.
            buffer: uint8 on the host, aligned, as long as the pieces, rounded up to 4096.

        Raises:
            CorruptDataError, StorageError: as `read`.
        """

    @abstractmethod
    def submit(self, action: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run something on a worker thread of the disk, as soon as one is free."""

    @abstractmethod
    def raise_failed(self) -> None:
        """Raise what an earlier write failed with, once; after that, try it again.

        Raises:
            StorageError: the record is still in memory, and can be read.
            CacheClosedError, CacheForkedError: the storage cannot be used here any more.
        """

    @abstractmethod
    def flush(self) -> None:
        """Wait until every record is on the disk.

        Raises:
            StorageError: as `raise_failed` does.
        """

    @property
    @abstractmethod
    def buffer_bytes(self) -> int:
        """Memory of the buffers in which records wait to be written."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """Bytes on disk now, and bytes written and read since the start."""

    @abstractmethod
    def close(self) -> None:
        """Close the files and the folder, once what is being written is done with. May be called twice.

        Raises:
            StorageError: when the system refused; what is left goes when the next cache is made beside it.
        """
