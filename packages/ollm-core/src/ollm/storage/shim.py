"""Every system call of the storage helper goes through `disk`, so that a test can make any single one fail.

`Disk` only calls; loops, checks and meaning live above it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SAFE_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


class Disk:
    """The operating system. Tests replace `shim.disk` with a subclass that fails, shortens or tears operations."""

    def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
        """A descriptor that no child process inherits and that never follows a symbolic link.

        With `O_EXCL`, so where the file is certainly new, it gets `mode` whatever the umask.
        """
        fd = os.open(path, flags | _SAFE_FLAGS, mode)
        if flags & os.O_EXCL:
            os.fchmod(fd, mode)
        return fd

    def close(self, fd: int) -> None:
        os.close(fd)

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Read into `buffer`; returns how many bytes came, which may be fewer."""
        return os.preadv(fd, [buffer], offset)

    def pwrite(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Write the buffers one after the other; returns how many bytes went, which may be fewer."""
        return os.pwritev(fd, buffers, offset)

    def truncate(self, fd: int, length: int) -> None:
        os.ftruncate(fd, length)

    def try_lock(self, fd: int) -> bool:
        """Take an exclusive `flock` without waiting. It ends with the last descriptor, so also with the process."""
        if fcntl is None:
            raise OSError("this platform has no flock")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def mkdir(self, path: Path) -> None:
        """Make one folder, private whatever the umask."""
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)

    def lstat(self, path: Path) -> os.stat_result:
        return os.lstat(path)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def listdir(self, path: Path) -> list[str]:
        return os.listdir(path)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write on the file system of `path`."""
        return shutil.disk_usage(path).free


disk = Disk()
"""The one that is used. Always written `shim.disk`, never imported by name, so that replacing it reaches everybody."""


def read_exactly(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer`, over as many reads as it takes.

    Raises:
        EOFError: when the file ends first; the message says how much is missing.
    """
    done = 0
    while done < len(buffer):
        count = disk.pread_into(fd, buffer[done:], offset + done)
        if count <= 0:
            raise EOFError(f"{len(buffer) - done} of {len(buffer)} bytes are missing at offset {offset}")
        done += count


def write_all(fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write all of `buffers` (flat bytes), over as many writes as it takes: Linux caps one at 2,147,479,552 bytes.

    Raises:
        OSError: as the system says, or when a write makes no progress.
    """
    pending = [buffer for buffer in buffers if len(buffer)]
    while pending:
        count = disk.pwrite(fd, pending, offset)
        if count <= 0:
            raise OSError("a write made no progress")
        offset += count
        while pending and count >= len(pending[0]):
            count -= len(pending.pop(0))
        if count:
            pending[0] = pending[0][count:]
