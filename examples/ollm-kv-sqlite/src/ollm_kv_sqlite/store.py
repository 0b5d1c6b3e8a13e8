"""A KV store in SQLite: one row per block. Knows nothing of attention, nor of which tokens are where."""

import os
import sqlite3
import threading
from contextlib import contextmanager

import torch
import xxhash

from ollm.plugin import CorruptDataError, DiskFullError, KVStore, Location, StorageError, StoreStats, pack, unpack

_NAME = "store-blocks.sqlite"
_PAGE = 2**16
_TABLE = "CREATE TABLE IF NOT EXISTS blocks (id INTEGER PRIMARY KEY, what TEXT, hash BLOB, payload BLOB)"
_DAMAGED = {"SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_MISMATCH", "SQLITE_TOOBIG"}


class SQLiteStore(KVStore):
    """Keys and values as they are, with a hash that is checked on every read. A block's location is its row's id."""

    def __init__(self, folder, page_cache=2**20):
        self._folder = folder
        self._lock = threading.Lock()
        self._written = self._read = 0
        try:
            with self._sqlite("open"):
                os.close(folder.open_file(_NAME))  # private before SQLite opens it
                self._database = sqlite3.connect(folder.path / _NAME, check_same_thread=False)
                self._database.execute(f"PRAGMA page_size = {_PAGE}")
                self._database.execute(f"PRAGMA cache_size = {page_cache // _PAGE}")
                self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
                # a write that fails is undone; a file that a crash left half written is found to be damaged
                self._database.execute("PRAGMA journal_mode = MEMORY")
                self._database.execute("PRAGMA synchronous = OFF")
                self._database.execute(_TABLE)
                self._is_open = True
        except BaseException:
            folder.close()
            raise

    def write(self, block, key):
        payload = pack(block).cpu().numpy().tobytes()
        row = (_what(key, block.layout), xxhash.xxh3_64_digest(payload), payload)
        with self._sqlite("write"), self._database:
            number = self._database.execute("INSERT INTO blocks (what, hash, payload) VALUES (?, ?, ?)", row).lastrowid
        self._written += len(payload)
        return Location(len(payload), offset=number)

    def read(self, extent):
        with self._sqlite("read"):
            found = self._database.execute("SELECT * FROM blocks WHERE id = ?", (extent.location.offset,)).fetchone()
        _, what, digest, payload = found or (None,) * 4
        if (
            what != _what(extent.key, extent.layout)
            or not isinstance(payload, bytes)
            or (len(payload), digest) != (extent.location.nbytes, xxhash.xxh3_64_digest(payload))
        ):
            raise CorruptDataError(f"{extent} in {self._folder.path / _NAME} was damaged; start the generation again.")
        self._read += len(payload)
        return torch.frombuffer(bytearray(payload), dtype=torch.uint8)

    def decode(self, extent, raw, out):
        return unpack(extent, raw)

    def free(self, locations):
        with self._sqlite("free"), self._database:
            self._delete(location.offset for location in locations)

    def adopt(self, extents):
        kept = {extent.location.offset for extent in extents}
        with self._sqlite("go on with"), self._database:
            self._delete(number for (number,) in self._database.execute("SELECT id FROM blocks") if number not in kept)

    def close(self):
        with self._sqlite("close"):
            self._is_open = False
            try:
                self._database.close()
            finally:  # else nobody else could use it
                self._folder.close()

    def stats(self):
        pages = 0
        with self._sqlite("look into"):
            if self._is_open:
                (pages,) = self._database.execute("PRAGMA page_count").fetchone()
        return StoreStats(disk_bytes=pages * _PAGE, bytes_written=self._written, bytes_read=self._read)

    def _delete(self, numbers):
        self._database.executemany("DELETE FROM blocks WHERE id = ?", [(number,) for number in numbers])

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


def _what(key, layout):
    """Which block a row holds, for people too. Other versions of ollm must find the same text here."""
    return (
        f"layer {key.layer}, branch {key.branch}, tokens {key.start}..{key.start + key.tokens}, {key.rows} rows, "
        f"{layout.kv_heads} heads of {layout.key_size}+{layout.value_size} {layout.dtype_name}"
    )
