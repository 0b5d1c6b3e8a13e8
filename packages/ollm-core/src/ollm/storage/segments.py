"""`SegmentedStorage`: numbered files that hold records, and every promise of the format kept in one place.

A store decides which segment a record goes to and keeps the extents that it gets back; everything about bytes, headers,
hashes, room on the disk and cleaning up is here. Live bytes are never overwritten: a record goes where no extent is
held, and an extent is held until it is released. Records are written in the background.
"""

from __future__ import annotations

import functools
import os
import secrets
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from ollm.contracts.kv import Extent, StoreStats
from ollm.errors import (
    CacheClosedError,
    CacheForkedError,
    ConfigurationError,
    CorruptDataError,
    StorageError,
    StoreContractError,
)
from ollm.io.buffers import ALIGNMENT
from ollm.io.scheduler import IOScheduler, scheduler_of
from ollm.storage import shim
from ollm.storage.datafile import DataFile, takes_unbuffered
from ollm.storage.folder import MANIFEST, RunFolder, segment_name
from ollm.storage.manifest import Manifest
from ollm.storage.options import BUFFERS, StorageOptions
from ollm.storage.records import DTYPE_CODES, STORE_ID_BYTES, record_bytes, record_span
from ollm.storage.room import check_room, failed_write, reason
from ollm.storage.segment import Moved, Segment, write_record
from ollm.storage.tensors import lay_out, tensor_bytes
from ollm.storage.write_behind import WriteBehind

_MOST_SEGMENTS = 10**6


