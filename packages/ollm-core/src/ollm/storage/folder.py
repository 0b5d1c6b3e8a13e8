"""One private folder per cache: `cache_dir/kv_cache_<strategy>/run-<id>/`, owned through a lock, removed at the end; or
`entry-<id>/`, which is kept.

A folder whose owner is dead (its lock is free) is removed when the next cache is made beside it; the folder of a
living session is never touched. Only files that the format knows, and those that a store made under names of its own,
are ever deleted, and nothing of one that is kept. This module knows nothing of what the files hold.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import secrets
import stat
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ollm.contracts.storage import Folder
from ollm.endings import end
from ollm.errors import CacheBusyError, CacheDirectoryError, ConfigurationError, OllmError, StorageError
from ollm.io import shim
from ollm.io.shim import NO_DESCRIPTOR

LOCK = "lock"
MANIFEST = "manifest.json"
MANIFEST_TEMPORARY = "manifest.json.tmp"
TAG = "CACHEDIR.TAG"
_TAG_TEXT = b"Signature: 8a477f597d28d172789f06886806bc55\n# Keys and values of ollm, private to their owner.\n"
_RUN = re.compile(r"run-[0-9a-f]{16}")
_ENTRY = re.compile(r"entry-[0-9a-f]{16}")
_SEGMENT = re.compile(r"segment-\d{6}\.kv")
_KNOWN_FILE = re.compile(rf"lock|manifest\.json(\.tmp)?|{_SEGMENT.pattern}|store-[A-Za-z0-9._-]+")
_ROOT_LOCK_SECONDS = 30.0
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

logger = logging.getLogger(__name__)


MOST_SEGMENTS = 10**6


def segment_name(segment: int) -> str:
    """The file of a segment. Names are derived from numbers here and nowhere else.

    Raises:
        ConfigurationError: there is no such segment.
    """
    if not 0 <= segment < MOST_SEGMENTS:
        raise ConfigurationError(f"segment={segment} is out of range: 0 … {MOST_SEGMENTS - 1}.")
    return f"segment-{segment:06d}.kv"


class CacheFolder(Folder):
    """The private folder of one cache, owned through a lock. `create` makes one, `open` takes one that was kept.

    What is not to be kept is removed when it is closed or dropped, at interpreter exit, and after a crash with the next
    cache that is made beside it. Files of a store's own have names that begin with `store-`; others are left, and so is
    the folder then.
    """

    def __init__(self, path: Path, lock_fd: int, *, is_new: bool, kept: bool) -> None:
        """For a folder that this process has locked; `lock_fd` holds the lock."""
        self.path = path
        self.is_new = is_new
        """Whether nothing of an earlier cache is in it."""
        self.kept = kept
        """Whether it stays when it is closed."""
        self._held = path, _Lock(lock_fd), os.getpid()
        self._close = weakref.finalize(self, _let_go if kept else _remove_owned, *self._held)

    @classmethod
    def create(cls, cache_dir: Path, directory: str, *, keep: bool = False) -> CacheFolder:
        """Make a folder below `cache_dir/directory`, after removing those that were not to be kept and whose owners are
        dead. With `keep`, its name is on the medium when this returns.

        Raises:
            CacheDirectoryError: when the place is not writable, not ours, or not safe.
        """
        root = cache_dir / directory
        with _typed(root):
            made = _make_folders(cache_dir)
            with ExitStack() as undo:  # if a step fails, what was done before it
                undo.callback(_remove_empty, made)
                undo.callback(_remove_root_if_empty, root)
                with _root_lock(root):
                    _collect_dead(root)
                    path = root / f"{'entry' if keep else 'run'}-{secrets.token_hex(8)}"
                    shim.disk.mkdir(path)
                    undo.callback(_remove_folder, path)
                    lock_fd = shim.disk.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                    undo.callback(shim.disk.close, lock_fd)
                    if not shim.disk.try_lock(lock_fd):
                        raise CacheBusyError(f"{path} was locked by another process as it was made.")
                if keep:
                    for folder in (root, cache_dir, *(one.parent for one in made)):
                        shim.disk.fsync_folder(folder)
                undo.pop_all()
        return cls(path, lock_fd, is_new=True, kept=keep)

    @classmethod
    def open(cls, path: Path) -> CacheFolder:
        """A folder that was kept, to go on with.

        Raises:
            CacheBusyError: another cache, of this or another process, has it open.
            CacheDirectoryError: it is not there, not ours, or not safe.
        """
        with _typed(path):
            if not _ENTRY.fullmatch(path.name):
                raise CacheDirectoryError(f"{path} is no folder that is kept: their names are entry-<16 hex digits>.")
            _check_private(path.parent)
            _check_private(path)
            _check_private(path / LOCK, folder=False)
            lock_fd = shim.disk.open(path / LOCK, os.O_RDWR)
            with ExitStack() as undo:
                undo.callback(shim.disk.close, lock_fd)
                if not shim.disk.try_lock(lock_fd):
                    raise CacheBusyError(f"{path} is in use by another cache: close that first.")
                undo.pop_all()
        return cls(path, lock_fd, is_new=False, kept=True)

    def open_file(self, name: str, flags: int = 0, *, make: bool = True) -> int:
        """As in the contract; with `make=False`, only a file that is there already."""
        if not _KNOWN_FILE.fullmatch(name):
            raise StorageError(f"A file named {name!r} would be left behind: begin its name with 'store-'.")
        path = self.path / name
        if make:
            with suppress(FileExistsError):
                return shim.disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags)
        _check_private(path, folder=False)
        return shim.disk.open(path, os.O_RDWR | flags)

    def remove_segments(self, *, keep: Iterable[int]) -> None:
        """Remove the files of all segments but these.

        Raises:
            OSError: as the system says.
        """
        kept = set(map(segment_name, keep))
        for name in shim.disk.listdir(self.path):
            if _SEGMENT.fullmatch(name) and name not in kept:
                shim.disk.unlink(self.path / name)

    def read_manifest(self, most_bytes: int) -> bytes:
        """The manifest, or its beginning, if it is longer.

        Raises:
            OSError: as the system says.
            EOFError: it was cut meanwhile.
        """
        fd = self.open_file(MANIFEST, make=False)
        try:
            raw = bytearray(min(shim.disk.fstat(fd).st_size, most_bytes))
            shim.read_into(fd, memoryview(raw), 0)
        finally:
            shim.disk.close(fd)
        return bytes(raw)

    def replace_manifest(self, raw: bytes, *, durable: bool) -> None:
        """Replace the manifest in one step: readers see the old one or the new one.

        Args:
            raw: all of it.
            durable: whether it must be on the disk before this returns.

        Raises:
            OSError: as the system says.
        """
        temporary = self.path / MANIFEST_TEMPORARY
        with suppress(FileNotFoundError):  # what an interrupted attempt left
            shim.disk.unlink(temporary)
        fd = shim.disk.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            shim.write_all(fd, memoryview(raw), 0)
            if durable:
                shim.disk.fsync(fd)
        finally:
            shim.disk.close(fd)
        shim.disk.replace(temporary, self.path / MANIFEST)
        if durable:
            shim.disk.fsync_folder(self.path)

    def close(self) -> None:
        """As in the contract. With the last folder, its parent goes too. Until all is removed the lock is held."""
        end(self._close)

    def give_up(self) -> None:
        """Close it; one that was made for a cache that could not be made is removed, also if it was to be kept."""
        if self.is_new and self._close.alive:
            self._close.detach()
            self._close = weakref.finalize(self, _remove_owned, *self._held)
        self.close()


@contextmanager
def _typed(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheDirectoryError(
            f"Cannot use {place} for keys and values: {error.strerror or error}. "
            "Choose a cache_dir on a local disk that you may write to."
        ) from error


class _Lock:
    """A descriptor that holds a lock, until it is closed."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    def close(self) -> None:
        """May be called twice."""
        fd, self._fd = self._fd, None
        if fd is not None:
            shim.disk.close(fd)


