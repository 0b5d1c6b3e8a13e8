"""`SegmentedStorage`: numbered files that hold records, and every promise of the format kept in one place.

A store decides which file a record goes to; everything about bytes, headers, hashes, room on the disk and cleaning up
is here and below. Live bytes are never overwritten: a record goes where nothing is taken, and a place is taken until it
is freed. Records are written in the background.
"""

from __future__ import annotations

import functools
import os
import secrets
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

import attrs
from torch import Tensor

from ollm.contracts.blocks import BlockKey, Extent, KVBlock, Location, StoreStats
from ollm.contracts.storage import Pieces, Storage
from ollm.endings import end
from ollm.errors import (
    CacheClosedError,
    ConfigurationError,
    CorruptDataError,
    StorageError,
    StoreContractError,
)
from ollm.io.buffers import ALIGNMENT, tensor_bytes
from ollm.io.files import takes_unbuffered
from ollm.io.scheduler import IOScheduler, check_process, scheduler_of
from ollm.storage.folder import MANIFEST, CacheFolder
from ollm.storage.kept import KeptLayer, extents_of
from ollm.storage.manifest import MAX_MANIFEST_BYTES, Manifest
from ollm.storage.options import WRITE_BUFFERS, StorageOptions
from ollm.storage.records import (
    DTYPE_CODES,
    STORE_ID_BYTES,
    padded,
    piece_bytes,
    record_bytes,
    run_span,
)
from ollm.storage.room import check_room, failed_write, reason
from ollm.storage.segment import Moved, write_record
from ollm.storage.segment_files import SegmentFiles
from ollm.storage.tensors import lay_out, pack
from ollm.storage.write_behind import WriteBehind


