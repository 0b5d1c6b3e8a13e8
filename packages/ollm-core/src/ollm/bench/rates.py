"""The raw read and write rate of a disk: what any store could do at best. Knows nothing of caches or torch."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ollm.bench.records import Rates, Sample

BLOCK = 4 * 2**20
THREADS = 4
LEAST_SAMPLE = 256 * 2**20
"""What is read between two steps: enough to see the disk drift, little enough to be cheap."""

_DIRECT = getattr(os, "O_DIRECT", 0)


class RawDisk:
    """A file of random bytes in a folder, written once and read as often as asked. A context: it goes at the end.

    Buffers exist only while something is measured, so that they do not count as a cache's memory.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        self._path = folder / "raw-rate.bin"
        self._nbytes = nbytes
        self._direct = _takes_direct(folder)
        self._next = 0
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
        self._reads.append(self._read(0, self._nbytes))

    def read_some(self) -> None:
        """Measure reading a part, another one each time."""
        nbytes = min(LEAST_SAMPLE, self._nbytes)
        if self._next + nbytes > self._nbytes:
            self._next = 0
        self._reads.append(self._read(self._next, nbytes))
        self._next += nbytes

    def write_some(self) -> None:
        """Measure writing another file, a quarter as large."""
        path = self._path.with_suffix(".again")
        try:
            self._writes.append(self._write(path, max(BLOCK, self._nbytes // 4)))
        finally:
            path.unlink(missing_ok=True)

    def _read(self, start: int, nbytes: int) -> Sample:
        fd = os.open(self._path, os.O_RDONLY | (_DIRECT if self._direct else 0))
        try:
            if not self._direct:
                _forget(fd)
            return _in_threads(lambda buffer, offset: os.preadv(fd, [buffer], offset), start, nbytes)
        finally:
            os.close(fd)

    def _write(self, path: Path, nbytes: int) -> Sample:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (_DIRECT if self._direct else 0)
        fd = os.open(path, flags, 0o600)
        try:
            return _in_threads(lambda buffer, offset: os.pwritev(fd, [buffer], offset), 0, nbytes, lambda: os.fsync(fd))
        finally:
            os.close(fd)


def _in_threads(
    transfer: Callable[[memoryview, int], int], start: int, nbytes: int, finish: Callable[[], None] = lambda: None
) -> Sample:
    """Move blocks from `start` on, several at a time; the seconds are those of moving and of `finish` alone."""
    offsets = iter(range(start, start + nbytes - nbytes % BLOCK, BLOCK))
    buffers = [mmap.mmap(-1, BLOCK) for _ in range(THREADS)]  # anonymous, so aligned to pages as O_DIRECT asks
    for buffer in buffers:
        buffer[:] = os.urandom(BLOCK)  # what no disk or file system can compress

    def work(buffer: mmap.mmap) -> int:
        moved = 0
        with memoryview(buffer) as view:
            for offset in offsets:  # next() of a range's iterator is atomic
                count = transfer(view, offset)
                if count != BLOCK:
                    raise OSError(f"measuring the disk: {count} of {BLOCK} bytes were moved at offset {offset}.")
                moved += count
        return moved

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            began = time.perf_counter()
            moved = sum(pool.map(work, buffers))
            finish()
            return Sample(moved, time.perf_counter() - began)
    finally:
        for buffer in buffers:
            buffer.close()


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
                return all(count == mmap.PAGESIZE for count in (os.pwritev(fd, [view], 0), os.preadv(fd, [view], 0)))
        finally:
            os.close(fd)
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
