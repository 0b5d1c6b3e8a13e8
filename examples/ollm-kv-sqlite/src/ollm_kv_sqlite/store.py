"""A KV store in SQLite: one row per extent. Knows nothing of attention, nor of when it is read."""

import itertools
import os
import sqlite3
import threading
from contextlib import contextmanager

import torch
import xxhash

from ollm.plugin import CorruptDataError, DiskFullError, Extent, KVStore, LayerLayout, StorageError, StoreStats, unpack

_NAME = "store-extents.sqlite"
_PAGE = 2**16
_TABLE = """
CREATE TABLE extents (
    id INTEGER PRIMARY KEY, layer INTEGER, start INTEGER, tokens INTEGER, rows INTEGER, hash BLOB, payload BLOB
)
"""
_DAMAGED = {"SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_MISMATCH", "SQLITE_TOOBIG"}


class SQLiteStore(KVStore):
    """Keys and values as they are, with a hash that is checked on every read."""

    def __init__(self, folder, page_cache=2**20):
        self._folder = folder
        self._lock = threading.Lock()
        self._ids = itertools.count(1)  # never used twice, so that no extent equals a dropped one
        self._extents, self._layouts = {}, {}
        self._written = self._read = 0
        try:
            with self._sqlite("open"):
                os.close(folder.new_file(_NAME))  # private before SQLite opens it
                self._database = sqlite3.connect(folder.path / _NAME, check_same_thread=False)
                self._database.execute(f"PRAGMA page_size = {_PAGE}")
                self._database.execute(f"PRAGMA cache_size = {page_cache // _PAGE}")
                self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
                # the folder goes with the process, so nothing need survive a crash; a failed write is still undone
                self._database.execute("PRAGMA journal_mode = MEMORY")
                self._database.execute("PRAGMA synchronous = OFF")
                self._database.execute(_TABLE)
        except BaseException:
            folder.remove()
            raise

    def append(self, layer, keys, values):
        layout = LayerLayout.of(keys, values)
        payload = b"".join(
            tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() for tensor in (keys, values)
        )
        before = self.extents(layer)
        start = before[-1].stop if before else 0
        extent = Extent(layer, start, keys.shape[2], keys.shape[0], len(payload), offset=next(self._ids))
        with self._sqlite("write"), self._database:
            self._database.execute(
                "INSERT INTO extents VALUES (?, ?, ?, ?, ?, ?, ?)",
                (extent.offset, *_identity(extent), _hash(payload), payload),
            )
        self._written += len(payload)
        self._layouts[layer] = layout
        self._extents[layer] = (*before, extent)

    def extents(self, layer):
        return self._extents.get(layer, ())

    def decode(self, extent, raw, out):
        return unpack(self._layouts[extent.layer], extent, raw)

    def truncate(self, layer, length):
        self._extents[layer] = tuple(extent for extent in self.extents(layer) if extent.stop <= length)

    def read(self, extent):
        with self._sqlite("read"):
            row = self._database.execute("SELECT * FROM extents WHERE id = ?", (extent.offset,)).fetchone()
        if row is None:
            raise CorruptDataError(f"{extent} is not in {self._folder.path / _NAME}.")
        *identity, digest, payload = row[1:]
        if tuple(identity) != _identity(extent) or not isinstance(payload, bytes) or digest != _hash(payload):
            raise CorruptDataError(f"{extent} in {self._folder.path / _NAME} was damaged; start the generation again.")
        self._read += len(payload)
        return torch.frombuffer(bytearray(payload), dtype=torch.uint8)

    def release(self, extents):
        with self._sqlite("free"), self._database:
            self._database.executemany("DELETE FROM extents WHERE id = ?", [(extent.offset,) for extent in extents])

    def close(self):
        with self._sqlite("close"):
            self._database.close()
            self._folder.remove()

    def stats(self):
        with self._sqlite("look into"):
            (pages,) = self._database.execute("PRAGMA page_count").fetchone()
        return StoreStats(disk_bytes=pages * _PAGE, bytes_written=self._written, bytes_read=self._read)

    @contextmanager
    def _sqlite(self, action):
        """One thread at a time, and errors of SQLite and of the system as ollm's."""
        with self._lock:
            try:
                yield
            except (sqlite3.Error, OSError) as error:
                name = getattr(error, "sqlite_errorname", "")
                message = f"Cannot {action} {self._folder.path / _NAME}: {error}."
                if name == "SQLITE_FULL":
                    raise DiskFullError(f"{message} Free some space, or choose another cache_dir.") from error
                raise (CorruptDataError if name in _DAMAGED else StorageError)(message) from error


def _identity(extent):
    return extent.layer, extent.start, extent.tokens, extent.rows


def _hash(payload):
    return xxhash.xxh3_64_digest(payload)