def _let_go(path: Path, lock: _Lock, owner: int) -> None:
    if os.getpid() == owner:
        lock.close()


def _remove_owned(path: Path, lock: _Lock, owner: int) -> None:
    """May be called until it has succeeded, and afterwards. What cannot be removed is tried once more at exit."""
    if os.getpid() != owner:
        return
    try:
        try:
            _remove_folder(path)
        except OSError as error:
            if error.errno not in NO_DESCRIPTOR:
                raise
            lock.close()  # to look into the folder takes one; whoever removes it meanwhile may do so
            _remove_folder(path)
    except BaseException:
        _left.append((path, lock, owner))
        raise
    lock.close()
    _remove_root_if_empty(path.parent)


_left: list[tuple[Path, _Lock, int]] = []
"""Folders that could not be removed."""


@atexit.register
def _remove_left() -> None:
    for path, lock, owner in _left[:]:
        with suppress(OSError):
            _remove_owned(path, lock, owner)


def _make_folders(path: Path) -> list[Path]:
    """Make the user's folder, and those above it, as far as they are not there; those that were made, for us alone."""
    missing: list[Path] = []
    for folder in (path, *path.parents):
        with suppress(FileNotFoundError):
            shim.disk.stat(folder)
            break
        missing.insert(0, folder)
    for folder in missing:
        with suppress(FileExistsError):  # somebody else was quicker
            shim.disk.mkdir(folder)
    shim.disk.stat(path)
    return missing


def _remove_empty(folders: Iterable[Path]) -> None:
    """Take back those that `_make_folders` made, from the last to the first."""
    with suppress(OSError):
        for folder in reversed([*folders]):
            shim.disk.rmdir(folder)


def _make_root(root: Path) -> None:
    """Everything below the user's `cache_dir` must be ours alone."""
    try:
        shim.disk.mkdir(root)
    except FileExistsError:
        _check_private(root)