class SegmentedStorage:
    """Records in numbered files of one private folder. Thread-safe for one writer and any number of readers."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        strategy: str,
        options: StorageOptions | None = None,
        parameters: Mapping[str, Any] | None = None,
        write_buffers: int = BUFFERS,
        pinned: bool = False,
    ) -> None:
        """Start empty in `folder` and write the manifest.

        Args:
            folder: this cache's own, just made.
            strategy: the name that the manifest states.
            options: verification and limits.
            parameters: the strategy's own parameters, as JSON, for the manifest.
            write_buffers: how many records of up to 8 MiB may wait to be written; then `write` waits.
            pinned: whether payloads come from a CUDA device.
        """
        if sys.byteorder != "little":
            raise StorageError("Payloads are little-endian and this machine is not: use cache_strategy='resident'.")
        self._options = options or StorageOptions()
        self._folder = folder
        self._store_id = secrets.token_bytes(STORE_ID_BYTES)
        self._segments: dict[int, Segment] = {}
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._moved = Moved()
        self.scheduler = scheduler_of(folder.path)
        """The workers of the disk that the folder is on."""
        self._writes = WriteBehind(
            self.scheduler, lambda error, nbytes: failed_write(error, folder.path, nbytes),
            count=write_buffers, pinned=pinned,
        )  # fmt: skip
        # also at interpreter exit, and when the user just drops the cache
        self._dispose = weakref.finalize(
            self, _dispose, folder, self._segments, self._writes, self.scheduler, self._owner
        )
        manifest = Manifest(
            lifecycle="runtime-scoped", store_id=self._store_id.hex(), strategy=strategy,
            parameters=dict(parameters or {}),
        )  # fmt: skip
        try:
            folder.replace_manifest(manifest.to_json())
            self.unbuffered = takes_unbuffered(self.path / MANIFEST)
            """Whether records are read and written past the page cache."""
        except OSError as error:
            self.close()
            raise failed_write(error, self.path, ALIGNMENT) from error
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The private folder."""
        return self._folder.path

    @staticmethod
    def record_bytes(payload_bytes: int) -> int:
        """What a record takes on disk, header and padding included."""
        return record_bytes(payload_bytes)

    @property
    def buffer_bytes(self) -> int:
        """Memory of the buffers in which records wait to be written."""
        return self._writes.nbytes

    def write(
        self,
        payload: Sequence[Tensor],
        *,
        segment: int,
        layer: int,
        start: int,
        tokens: int,
        rows: int,
        dtype: str,
        at: int | None = None,
    ) -> Extent:
        """Put one record into a segment, which is made if it is new. All or nothing.

        The payload is copied, and a worker writes it; if the disk refuses, it stays readable from memory, the next
        call raises, and the call after that tries again.

        Args:
            payload: tensors whose elements are written one behind the other, little-endian; on any device.
            segment: number of the file, from 0.
            layer, start, tokens, rows: what the record is, checked again on every read.
            dtype: a name of the format's dtypes, or `opaque` for an encoding of the store's own.
            at: where the record begins, a multiple of 4096; by default behind all others. It may lie behind the end of
                the file: what is between counts as used.

        Raises:
            StoreContractError: `at` is no place for it: something there may still be read.
            DiskFullError: no room; the message names the bytes needed and free. Nothing was added.
            StorageError: the system refused this or an earlier record. Nothing was added.
        """
        self.settle()
        if not 0 <= segment < _MOST_SEGMENTS:
            raise ConfigurationError(f"segment={segment} is out of range: 0 … {_MOST_SEGMENTS - 1}.")
        if dtype not in DTYPE_CODES:
            raise StorageError(
                f"Keys and values of dtype {dtype} cannot be stored; the format has {', '.join(DTYPE_CODES)}."
            )
        length = sum(tensor.nbytes for tensor in payload)
        size = record_bytes(length)
        check_room(self.path, size, sum(segment.end for segment in self._segments.values()), self._options)
        try:
            target = self._segment(segment)
        except OSError as error:
            raise failed_write(error, self.path, size) from error
        begin = target.end if at is None else at
        if begin % ALIGNMENT or begin < 0 or not target.is_free(begin, begin + size):
            raise StoreContractError(f"at={begin}: {size} bytes from there are not free in segment {segment}.")
        extent = Extent(layer, start, tokens, rows, length, segment, begin + ALIGNMENT)
        buffer = self._writes.buffer(size)
        try:
            lay_out(payload, buffer[ALIGNMENT : ALIGNMENT + length])
            buffer[ALIGNMENT + length : size] = 0
            with self._lock:
                target.hold(extent, dtype)
        except BaseException:
            self._writes.give_back(buffer)
            raise
        # refers to no more than it needs: a cache that is dropped while it writes must not be kept alive by that
        job = functools.partial(write_record, target, extent, dtype, tensor_bytes(buffer)[:size], self._moved)
        self._writes.submit((segment, extent.offset), buffer, size, job)
        return extent

    def settle(self) -> None:
        """Raise what an earlier write failed with, once; after that, try it again.

        Raises:
            StorageError: the record is still in memory, and can be read.
        """
        self._check_usable()
        self._writes.settle()

    def flush(self) -> None:
        """Wait until every record is on the disk.

        Raises:
            StorageError: as `settle` does.
        """
        self._check_usable()
        self._writes.flush()

    def read(self, extents: Sequence[Extent], buffer: Tensor) -> list[Tensor]:
        """The payloads of extents as uint8 views of `buffer`, checked as the `verify` option says.

        Args:
            extents: records that lie one directly behind the other in one segment.
            buffer: uint8 on the host, aligned, as long as the records from the first to the last.

        Raises:
            CorruptDataError: when another, a damaged or an incomplete record lies there.
            StorageError: when the system cannot read.
        """
        self._check_usable()
        with self._lock:
            segment = self._segments.get(extents[0].segment)
        if segment is None:
            raise CorruptDataError(f"There is no segment {extents[0].segment} in {self.path}.")
        begin, end = record_span(extents[0])[0], record_span(extents[-1])[1]
        segment.read(extents, tensor_bytes(buffer)[: end - begin], self._rescue)
        self._moved.add(read=end - begin)
        return [buffer[extent.offset - begin : extent.offset - begin + extent.nbytes] for extent in extents]

    def release(self, extents: Sequence[Extent]) -> None:
        """Give up the bytes of these extents: later records may take their place."""
        self._check_owner()
        for extent in extents:
            self._writes.forget((extent.segment, extent.offset))
        with self._lock:
            for number in {extent.segment for extent in extents} & set(self._segments):
                self._segments[number].let_go(extent for extent in extents if extent.segment == number)

    def frames(self, segment: int) -> tuple[Extent, ...]:
        """The records that a segment's file itself tells of, in order of place, until the first one that is damaged or
        cut off: how a log is recovered.

        Raises:
            StorageError: as `settle` does, or when the system cannot read.
        """
        self.flush()
        if segment not in self._segments:
            return ()
        try:
            return tuple(self._segments[segment].frames())
        except OSError as error:
            raise StorageError(f"Cannot read segment {segment} in {self.path}: {reason(error)}.") from error

    def close(self) -> None:
        """Close the files and remove the folder, once what is being written is done with. May be called twice.

        Raises:
            StorageError: when the system refused; what is left goes when the next cache is made beside it.
        """
        try:
            self._dispose()
        except OSError as error:
            raise StorageError(
                f"Cannot remove {self.path}: {reason(error)}. Remove it, or leave that to the next cache "
                "that is made beside it."
            ) from error

    def stats(self) -> StoreStats:
        """Bytes on disk now, and bytes written and read since the start."""
        with self._lock:
            disk_bytes = sum(segment.end for segment in self._segments.values())
        return StoreStats(disk_bytes=disk_bytes, bytes_written=self._moved.written, bytes_read=self._moved.read)

    def _check_usable(self) -> None:
        self._check_owner()
        if not self._dispose.alive:
            raise CacheClosedError("This cache is closed: make a new one.")

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise CacheForkedError("This cache was made before the process was forked: make a new one in the child.")

    def _segment(self, number: int) -> Segment:
        """The open file of a segment."""
        if number not in self._segments:
            name = segment_name(number)
            file = DataFile(self._folder.new_file(name, shim.UNBUFFERED * self.unbuffered), unbuffered=self.unbuffered)
            self._segments[number] = Segment(
                number, self.path / name, file, store_id=self._store_id, verify=self._options.verify
            )
        return self._segments[number]

    def _rescue(self, extent: Extent, record: memoryview) -> bool:
        return self._writes.rescue((extent.segment, extent.offset), record)


def _dispose(
    folder: RunFolder, segments: dict[int, Segment], writes: WriteBehind, scheduler: IOScheduler, owner: int
) -> None:
    """End what is being written, close the files and remove the folder, in the process that made them only."""
    if os.getpid() != owner:
        return
    with ExitStack() as steps:  # from the last to the first; the next one is done even if one fails
        steps.callback(scheduler.release)
        steps.callback(folder.remove)
        for segment in segments.values():
            steps.callback(shim.disk.close, segment.file.fd)
        segments.clear()
        steps.callback(writes.close)