class SegmentedStorage(Storage):
    """Records in numbered files of one private folder. Thread-safe for one writer and any number of readers."""

    def __init__(
        self,
        folder: CacheFolder,
        *,
        strategy: str,
        options: StorageOptions | None = None,
        parameters: Mapping[str, Any] | None = None,
        write_buffers: int = WRITE_BUFFERS,
        compact_from: int = 1,
        pinned: bool = False,
    ) -> None:
        """Start empty in a new folder and write the manifest; in one that was kept, read it: then `committed` has what
        it lists, and `adopt` must be called.

        Args:
            folder: this cache's own.
            strategy: the name that the manifest states.
            options: verification and limits.
            parameters: those of the strategy's options that decide what is in the files, for the manifest; see
                `format_parameters`.
            write_buffers: how many records of up to 8 MiB may wait to be written; then `write` waits.
            compact_from: how many rows of a layer the table of a manifest has before those that are contiguous become
                one.
            pinned: whether payloads come from a CUDA device.

        Raises:
            CorruptDataError: the folder's manifest is not what was committed, or is of another strategy.
            StorageError: the system refused; a new folder is removed again.
        """
        if sys.byteorder != "little":
            raise StorageError("Payloads are little-endian and this machine is not: use cache_strategy='resident'.")
        self._options = options or StorageOptions()
        self._folder = folder
        self.path = folder.path
        self._compact_from = compact_from
        self._owner = os.getpid()
        self._moved = Moved()
        self._compactions = 0
        self._closed = False
        self._begun = False  # whether anything was adopted or written
        new = Manifest(
            lifecycle="persistent" if folder.kept else "runtime-scoped", strategy=strategy,
            store_id=secrets.token_bytes(STORE_ID_BYTES).hex(), parameters=dict(parameters or {}),
        )  # fmt: skip
        try:
            with ExitStack() as undo:
                undo.callback(folder.give_up)
                self._scheduler = scheduler_of(folder.path)
                undo.callback(self._scheduler.release)
                self._writes = WriteBehind(
                    self._scheduler, lambda error, nbytes: failed_write(error, folder.path, nbytes),
                    count=write_buffers, pinned=pinned,
                )  # fmt: skip
                undo.callback(self._writes.close)
                if folder.is_new:
                    folder.replace_manifest(new.to_json(), durable=False)
                self._manifest = new if folder.is_new else _kept_manifest(folder, new)
                self.unbuffered = takes_unbuffered(self.path / MANIFEST)
                self._files = SegmentFiles(
                    folder, store_id=self._manifest.store_id, verify=self._options.verify, unbuffered=self.unbuffered
                )
                # also at interpreter exit, and when the user just drops the cache
                self._dispose = weakref.finalize(
                    self, _dispose, folder, self._files, self._writes, self._scheduler, self._owner
                )
                undo.pop_all()
        except OSError as error:
            raise failed_write(error, self.path, ALIGNMENT) from error

    @property
    def committed(self) -> tuple[KeptLayer, ...]:
        """What the last commit listed."""
        return self._manifest.layers

    @property
    def buffer_bytes(self) -> int:
        return self._writes.nbytes

    def record_bytes(self, payload_bytes: int) -> int:
        return record_bytes(payload_bytes)

    def submit(self, action: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._scheduler.submit(action, *arguments)

    def write(
        self,
        block: KVBlock,
        key: BlockKey,
        *,
        segment: int,
        at: int | None = None,
        encoded: Sequence[Tensor] | None = None,
    ) -> Location:
        self.raise_failed()
        if not self._begun and not self._folder.is_new:
            raise StoreContractError(
                f"{self.path} holds records: adopt those that are to stay before anything is written."
            )
        self._begun = True
        layout = block.layout
        if layout.dtype_name not in DTYPE_CODES:
            raise StorageError(
                f"Keys and values of {layout.dtype} cannot be stored; the format has {', '.join(DTYPE_CODES)}."
            )
        length = layout.nbytes(key.rows, key.tokens) if encoded is None else sum(part.nbytes for part in encoded)
        size = record_bytes(length)
        end = self._files.end(segment)
        begin = end if at is None else at
        check_room(self.path, size, self._files.disk_bytes, max(begin + size - end, 0), self._options)
        try:
            target = self._files.get(segment)
        except OSError as error:
            raise failed_write(error, self.path, size) from error
        if begin % ALIGNMENT or begin < 0 or not target.is_free(begin, begin + size):
            raise StoreContractError(f"at={begin}: {size} bytes from there are not free in segment {segment}.")
        location = Location(length, segment, begin + ALIGNMENT, encoded is not None)
        buffer = self._writes.buffer(size)
        try:
            payload = buffer[ALIGNMENT : ALIGNMENT + length]
            pack(block, payload) if encoded is None else lay_out(encoded, payload)
            buffer[ALIGNMENT + length : size] = 0
            self._files.take(location)
            # refers to no more than it needs: a cache that is dropped while it writes must not be kept alive by that
            job = functools.partial(
                write_record, target, Extent.of(key, layout, location), tensor_bytes(buffer)[:size], self._moved
            )
            self._writes.submit(location, buffer, size, job)
            return location
        except BaseException:
            self._writes.give_up(location, buffer)
            self._files.let_go([location])
            raise

    def raise_failed(self) -> None:
        self._check_usable()
        self._writes.raise_failed()

    def flush(self) -> None:
        self._check_usable()
        self._writes.flush()

    def commit(self, layers: Iterable[KeptLayer], *, durable: bool = False) -> None:
        """Write the table down, in one step: a store over this folder can go on from here, whatever happens later, as
        long as none of these records is freed. Whoever frees one commits without it first.

        Args:
            layers: all that is to be found again, in order.
            durable: whether all of it must be on the disk, not only on its way there, before this returns.

        Raises:
            CorruptDataError: what is to be written down could not be read back: no such table can be.
            StorageError: the disk refused; the last commit still stands, or, where the last step failed, this one.
        """
        self.flush()
        table = tuple(layers)
        checksums = {extent.location: self._files.of(extent).checksum(extent) for extent in extents_of(table)}
        manifest = attrs.evolve(self._manifest, layers=table, checksums=checksums)
        raw = manifest.to_json(compact_from=self._compact_from)
        try:
            if durable:
                self._files.sync()
            self._folder.replace_manifest(raw, durable=durable)
        except OSError as error:
            raise failed_write(error, self.path, len(raw)) from error
        self._manifest = manifest
        self._compactions = manifest.compactions(compact_from=self._compact_from)

    def adopt(self, extents: Sequence[Extent]) -> None:
        self._check_usable()
        if self._begun:
            raise StoreContractError(
                f"{self.path} is in use already: adopt what is to stay once, before anything else."
            )
        self._files.adopt([extent.location for extent in extents], self._manifest.checksums)
        self._begun = True

    def read(self, extents: Sequence[Extent], buffer: Tensor) -> list[Tensor]:
        begin, end = run_span(extents)
        view = _room(buffer, end - begin)
        self._check_usable()
        self._files.of(extents[0]).read(extents, view, self._writes.rescue)
        self._moved.add(read=end - begin)
        return [
            buffer[location.offset - begin : location.offset - begin + location.nbytes]
            for location in (extent.location for extent in extents)
        ]

    def pieces(self, extent: Extent, start: int, stop: int) -> Pieces:
        size = piece_bytes(extent.location.nbytes)
        return Pieces(extent, start // size * size, min(-(-stop // size) * size, extent.location.nbytes))

    def read_pieces(self, pieces: Pieces, buffer: Tensor) -> Tensor:
        length = pieces.stop - pieces.start
        view = _room(buffer, padded(length))
        self._check_usable()
        self._files.of(pieces.extent).read_pieces(pieces, view, self._writes.rescue)
        self._moved.add(read=length)
        return buffer[:length]

    def free(self, locations: Sequence[Location]) -> None:
        self._check_owner()
        for location in locations:
            self._writes.forget(location)
        self._files.let_go(locations)

    def holds(self, segment: int) -> bool:
        return self._files.holds(segment)

    def close(self) -> None:
        self._closed = True
        try:
            end(self._dispose)
        except OSError as error:
            raise StorageError(
                f"Cannot remove {self.path}: {reason(error)}. Remove it, or leave that to the next cache "
                "that is made beside it."
            ) from error

    def stats(self) -> StoreStats:
        return StoreStats(
            disk_bytes=self._files.disk_bytes,
            bytes_written=self._moved.written,
            bytes_read=self._moved.read,
            compactions=self._compactions,
        )

    def _check_usable(self) -> None:
        self._check_owner()
        if self._closed:
            raise CacheClosedError("This cache is closed: make a new one.")

    def _check_owner(self) -> None:
        check_process(self._owner)


def _room(buffer: Tensor, nbytes: int) -> memoryview:
    """The first bytes of a buffer."""
    if buffer.numel() < nbytes:
        raise ConfigurationError(f"A buffer of {buffer.numel()} bytes does not take the {nbytes} that are to be read.")
    return tensor_bytes(buffer)[:nbytes]


def _kept_manifest(folder: CacheFolder, new: Manifest) -> Manifest:
    """The manifest that is there, if a store that would write the new one can go on from it."""
    try:
        found = Manifest.from_json(folder.read_manifest(MAX_MANIFEST_BYTES + 1))
    except (CorruptDataError, EOFError, FileNotFoundError) as error:
        raise CorruptDataError(f"{folder.path} cannot be gone on with: {error}.") from error
    new = Manifest.from_json(new.to_json())  # as it would come back: JSON has no tuples
    for name in ("strategy", "parameters", "lifecycle"):
        theirs, ours = getattr(found, name), getattr(new, name)
        if theirs != ours:
            raise CorruptDataError(f"{folder.path} was written with {name}={theirs!r}, not {ours!r}.")
    return found


def _dispose(folder: CacheFolder, files: SegmentFiles, writes: WriteBehind, scheduler: IOScheduler, owner: int) -> None:
    """End what is being written, close the files and the folder, in the process that made them only. May be called
    until it has succeeded, and afterwards."""
    if os.getpid() != owner:
        return
    with ExitStack() as steps:  # from the last to the first; the next one is done even if one fails
        steps.callback(scheduler.release)
        steps.callback(folder.close)
        steps.callback(_end_writing, files, writes)


def _end_writing(files: SegmentFiles, writes: WriteBehind) -> None:
    """Close the files, but not while somebody still writes there: other files may get their numbers."""
    writes.close()
    files.close()