def _check_private(path: Path, *, folder: bool = True) -> None:
    status = shim.disk.lstat(path)
    problem = None
    if stat.S_ISLNK(status.st_mode):
        problem = "is a symbolic link"
    elif folder and not stat.S_ISDIR(status.st_mode):
        problem = "is not a folder"
    elif not folder and not (stat.S_ISREG(status.st_mode) and status.st_nlink <= 1):
        problem = "is not a plain file with one name"
    elif hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        problem = f"belongs to another user (uid {status.st_uid})"
    elif status.st_mode & _OTHERS_MAY_WRITE:
        problem = f"may be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    if problem:
        raise CacheDirectoryError(
            f"{path} {problem}. Keys and values are private: remove it or choose another cache_dir."
        )


@contextmanager
def _root_lock(root: Path) -> Iterator[None]:
    """Held while folders are made or collected, so that a folder is never seen before its own lock is taken."""
    deadline = time.monotonic() + _ROOT_LOCK_SECONDS
    while True:
        fd = _open_root_lock(root)
        try:
            if shim.disk.try_lock(fd) and _is_still_there(root / LOCK, fd):
                yield
                return
        finally:
            shim.disk.close(fd)
        if time.monotonic() > deadline:
            raise CacheBusyError(f"Another process has held {root / LOCK} for {_ROOT_LOCK_SECONDS:.0f} s.")
        time.sleep(0.01)


def _open_root_lock(root: Path) -> int:
    """The lock of a root, which its last session may remove, with the root, between any two of these steps."""
    for _ in range(100):
        try:
            _make_root(root)
            with suppress(FileExistsError):
                return shim.disk.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            _check_private(root / LOCK, folder=False)
            return shim.disk.open(root / LOCK, os.O_RDWR)
        except FileNotFoundError:
            continue
    raise CacheBusyError(f"Other processes keep making and removing {root}.")


def _is_still_there(path: Path, fd: int) -> bool:
    """Whether `path` still is the file that was opened."""
    try:
        now, opened = shim.disk.lstat(path), shim.disk.fstat(fd)
    except FileNotFoundError:
        return False
    return (now.st_dev, now.st_ino) == (opened.st_dev, opened.st_ino)


def _collect_dead(root: Path) -> None:
    """Remove the folders of sessions that ended without doing so. The caller holds the root lock."""
    tag = root / TAG
    try:
        shim.disk.stat(tag)
    except FileNotFoundError:
        fd = shim.disk.open(tag, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            shim.write_all(fd, memoryview(_TAG_TEXT), 0)
        finally:
            shim.disk.close(fd)
    for name in shim.disk.listdir(root):
        if not _RUN.fullmatch(name):
            continue
        try:
            _check_private(root / name)
            if _owner_is_dead(root / name):
                _remove_folder(root / name)
        except FileNotFoundError:  # its session removed it just now
            continue
        except (OSError, OllmError) as error:  # one folder that cannot be removed must not stop a session
            logger.warning("Left %s as it is: %s", root / name, error)


def _owner_is_dead(path: Path) -> bool:
    try:
        fd = shim.disk.open(path / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        return shim.disk.try_lock(fd)
    finally:
        shim.disk.close(fd)


def _remove_folder(path: Path) -> None:
    """Delete the files that the format knows, then the folder; the lock goes last. Another session may do so too."""
    try:
        names = shim.disk.listdir(path)
    except FileNotFoundError:
        return
    with ExitStack() as steps:  # the next one is removed even if one cannot be; but then neither lock nor folder
        for name in names:
            if not _KNOWN_FILE.fullmatch(name):
                logger.warning("%s is no file of ollm's, so it stays, and so does its folder.", path / name)
            elif name != LOCK:
                steps.callback(_unlink, path / name)
    _unlink(path / LOCK)
    if all(_KNOWN_FILE.fullmatch(name) for name in names):
        with suppress(FileNotFoundError):
            shim.disk.rmdir(path)


def _unlink(path: Path) -> None:
    with suppress(FileNotFoundError):
        shim.disk.unlink(path)


def _remove_root_if_empty(root: Path) -> None:
    """Leave nothing behind: the root goes with its last session, unless somebody is using it right now."""
    try:
        _check_private(root)
        with suppress(OSError):  # there may have been no descriptor for its lock
            return shim.disk.rmdir(root)
        # looked into before the lock is opened, for there may be one descriptor only. Who makes a folder in between
        # finds no lock later, and makes another
        names = shim.disk.listdir(root)
        if set(names) <= {LOCK, TAG}:
            with suppress(FileNotFoundError):
                fd = shim.disk.open(root / LOCK, os.O_RDWR)
                try:
                    if shim.disk.try_lock(fd) and _is_still_there(root / LOCK, fd):
                        for name in sorted(names):  # the lock goes last
                            shim.disk.unlink(root / name)
                finally:
                    shim.disk.close(fd)
            shim.disk.rmdir(root)  # refused, as it should be, where anything is left
    except (OSError, OllmError) as error:
        logger.debug("Left %s as it is: %s", root, error)
