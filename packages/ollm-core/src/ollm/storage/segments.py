"""`SegmentedStorage`: numbered files that hold records, and every promise of the format kept in one place.

A store decides which segment a record goes to and keeps the extents that it gets back; everything about bytes, headers,
hashes, room on the disk and cleaning up is here. Live bytes are never overwritten: a record goes behind the last
extent that is still held, and an extent is held until it is released.
"""

from __future__ import annotations

import os
import secrets
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ollm.contracts.kv import Extent, StoreStats
from ollm.errors import (
    CacheClosedError,
    CacheForkedError,
    ConfigurationError,
    CorruptDataError,
    StorageError,
)
from ollm.storage import shim
from ollm.storage.folder import MANIFEST, MANIFEST_TEMPORARY, RunFolder, segment_name
from ollm.storage.manifest import Manifest
from ollm.storage.options import StorageOptions
from ollm.storage.records import (
    ALIGNMENT,
    STORE_ID_BYTES,
    RecordHeader,
    check_header,
    encode_header,
    padded,
    payload_hash,
)
from ollm.storage.room import check_room, failed_write, reason
from ollm.storage.tensors import tensor_bytes

_MOST_SEGMENTS = 10**6


class _Segment:
    """One file: its descriptor, and the ends of the records in it that are held, by offset."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.held: dict[int, int] = {}
        self.end = 0

    def hold(self, offset: int, end: int) -> None:
        self.held[offset] = self.end = end

    def let_go(self, offset: int) -> bool:
        """Whether a record was held at `offset`; it no longer is."""
        known = self.held.pop(offset, None) is not None
        self.end = max(self.held.values(), default=0)
        return known


class SegmentedStorage:
    """Records in numbered files of one private folder. Thread-safe for one writer and any number of readers."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        strategy: str,
        options: StorageOptions | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        """Start empty in `folder` and write the manifest.

        Args:
            folder: this cache's own, just made.
            strategy: the name that the manifest states.
            options: verification and limits.
            parameters: the strategy's own parameters, as JSON, for the manifest.
        """
        self._options = options or StorageOptions()
        self._folder = folder
        self._store_id = secrets.token_bytes(STORE_ID_BYTES)
        self._segments: dict[int, _Segment] = {}
        self._dtypes: dict[tuple[int, int], str] = {}
        self._verified: set[tuple[int, int]] = set()
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._bytes_written = 0
        self._bytes_read = 0
        # also at interpreter exit, and when the user just drops the cache
        self._dispose = weakref.finalize(self, _dispose, folder, self._segments, self._owner)
        self._write_manifest(
            Manifest(
                lifecycle="runtime-scoped",
                store_id=self._store_id.hex(),
                strategy=strategy,
                parameters=dict(parameters or {}),
            )
        )

    @property
    def path(self) -> Path:
        """The private folder."""
        return self._folder.path

    def write(
        self,
        payload: Sequence[memoryview],
        *,
        segment: int,
        layer: int,
        start: int,
        tokens: int,
        rows: int,
        dtype: str,
    ) -> Extent:
        """Append one record to a segment, which is made if it is new. All or nothing.

        Args:
            payload: flat byte buffers, written one after the other.
            segment: number of the file, from 0.
            layer, start, tokens, rows: what the record is, checked again on every read.
            dtype: a name of the format's dtypes, or `opaque` for an encoding of the store's own.

        Raises:
            DiskFullError: no room; the message names the bytes needed and free. Nothing was added.
            StorageError: the system refused. Nothing was added.
        """
        self._check_usable()
        if not 0 <= segment < _MOST_SEGMENTS:
            raise ConfigurationError(f"segment={segment} is out of range: 0 … {_MOST_SEGMENTS - 1}.")
        payload = list(payload)
        length = sum(len(buffer) for buffer in payload)
        size = ALIGNMENT + padded(length)
        header = RecordHeader(
            store_id=self._store_id, dtype=dtype, layer=layer, start=start, tokens=tokens, rows=rows,
            payload_bytes=length,
        )  # fmt: skip
        block = encode_header(header, payload_hash(payload))
        record = [memoryview(block), *payload, memoryview(bytes(size - ALIGNMENT - length))]
        with self._lock:
            check_room(self.path, size, sum(segment.end for segment in self._segments.values()), self._options)
            try:
                target = self._segment(segment)
                at = target.end
                try:
                    shim.write_all(target.fd, record, at)
                except BaseException:
                    self._cut(target)
                    raise
            except OSError as error:
                raise failed_write(error, self.path, size) from error
            target.hold(at, at + size)
            self._dtypes[segment, at + ALIGNMENT] = dtype
            self._bytes_written += size
        return Extent(layer, start, tokens, rows, length, segment, at + ALIGNMENT)

    def read(self, extent: Extent) -> Tensor:
        """The payload of an extent as a uint8 tensor on the host, checked as the `verify` option says.

        Raises:
            CorruptDataError: when another, a damaged or an incomplete record lies there.
            StorageError: when the system cannot read.
        """
        self._check_usable()
        place = (extent.segment, extent.offset)
        with self._lock:
            segment, dtype = self._segments.get(extent.segment), self._dtypes.get(place)
        if segment is None or dtype is None:
            raise CorruptDataError(f"{self._where(extent)} is not in this storage.")
        raw = torch.empty(ALIGNMENT + extent.nbytes, dtype=torch.uint8)
        buffer = tensor_bytes(raw)
        try:
            shim.read_exactly(segment.fd, buffer, extent.offset - ALIGNMENT)
        except EOFError as error:
            raise CorruptDataError(f"{self._where(extent)} is cut off: {error}.") from None
        except OSError as error:
            raise StorageError(f"Cannot read {self._where(extent)}: {reason(error)}.") from error
        with self._lock:
            self._bytes_read += len(buffer)
        self._verify(extent, dtype, buffer)
        return raw[ALIGNMENT:]

    def release(self, extents: Sequence[Extent]) -> None:
        """Give up the bytes of these extents: later records may take their place."""
        self._check_owner()
        with self._lock:
            for extent in extents:
                segment = self._segments.get(extent.segment)
                if segment is not None and segment.let_go(extent.offset - ALIGNMENT):
                    self._dtypes.pop((extent.segment, extent.offset), None)
                    self._verified.discard((extent.segment, extent.offset))
            for number in {extent.segment for extent in extents} & set(self._segments):
                self._cut(self._segments[number])

    def close(self) -> None:
        """Close the files and remove the folder. May be called twice.

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
        return StoreStats(disk_bytes=disk_bytes, bytes_written=self._bytes_written, bytes_read=self._bytes_read)

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise CacheForkedError("This cache was made before the process was forked: make a new one in the child.")

    def _check_usable(self) -> None:
        self._check_owner()
        if not self._dispose.alive:
            raise CacheClosedError("This cache is closed: make a new one.")

    def _segment(self, number: int) -> _Segment:
        """The open file of a segment."""
        if number not in self._segments:
            self._segments[number] = _Segment(self._folder.new_file(segment_name(number)))
        return self._segments[number]

    def _cut(self, segment: _Segment) -> None:
        """Cut a file to what is held. Bytes behind it are never read, so that failing to do so only costs space."""
        with suppress(OSError):
            shim.disk.truncate(segment.fd, segment.end)

    def _verify(self, extent: Extent, dtype: str, buffer: memoryview) -> None:
        asked = RecordHeader(
            store_id=self._store_id, dtype=dtype, layer=extent.layer, start=extent.start, tokens=extent.tokens,
            rows=extent.rows, payload_bytes=extent.nbytes,
        )  # fmt: skip
        place = (extent.segment, extent.offset)
        try:
            digest = check_header(buffer[:ALIGNMENT], asked)
            mode = self._options.verify
            if mode == "never" or (mode == "first" and place in self._verified):
                return
            if payload_hash([buffer[ALIGNMENT:]]) != digest:
                raise CorruptDataError("the payload does not match its hash")
        except CorruptDataError as error:
            raise CorruptDataError(
                f"{self._where(extent)} cannot be trusted: {error}. The disk or another program changed it; "
                "start the generation again."
            ) from None
        self._verified.add(place)

    def _where(self, extent: Extent) -> str:
        return (
            f"Layer {extent.layer}, tokens {extent.start}..{extent.stop}, "
            f"in {self.path / segment_name(max(extent.segment, 0))} at {extent.offset}"
        )

    def _write_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest in one step: readers see the old one or the new one."""
        try:
            try:
                fd = self._folder.new_file(MANIFEST_TEMPORARY)
                try:
                    shim.write_all(fd, [memoryview(manifest.to_json())], 0)
                finally:
                    shim.disk.close(fd)
                shim.disk.replace(self.path / MANIFEST_TEMPORARY, self.path / MANIFEST)
            except OSError as error:
                raise failed_write(error, self.path, ALIGNMENT) from error
        except BaseException:
            self.close()
            raise


def _dispose(folder: RunFolder, segments: dict[int, _Segment], owner: int) -> None:
    """Close the files and remove the folder, in the process that made them only."""
    if os.getpid() != owner:
        return
    with ExitStack() as steps:  # the next one is done even if one fails
        steps.callback(folder.remove)
        for segment in segments.values():
            steps.callback(shim.disk.close, segment.fd)
        segments.clear()
