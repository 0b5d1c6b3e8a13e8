"""One private folder per cache: `cache_dir/kv_cache_<strategy>/run-<id>/`, owned through a lock, removed at the end.

A folder whose owner is dead (its lock is free) is removed when the next cache is made beside it; the folder of a
living session is never touched. Only files that the format knows, and those that a store made under names of its own,
are ever deleted. This module knows nothing of what the files hold.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ollm.errors import CacheBusyError, CacheDirectoryError, OllmError, StorageError
from ollm.io import shim

LOCK = "lock"
MANIFEST = "manifest.json"
MANIFEST_TEMPORARY = "manifest.json.tmp"
TAG = "CACHEDIR.TAG"
_TAG_TEXT = b"Signature: 8a477f597d28d172789f06886806bc55\n# Keys and values of ollm, private to their owner.\n"
_RUN = re.compile(r"run-[0-9a-f]{16}")
_KNOWN_FILE = re.compile(r"lock|manifest\.json(\.tmp)?|segment-\d{6}\.kv|store-[A-Za-z0-9._-]+")
_ROOT_LOCK_SECONDS = 30.0
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

logger = logging.getLogger(__name__)


def segment_name(segment: int) -> str:
    """The file of a segment. Names are derived from numbers here and nowhere else."""
    return f"segment-{segment:06d}.kv"


class RunFolder:
    """The private folder of one runtime-scoped cache. `create` makes it, `remove` deletes it; it also goes when it is
    dropped and at interpreter exit, and after a crash with the next cache that is made beside it.

    Files of a store's own have names that begin with `store-`; others are left, and so is the folder then.
    """

    def __init__(self, path: Path, lock_fd: int) -> None:
        """For a folder that was just made; `lock_fd` holds its lock."""
        self.path = path
        """Private to this user: mode 0700."""
        self._remove = weakref.finalize(self, _remove_owned, path, lock_fd, os.getpid())

    @classmethod
    def create(cls, cache_dir: Path, directory: str) -> RunFolder:
        """Make a folder below `cache_dir/directory`, after removing those whose owners are dead.

        Raises:
            CacheDirectoryError: when the place is not writable, not ours, or not safe.
        """
        root = cache_dir / directory
        try:
            shim.disk.make_folders(cache_dir)
            return cls._create(root)
        except OSError as error:
            raise CacheDirectoryError(
                f"Cannot use {root} for keys and values: {error.strerror or error}. "
                "Choose a cache_dir on a local disk that you may write to."
            ) from error

    @classmethod
    def _create(cls, root: Path) -> RunFolder:
        with ExitStack() as undo:  # if a step fails, what was done before it
            undo.callback(_remove_root_if_empty, root)
            with _root_lock(root):
                _collect_dead(root)
                path = root / f"run-{secrets.token_hex(8)}"
                shim.disk.mkdir(path)
                undo.callback(_remove_folder, path)
                lock_fd = shim.disk.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                undo.callback(shim.disk.close, lock_fd)
                if not shim.disk.try_lock(lock_fd):
                    raise CacheBusyError(f"{path} was locked by another process as it was made.")
            undo.pop_all()
        return cls(path, lock_fd)

    def new_file(self, name: str, flags: int = 0) -> int:
        """A descriptor of a new, empty file of mode 0600. What an interrupted attempt left under that name goes first.

        Args:
            name: `store-` and letters, digits, dots, dashes or underscores, for a store's own files.
            flags: more flags of `os.open`, beside reading and writing.

        Raises:
            StorageError: for a name that would be left behind.
            OSError: as the system says.
        """
        if not _KNOWN_FILE.fullmatch(name):
            raise StorageError(f"A file named {name!r} would be left behind: begin its name with 'store-'.")
        with suppress(FileNotFoundError):
            shim.disk.unlink(self.path / name)
        return shim.disk.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags)

    def replace_manifest(self, raw: bytes) -> None:
        """Replace the manifest in one step: readers see the old one or the new one.

        Raises:
            OSError: as the system says.
        """
        fd = self.new_file(MANIFEST_TEMPORARY)
        try:
            shim.write_all(fd, memoryview(raw), 0)
        finally:
            shim.disk.close(fd)
        shim.disk.replace(self.path / MANIFEST_TEMPORARY, self.path / MANIFEST)

    def remove(self) -> None:
        """Delete the folder, and its parent if that was the last one. Does nothing in a forked child or twice.

        Raises:
            OSError: as the system says; what is left goes when the next cache is made beside it.
        """
        self._remove()


def _remove_owned(path: Path, lock_fd: int, owner: int) -> None:
    if os.getpid() != owner:
        return
    try:
        _remove_folder(path)
    finally:
        shim.disk.close(lock_fd)
    _remove_root_if_empty(path.parent)


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
    for name in sorted(names, key=lambda name: name == LOCK):
        if _KNOWN_FILE.fullmatch(name):
            with suppress(FileNotFoundError):
                shim.disk.unlink(path / name)
        else:
            logger.warning("%s is no file of ollm's, so it stays, and so does its folder.", path / name)
    if all(_KNOWN_FILE.fullmatch(name) for name in names):
        with suppress(FileNotFoundError):
            shim.disk.rmdir(path)


def _remove_root_if_empty(root: Path) -> None:
    """Leave nothing behind: the root goes with its last session, unless somebody is using it right now."""
    try:
        _check_private(root)
        with suppress(FileNotFoundError):
            fd = shim.disk.open(root / LOCK, os.O_RDWR)
            try:
                names = shim.disk.listdir(root)
                if shim.disk.try_lock(fd) and _is_still_there(root / LOCK, fd) and set(names) <= {LOCK, TAG}:
                    for name in sorted(names):  # the lock goes last
                        shim.disk.unlink(root / name)
            finally:
                shim.disk.close(fd)
        shim.disk.rmdir(root)  # refused, as it should be, where anything is left
    except (OSError, OllmError) as error:
        logger.debug("Left %s as it is: %s", root, error)
