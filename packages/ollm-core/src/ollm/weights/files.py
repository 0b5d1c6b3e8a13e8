"""`WeightFile`: one safetensors file, read past the page cache where its file system lets us.

Weights are read in a circle, the worst case for the kernel's cache. Knows bytes and the file's identity, not what the
bytes mean.
"""

from __future__ import annotations

import errno
import os
import stat
import weakref
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ollm.errors import ModelDirectoryError, WeightsError
from ollm.io import shim
from ollm.io.buffers import ALIGNMENT


class Identity(NamedTuple):
    """What changes when a file is replaced or written to."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class WeightFile:
    """An open file, closed when nobody holds this object any more. Several threads may read at once."""

    def __init__(self, path: Path) -> None:
        """Open a file; a symbolic link, as in a Hub cache, is followed once.

        Raises:
            ModelDirectoryError: when it cannot be opened or is no plain file.
        """
        self.path = path
        try:
            self._real = path.resolve(strict=True)
            self._fd, self._unbuffered = _open(self._real)
            weakref.finalize(self, _close, self._fd)
            status = shim.disk.fstat(self._fd)
        except OSError as error:
            raise ModelDirectoryError(f"Cannot open the weights in {path}: {error}.") from error
        if not stat.S_ISREG(status.st_mode):
            raise ModelDirectoryError(f"The weights in {path} are no plain file.")
        self.identity = Identity.of(status)

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self.identity.size

    def read(self, buffer: memoryview, offset: int, needed: int) -> None:
        """Read into `buffer`, at least its first `needed` bytes; the end of the file may cut off the rest.

        Args:
            buffer: flat bytes at an aligned address, a multiple of `ALIGNMENT` long.
            offset: a multiple of `ALIGNMENT`.
            needed: at most the length of `buffer`.

        Raises:
            EOFError: when the file ends before the needed bytes.
            OSError: as the system says.
        """
        unbuffered = self._unbuffered  # another thread may find out meanwhile
        try:
            self._read(buffer, offset, needed, step=ALIGNMENT if unbuffered else 1)
        except OSError as error:
            if not unbuffered or error.errno != errno.EINVAL:
                raise
            shim.disk.make_buffered(self._fd)  # a length or an offset that this file does not take unbuffered
            self._unbuffered = False
            self._read(buffer, offset, needed, step=1)
        if not self._unbuffered:
            with suppress(OSError):  # the bytes are here; that they stay in the cache does no harm
                shim.disk.forget_cached(self._fd, offset, len(buffer))

    def check_identity(self) -> None:
        """Check that the file is still the one that was opened.

        Raises:
            WeightsError: when it was replaced, written to or removed.
        """
        try:
            now = Identity.of(shim.disk.lstat(self._real))
        except OSError as error:
            raise WeightsError(
                f"The weights in {self.path} cannot be looked at while the model is loaded: {error}. Put the file back "
                "and load the model again."
            ) from error
        if now != self.identity:
            raise WeightsError(f"{self.path} was changed while the model is loaded: load it again.")

    def _read(self, buffer: memoryview, offset: int, needed: int, *, step: int) -> None:
        done = 0
        while done < needed:
            count = shim.disk.pread_into(self._fd, shim.request(buffer, done), offset + done)
            if count <= 0:
                raise EOFError(f"{needed - done} of {needed} bytes are missing at offset {offset}")
            if done + count < needed:  # unbuffered reading goes on at a whole block
                if count < step:
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
                count -= count % step
            done += count


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it leaves the page cache out."""
    if shim.UNBUFFERED:
        try:
            return shim.disk.open(path, os.O_RDONLY | shim.UNBUFFERED), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return shim.disk.open(path, os.O_RDONLY), False


def _close(fd: int) -> None:
    with suppress(OSError):
        shim.disk.close(fd)
