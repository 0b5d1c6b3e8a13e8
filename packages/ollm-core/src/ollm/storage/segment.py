"""`Segment`: one file of records, which of them are held, and their bytes checked on the way in and out.

Space behind the last held record is free again. Not thread-safe but for `write` and `read`: the storage's lock is held
around every other call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import attrs

from ollm.contracts.kv import Extent
from ollm.errors import CorruptDataError, StorageError
from ollm.io import shim
from ollm.io.buffers import ALIGNMENT, aligned_buffer, tensor_bytes
from ollm.io.files import DataFile
from ollm.storage.records import (
    HEADER_BYTES,
    RecordHeader,
    check_record,
    decode_header,
    encode_header,
    is_header,
    padded,
    payload_hash,
    record_span,
)
from ollm.storage.room import reason

Rescue = Callable[[Extent, memoryview], bool]
"""Fills a record from memory if the disk does not have it; says whether it did."""


class Moved:
    """Bytes read and written so far, by any thread."""

    def __init__(self) -> None:
        self.read = self.written = 0
        self._lock = threading.Lock()

    def add(self, *, read: int = 0, written: int = 0) -> None:
        """Count some more."""
        with self._lock:
            self.read += read
            self.written += written


@attrs.define
class _Held:
    """A record that somebody may still read."""

    written: Extent
    dtype: str
    header: bytes | None = None
    """What stands in front of it, once it was given to the disk: a read compares it, for that takes less than to
    understand it. The zeros behind it are left out."""
    verified: bool = False

    def is_of(self, extent: Extent) -> bool:
        """Whether this is its record, or it a trimmed part of it."""
        return extent == self.written or (
            extent.tokens <= self.written.tokens
            and attrs.evolve(extent, tokens=self.written.tokens) == self.written
        )  # fmt: skip


class Segment:
    """The file of one segment number."""

    def __init__(self, number: int, path: Path, file: DataFile, *, store_id: bytes, verify: str) -> None:
        self.file = file
        self._number = number
        self.end = 0
        """Where the next record goes."""
        self._path = path
        self._store_id = store_id
        self._verify = verify
        self._held: dict[int, _Held] = {}

    def is_free(self, start: int, stop: int) -> bool:
        """Whether no record that is held has any of these bytes."""
        if start >= self.end:
            return True
        spans = (record_span(held.written) for held in self._held.values())
        return all(stop <= low or high <= start for low, high in spans)

    def hold(self, extent: Extent, dtype: str) -> None:
        """From now on there is this record."""
        self.end = max(self.end, record_span(extent)[1])
        self._held[extent.offset] = _Held(extent, dtype)

    def let_go(self, extents: Iterable[Extent]) -> None:
        """Nobody reads these records any more; those that are not held are ignored. Cuts the file to what is held:
        bytes behind it are never read, so that failing to do so only costs space."""
        for extent in extents:
            self._held.pop(extent.offset, None)
        self.end = max((record_span(held.written)[1] for held in self._held.values()), default=0)
        with suppress(OSError):
            shim.disk.truncate(self.file.fd, self.end)

    def write(self, extent: Extent, dtype: str, record: memoryview) -> None:
        """Put the header in front of the payload that is in `record` already, and all of it on the disk.

        Raises:
            OSError: as the system says.
        """
        digest = payload_hash(record[ALIGNMENT : ALIGNMENT + extent.nbytes])
        header = record[:ALIGNMENT] = encode_header(self._header(extent, dtype), digest)
        held = self._held.get(extent.offset)
        if held is not None and held.written == extent:  # else it was released meanwhile
            held.header = header[:HEADER_BYTES]
        self.file.write(record, extent.offset - ALIGNMENT)

    def read(self, extents: Sequence[Extent], view: memoryview, rescue: Rescue) -> None:
        """Fill `view` with the records of adjacent extents.

        Raises:
            CorruptDataError: when another, a damaged or an incomplete record lies there.
            StorageError: when the system cannot read.
        """
        held = [self._held.get(extent.offset) for extent in extents]
        for extent, known in zip(extents, held, strict=True):
            if known is None or not known.is_of(extent):
                raise CorruptDataError(f"{self.where(extent)} is not in this storage.")
        begin = record_span(extents[0])[0]
        records = [view[start - begin : stop - begin] for start, stop in map(record_span, extents)]
        rescued = [rescue(extent, record) for extent, record in zip(extents, records, strict=True)]
        if not any(rescued):
            self._fill(view, begin, extents[-1])
        for extent, known, record, done in zip(extents, held, records, rescued, strict=True):
            assert known is not None
            if any(rescued) and not done:
                self._fill(record, record_span(extent)[0], extent)
            self._check(extent, known, record)

    def frames(self) -> Iterator[Extent]:
        """The records that the file itself tells of, from its beginning, until one that is damaged, cut off or of
        another cache. Knows nothing of which of them are held."""
        offset = 0
        while True:
            block = tensor_bytes(aligned_buffer(ALIGNMENT))
            try:
                self.file.read(block, offset)
                header, _ = decode_header(block)
                whole = tensor_bytes(aligned_buffer(ALIGNMENT + padded(header.payload_bytes)))
                self.file.read(whole, offset)
                check_record(whole, attrs.evolve(header, store_id=self._store_id), payload=True)
            except (EOFError, CorruptDataError):
                return
            yield Extent(
                header.layer, header.start, header.tokens, header.rows, header.payload_bytes,
                self._number, offset + ALIGNMENT,
            )  # fmt: skip
            offset += len(whole)

    def where(self, extent: Extent) -> str:
        """An extent, for messages."""
        return f"Layer {extent.layer}, tokens {extent.start}..{extent.stop}, in {self._path} at {extent.offset}"

    def _fill(self, view: memoryview, offset: int, extent: Extent) -> None:
        try:
            self.file.read(view, offset)
        except EOFError as error:
            raise CorruptDataError(f"{self.where(extent)} is cut off: {error}.") from None
        except OSError as error:
            raise StorageError(f"Cannot read {self.where(extent)}: {reason(error)}.") from error

    def _check(self, extent: Extent, held: _Held, record: memoryview) -> None:
        """Compare a record with what was asked for, and its payload as `verify` says."""
        payload = self._verify == "always" or (self._verify == "first" and not held.verified)
        as_written = held.header is not None and is_header(record, held.header)
        if as_written and not payload:
            return
        try:
            check_record(record, self._header(held.written, held.dtype), payload=payload)
            if held.header is not None and not as_written:
                raise CorruptDataError("the record was replaced by another one that looks like it")
        except CorruptDataError as error:
            raise CorruptDataError(
                f"{self.where(extent)} cannot be trusted: {error}. The disk or another program changed it; "
                "start the generation again."
            ) from None
        held.verified = held.verified or payload

    def _header(self, extent: Extent, dtype: str) -> RecordHeader:
        return RecordHeader(
            store_id=self._store_id, dtype=dtype, layer=extent.layer, start=extent.start, tokens=extent.tokens,
            rows=extent.rows, payload_bytes=extent.nbytes,
        )  # fmt: skip


def write_record(segment: Segment, extent: Extent, dtype: str, record: memoryview, moved: Moved) -> None:
    """What a worker does with a record."""
    segment.write(extent, dtype, record)
    moved.add(written=len(record))
