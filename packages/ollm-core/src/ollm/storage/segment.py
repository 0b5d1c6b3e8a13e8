"""`Segment`: one file of records, which bytes of it are taken, and the bytes checked on the way in and out.

Space behind the last record is free again. Knows places, not positions: which tokens are where is the block table's
business. Not thread-safe but for `write` and `read`: the storage's lock is held around every other call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import attrs

from ollm.contracts.blocks import Extent, Location
from ollm.contracts.storage import Pieces
from ollm.errors import CorruptDataError, StorageError
from ollm.io import shim
from ollm.io.buffers import ALIGNMENT, aligned_buffer, tensor_bytes
from ollm.io.files import DataFile
from ollm.storage.records import (
    check_header,
    check_payload,
    checksum,
    identity,
    is_header,
    make_header,
    record_span,
    run_span,
)
from ollm.storage.room import reason

Rescue = Callable[[Location, memoryview, int], bool]
"""Fills a part of a record, from that byte on, from memory if the disk does not have it; says whether it did."""


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


@attrs.define(eq=False)
class _Record:
    """What is known of the bytes of a place that is taken."""

    location: Location
    committed: int | None = None
    """What a manifest says that the checksum of the header is."""
    header: bytes | None = None
    """What stands in front of them, once it was given to the disk or read from there: a read compares it, for that
    takes less than to understand it. The zeros behind it are left out."""
    verified: bool = False
    """Whether all of the payload was read and had the right hashes."""


class Segment:
    """The file of one segment number."""

    def __init__(self, path: Path, file: DataFile, *, store_id: bytes, verify: str) -> None:
        self.file = file
        self.end = 0
        """Where the next record goes."""
        self._path = path
        self._store_id = store_id
        self._verify = verify
        self._records: dict[int, _Record] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no byte is taken."""
        return not self._records

    def is_free(self, start: int, stop: int) -> bool:
        """Whether none of these bytes is taken."""
        if start >= self.end:
            return True
        spans = (record_span(record.location) for record in self._records.values())
        return all(stop <= low or high <= start for low, high in spans)

    def take(self, location: Location, *, committed: int | None = None) -> None:
        """From now on there is a record."""
        self.end = max(self.end, record_span(location)[1])
        self._records[location.offset] = _Record(location, committed)

    def let_go(self, locations: Iterable[Location]) -> None:
        """Nobody reads these records any more; those that are not here are ignored. Cuts the file behind the last one:
        bytes there are never read, so that failing to do so only costs space."""
        for location in locations:
            self._records.pop(location.offset, None)
        self.end = max((record_span(record.location)[1] for record in self._records.values()), default=0)
        with suppress(OSError):
            shim.disk.truncate(self.file.fd, self.end)

    def checksum(self, extent: Extent) -> int:
        """That of the header of a record that is on the disk: stands for all that it holds.

        Raises:
            CorruptDataError, StorageError: as `read`, of the header.
        """
        record = self._record(extent)
        return checksum(self._known_header(extent, record)) if record.committed is None else record.committed

    def write(self, extent: Extent, record: memoryview) -> None:
        """Put the header in front of the payload that is in `record` already, and all of it on the disk.

        Raises:
            OSError: as the system says.
        """
        location = extent.location
        header = make_header(self._identity(extent), record[ALIGNMENT : ALIGNMENT + location.nbytes])
        record[:ALIGNMENT] = header.ljust(ALIGNMENT, b"\0")
        taken = self._records.get(location.offset)
        if taken is not None and taken.location is location:  # else it was freed meanwhile
            taken.header = header
        self.file.write(record, location.offset - ALIGNMENT)

    def read(self, extents: Sequence[Extent], view: memoryview, rescue: Rescue) -> None:
        """Fill `view` with the records of adjacent extents.

        Raises:
            CorruptDataError: when another, a damaged or an incomplete record lies there.
            StorageError: when the system cannot read.
        """
        known = [self._record(extent) for extent in extents]
        begin, _ = run_span(extents)
        spans = [record_span(extent.location) for extent in extents]
        records = [view[start - begin : stop - begin] for start, stop in spans]
        rescued = [rescue(extent.location, record, 0) for extent, record in zip(extents, records, strict=True)]
        if not any(rescued):
            self._fill(view, begin, extents[-1])
        for extent, record, (start, _), content, done in zip(extents, known, spans, records, rescued, strict=True):
            if any(rescued) and not done:
                self._fill(content, start, extent)
            self._check(extent, record, content)

    def read_pieces(self, pieces: Pieces, view: memoryview, rescue: Rescue) -> None:
        """Fill `view`, which is as long, rounded up to blocks of the disk, with some pieces of a block.

        Raises:
            CorruptDataError, StorageError: as `read`.
        """
        extent, offset = pieces.extent, pieces.extent.location.offset
        record = self._record(extent)
        if not rescue(extent.location, view, ALIGNMENT + pieces.start):
            self._known_header(extent, record)
            self._fill(view, offset + pieces.start, extent)
        content = view[: pieces.stop - pieces.start]
        self._trust(extent, lambda: self._compare_pieces(extent, record, content, pieces.start))

    def where(self, extent: Extent) -> str:
        """An extent, for messages."""
        return f"{str(extent).capitalize()}, in {self._path} at {extent.location.offset}"

    def _record(self, extent: Extent) -> _Record:
        record = self._records.get(extent.location.offset)
        if record is None or record.location != extent.location:
            raise CorruptDataError(f"{self.where(extent)} is not in this storage.")
        return record

    def _identity(self, extent: Extent) -> bytes:
        return identity(self._store_id, extent.key, extent.layout, extent.location)

    def _known_header(self, extent: Extent, record: _Record) -> bytes:
        """The header of a record; read, if it is of an earlier store and was not read since."""
        if record.header is None:
            block = tensor_bytes(aligned_buffer(ALIGNMENT))
            self._fill(block, extent.location.offset - ALIGNMENT, extent)
            self._check(extent, record, block, payload=False)
        assert record.header is not None
        return record.header

    def _fill(self, view: memoryview, offset: int, extent: Extent) -> None:
        try:
            self.file.read(view, offset)
        except EOFError as error:
            raise CorruptDataError(f"{self.where(extent)} is cut off: {error}.") from None
        except OSError as error:
            raise StorageError(f"Cannot read {self.where(extent)}: {reason(error)}.") from error

    def _check(self, extent: Extent, known: _Record, content: memoryview, *, payload: bool = True) -> None:
        """Compare a record with what was asked for, and its payload as `verify` says."""
        payload = payload and (self._verify == "always" or (self._verify == "first" and not known.verified))
        begins, block = self._identity(extent), content[:ALIGNMENT]

        def compare() -> None:
            header = known.header
            if header is None or not header.startswith(begins) or not is_header(block, header):
                found = check_header(block, begins)
                if header is not None or known.committed not in (None, checksum(found)):
                    raise CorruptDataError("the record was replaced by another one that looks like it")
                known.header = found
            if payload:
                assert known.header is not None
                check_payload(content[ALIGNMENT : ALIGNMENT + extent.location.nbytes], known.header)

        self._trust(extent, compare)
        known.verified = known.verified or payload

    def _compare_pieces(self, extent: Extent, record: _Record, content: memoryview, at: int) -> None:
        header = record.header or b""
        if not header.startswith(self._identity(extent)):
            raise CorruptDataError("another record lies here")
        if self._verify != "never":
            check_payload(content, header, at=at)

    def _trust(self, extent: Extent, compare: Callable[[], None]) -> None:
        try:
            compare()
        except CorruptDataError as error:
            raise CorruptDataError(
                f"{self.where(extent)} cannot be trusted: {error}. The disk or another program changed it; "
                "start the generation again."
            ) from None


def write_record(segment: Segment, extent: Extent, record: memoryview, moved: Moved) -> None:
    """What a worker does with a record."""
    segment.write(extent, record)
    moved.add(written=len(record))
