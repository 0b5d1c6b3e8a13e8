"""Raw rates of a disk: the same sizes and as many requests at once as the cache uses, without the cache."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from ollm.io.buffers import aligned_buffer
from ollm.io.scheduler import WORKERS
from ollm.storage.tensors import tensor_bytes

PIECE = 4 * 2**20
_UNBUFFERED = getattr(os, "O_DIRECT", 0)


class RawDisk:
    """Reads and writes whole pieces of files on `WORKERS` threads, past the page cache if the file system lets it."""

    def __init__(self, folder: Path) -> None:
        self.unbuffered = _takes_unbuffered(folder)
        self._folder = folder
        self._buffers = [tensor_bytes(aligned_buffer(PIECE)) for _ in range(WORKERS)]
        for buffer in self._buffers:
            buffer[:] = os.urandom(PIECE)

    def read_rate(self, files: Sequence[Path], most: int) -> float:
        """Bytes per second of reading up to `most` bytes, evenly from the ends of all files."""
        share = max(most // max(len(files), 1) // PIECE, 1)
        with ExitStack() as opened:
            pieces = []
            for file in files:
                fd = self._open(file, os.O_RDONLY, opened)
                whole = file.stat().st_size // PIECE
                pieces += [(fd, index * PIECE) for index in range(max(whole - share, 0), whole)]
            return self._rate(pieces, self._read)

    def write_rate(self, nbytes: int) -> float:
        """Bytes per second of appending so many bytes to a new file, which is removed."""
        path = self._folder / f"raw-{os.getpid()}.bin"
        try:
            with ExitStack() as opened:
                fd = self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, opened)
                rate = self._rate([(fd, at) for at in range(0, nbytes, PIECE)], self._write, sync=fd)
        finally:
            with suppress(FileNotFoundError):
                path.unlink()
        return rate

    def _open(self, path: Path, flags: int, opened: ExitStack) -> int:
        fd = os.open(path, flags | (_UNBUFFERED if self.unbuffered else 0), 0o600)
        opened.callback(os.close, fd)
        return fd

    def _rate(self, pieces: list[tuple[int, int]], action: object, sync: int | None = None) -> float:
        def work(worker: int) -> None:
            for fd, offset in pieces[worker::WORKERS]:
                action(fd, self._buffers[worker], offset)  # type: ignore[operator]

        began = time.perf_counter()
        with ThreadPoolExecutor(WORKERS) as workers:
            list(workers.map(work, range(WORKERS)))
        if sync is not None and not self.unbuffered:
            os.fsync(sync)
        return len(pieces) * PIECE / (time.perf_counter() - began)

    def _read(self, fd: int, buffer: memoryview, offset: int) -> None:
        if not self.unbuffered:
            os.posix_fadvise(fd, offset, PIECE, os.POSIX_FADV_DONTNEED)
        if os.preadv(fd, [buffer], offset) != PIECE:
            raise OSError("a raw read came back short")

    def _write(self, fd: int, buffer: memoryview, offset: int) -> None:
        if os.pwrite(fd, buffer, offset) != PIECE:
            raise OSError("a raw write went short")


def _takes_unbuffered(folder: Path) -> bool:
    """Found out by writing and reading a block."""
    path = folder / f"probe-{os.getpid()}.bin"
    block = tensor_bytes(aligned_buffer(4096))
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _UNBUFFERED, 0o600)
        try:
            return bool(_UNBUFFERED) and os.pwrite(fd, block, 0) == os.preadv(fd, [block], 0) == 4096
        finally:
            os.close(fd)
    except OSError:
        return False
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def drop_page_cache() -> bool:
    """Drop the system's page cache; whether that was allowed."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True
