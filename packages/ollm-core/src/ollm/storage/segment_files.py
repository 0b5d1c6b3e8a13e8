"""`SegmentFiles`: the files of records of one folder that are open, by number, and what all of them take together.

Knows how they are opened, gone on with, synced and closed, and holds the lock under which their places are taken. What
is in one is `Segment`'s business; which of them a record goes to is the store's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

from ollm.contracts.blocks import Extent, Location
from ollm.errors import ConfigurationError, CorruptDataError, StorageError
from ollm.io import shim
from ollm.io.buffers import ALIGNMENT
from ollm.io.files import DataFile
from ollm.storage.folder import CacheFolder, segment_name
from ollm.storage.records import record_span
from ollm.storage.room import reason
from ollm.storage.segment import Segment


class SegmentFiles:
    """Opened when they are first needed. Thread-safe for one writer and any number of readers."""

    def __init__(self, folder: CacheFolder, *, store_id: str, verify: str, unbuffered: bool) -> None:
        """None is open yet; arguments as of `Segment`, and whether to leave the page cache out."""
        self.unbuffered = unbuffered
        self._folder = folder
        self._store_id = bytes.fromhex(store_id)
        self._verify = verify
        self._open: dict[int, Segment] = {}
        self._lock = threading.Lock()
        self._unsynced = False  # whether an fsync failed

    @property
    def disk_bytes(self) -> int:
        """Bytes of all of them, up to the last record of each. Asks for no lock, which a forked child may never get."""
        return sum(segment.end for segment in list(self._open.values()))

    def end(self, number: int) -> int:
        """Where the next record goes."""
        return self._open[number].end if number in self._open else 0

    def holds(self, number: int) -> bool:
        """Whether any record is in it."""
        return number in self._open and not self._open[number].is_empty

    def get(self, number: int, *, make: bool = True) -> Segment:
        """A file, opened; made, if it is not there and `make` says so.

        Raises:
            ConfigurationError: there can be none of that number.
            OSError: as the system says.
        """
        if number not in self._open:
            name = segment_name(number)
            fd = self._folder.open_file(name, shim.UNBUFFERED * self.unbuffered, make=make)
            file = DataFile(fd, unbuffered=self.unbuffered)
            segment = Segment(self._folder.path / name, file, store_id=self._store_id, verify=self._verify)
            with self._lock:
                self._open[number] = segment
        return self._open[number]

    def of(self, extent: Extent) -> Segment:
        """The file that holds an extent.

        Raises:
            CorruptDataError: there is none.
        """
        with self._lock:
            segment = self._open.get(extent.location.segment)
        if segment is None:
            raise CorruptDataError(f"There is no segment {extent.location.segment} in {self._folder.path}.")
        return segment

    def take(self, location: Location) -> None:
        """From now on there is a record in a file that is open."""
        with self._lock:
            self._open[location.segment].take(location)

    def let_go(self, locations: Iterable[Location]) -> None:
        """Nobody reads these any more; those in files that are not open are ignored."""
        by_segment = _by_segment(locations)
        with self._lock:
            for number in by_segment.keys() & self._open.keys():
                self._open[number].let_go(by_segment[number])

    def adopt(self, locations: Iterable[Location], checksums: Mapping[Location, int]) -> None:
        """Begin with these records, which are there already: what is not theirs is removed. All or nothing, but for
        what nobody needs.

        Raises:
            CorruptDataError: they cannot be where they are said to be.
            StorageError: the system refused.
        """
        by_segment = _by_segment(locations)
        try:
            with ExitStack() as undo:
                undo.callback(self.close)
                for number, places in by_segment.items():
                    self._check_places(number, places)
                self._folder.remove_segments(keep=by_segment)
                undo.pop_all()
        except OSError as error:
            raise StorageError(f"Cannot remove what is not used of {self._folder.path}: {reason(error)}.") from error
        with self._lock:
            for number, places in by_segment.items():
                for location in places:
                    self._open[number].take(location, committed=checksums.get(location))
                self._open[number].let_go(())

    def sync(self) -> None:
        """Wait until the files are on the medium. Never again after the system refused: what it could not write then it
        may have forgotten, and the next call would not tell.

        Raises:
            StorageError: it refused earlier.
            OSError: it refuses now.
        """
        if self._unsynced:
            raise StorageError(
                f"An earlier fsync in {self._folder.path} failed, so nothing more is committed durably there."
            )
        try:
            for segment in self._open.values():
                shim.disk.fsync(segment.file.fd)
        except OSError:
            self._unsynced = True
            raise

    def close(self) -> None:
        """Close all of them. May be called twice.

        Raises:
            OSError: as the system says; the others are closed all the same.
        """
        with ExitStack() as steps:
            while self._open:
                _, segment = self._open.popitem()
                steps.callback(shim.disk.close, segment.file.fd)

    def _check_places(self, number: int, locations: Sequence[Location]) -> None:
        """Whether records can be where they are said to be in a file that is there."""
        where = f"segment {number} in {self._folder.path}"
        try:
            size = shim.disk.fstat(self.get(number, make=False).file.fd).st_size
        except (FileNotFoundError, ConfigurationError):
            raise CorruptDataError(f"There is no {where}.") from None
        except OSError as error:
            raise StorageError(f"Cannot open {where}: {reason(error)}.") from error
        end = 0
        for location in sorted(locations, key=lambda location: location.offset):
            begin, stop = record_span(location)
            if begin % ALIGNMENT or location.nbytes < 0 or not end <= begin < stop <= size:
                raise CorruptDataError(f"Records of {where} overlap or end behind the file.")
            end = stop


def _by_segment(locations: Iterable[Location]) -> dict[int, list[Location]]:
    found: dict[int, list[Location]] = {}
    for location in locations:
        found.setdefault(location.segment, []).append(location)
    return found
