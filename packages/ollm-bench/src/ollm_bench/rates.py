"""The raw read and write rate of a disk: what any store could do at best, asked as ollm asks it.

Knows nothing of caches.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from ollm_bench.records import Rates, Sample

BLOCK = 4 * 2**20
"""What a thread takes at a time. It moves it in requests of `_REQUEST`: neighbouring requests of several threads might
be joined by the system, to ones that a disk is slower with."""

_REQUEST = 2**20
_THREADS = 8
_HUGE_PAGE = 2 * 2**20
_DIRECT = getattr(os, "O_DIRECT", 0)


class RawDisk:
    """A file of random bytes in a folder, written once and read as often as asked. A context: it goes at the end.

    Buffers exist only while something is measured, so that they do not count as a cache's memory.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        self._path = folder / "raw-rate.bin"
        self._nbytes = nbytes
        self._direct = _takes_direct(folder)
        self._reads: list[Sample] = []
        self._writes: list[Sample] = []

    def __enter__(self) -> RawDisk:
        self._writes.append(self._write(self._path, self._nbytes))
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)

    @property
    def rates(self) -> Rates:
        """All samples so far."""
        return Rates(direct=self._direct, reads=list(self._reads), writes=list(self._writes))

    def read_all(self) -> None:
        """Measure reading the whole file."""
        with ExitStack() as opened:
            fd = _open(self._path, opened, direct=self._direct)
            self._reads.append(_in_threads(os.preadv, [(fd, at, BLOCK) for at in range(0, self._nbytes, BLOCK)]))

    def read_files(self, files: Sequence[Path], nbytes: int) -> None:
        """Measure reading so many bytes of files: a cache's own, as it reads them."""
        if files:
            self._reads.append(read_ends(files, nbytes, direct=self._direct))

    def write_some(self) -> None:
        """Measure writing another file, a quarter as large."""
        path = self._path.with_suffix(".again")
        try:
            self._writes.append(self._write(path, max(BLOCK, self._nbytes // 4)))
        finally:
            path.unlink(missing_ok=True)

    def _write(self, path: Path, nbytes: int) -> Sample:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (_DIRECT if self._direct else 0)
        fd = os.open(path, flags, 0o600)
        try:
            return _in_threads(os.pwritev, [(fd, at, BLOCK) for at in range(0, nbytes, BLOCK)], lambda: os.fsync(fd))
        finally:
            os.close(fd)


class RawFiles:
    """Files that are there, such as those of a checkpoint: nothing is written, the folder's included."""

    def __init__(self, files: Sequence[Path], nbytes: int) -> None:
        """For measuring with so many bytes of the files."""
        self._files = files
        self._nbytes = nbytes
        self.direct = _reads_directly(files[0])
        """Whether they are read with O_DIRECT."""
        self._reads: list[Sample] = []

    @property
    def rates(self) -> Rates:
        """All samples so far."""
        return Rates(direct=self.direct, reads=list(self._reads))

    def read(self) -> None:
        """Measure once more."""
        self._reads.append(read_ends(self._files, self._nbytes, direct=self.direct))


def read_ends(files: Sequence[Path], nbytes: int, *, direct: bool) -> Sample:
    """Read so many bytes, rounded up to blocks, from the ends of files, from each as much."""
    with ExitStack() as opened:
        places = []
        for path in files:
            fd, size = _open(path, opened, direct=direct), path.stat().st_size
            blocks = -(-size // BLOCK)
            first = max(blocks - -(-nbytes // len(files) // BLOCK), 0)
            places += [(fd, at, min(BLOCK, size - at)) for at in range(first * BLOCK, size, BLOCK)]
        return _in_threads(os.preadv, places)


def _open(path: Path, opened: ExitStack, *, direct: bool) -> int:
    fd = os.open(path, os.O_RDONLY | (_DIRECT if direct else 0))
    opened.callback(os.close, fd)
    if not direct:
        _forget(fd)
    return fd


Transfer = Callable[[int, Sequence[memoryview], int], int]
Place = tuple[int, int, int]
"""Descriptor and offset of a block, and how many bytes it has: the last of a file may have fewer."""


def _in_threads(transfer: Transfer, places: Sequence[Place], finish: Callable[[], None] = lambda: None) -> Sample:
    """Move blocks, several at a time; the seconds are those of moving and of `finish` alone."""
    waiting = iter(places)
    buffers = [_buffer() for _ in range(_THREADS)]
    for buffer in buffers:
        buffer[:] = os.urandom(BLOCK)  # what no disk or file system can compress

    with ThreadPoolExecutor(_THREADS) as pool:
        began = time.perf_counter()
        moved = sum(pool.map(lambda buffer: _move(transfer, buffer, waiting), buffers))
        finish()
        return Sample(moved, time.perf_counter() - began)


def _move(transfer: Transfer, buffer: memoryview, waiting: Iterator[Place]) -> int:
    """One thread's work: the next block that nobody has taken, until there is none."""
    moved = 0
    for fd, offset, nbytes in waiting:  # next() of a list's iterator is atomic
        done = 0
        while done < nbytes:
            part = buffer[done : done + _REQUEST]
            count = transfer(fd, [part], offset + done)
            done += count
            if count != len(part) and done != nbytes:
                raise OSError(f"measuring the disk: {done} of {nbytes} bytes were moved at offset {offset}.")
        moved += done
    return moved


def _buffer() -> memoryview:
    """Room for a block in huge pages, where the system has them: a disk fills those faster than small ones."""
    pages = mmap.mmap(-1, BLOCK + _HUGE_PAGE)
    skip = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % _HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE, skip, BLOCK)
    return memoryview(pages)[skip : skip + BLOCK]


def _forget(fd: int) -> None:
    """Take the file out of the kernel's cache, as far as the system knows how."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _takes_direct(folder: Path) -> bool:
    """Whether a real unbuffered write and read work: some file systems take the flag and fail later."""
    path = folder / "direct-probe.bin"
    if not _DIRECT:
        return False
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _DIRECT, 0o600)
        try:
            with mmap.mmap(-1, mmap.PAGESIZE) as page, memoryview(page) as view:
                return os.pwritev(fd, [view], 0) == mmap.PAGESIZE and _reads_directly(path)
        finally:
            os.close(fd)
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)


def _reads_directly(path: Path) -> bool:
    """Whether a real unbuffered read of a file works."""
    if not _DIRECT:
        return False
    try:
        fd = os.open(path, os.O_RDONLY | _DIRECT)
        try:
            with mmap.mmap(-1, mmap.PAGESIZE) as page, memoryview(page) as view:
                return os.preadv(fd, [view], 0) > 0
        finally:
            os.close(fd)
    except OSError:
        return False
