"""Every system call on files goes through `disk`, so that a test can make any single one fail.

`Disk` only calls; loops, checks and meaning live above it.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNBUFFERED = getattr(os, "O_DIRECT", 0)
"""The flag for `Disk.open` that leaves the page cache out; 0 where the platform has none."""

NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE}
"""Errors that say nothing of a file, only that too many are open."""

REQUEST_BYTES = 2**20
"""What one system call moves, while other threads are at it too. A virtual disk that was measured reads a third faster
that way than with 4 MiB (benchmarks/results, request-size); no other was."""

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

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Write `buffer`; returns how many bytes went, which may be fewer."""
        return os.pwrite(fd, buffer, offset)

    def make_buffered(self, fd: int) -> None:
        """Take `UNBUFFERED` back from a descriptor."""
        if fcntl is not None:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~UNBUFFERED)

    def forget_cached(self, fd: int, offset: int, length: int) -> None:
        """Ask the system to drop these bytes from its page cache; dirty ones it starts to write."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def truncate(self, fd: int, length: int) -> None:
        os.ftruncate(fd, length)

    def fsync(self, fd: int) -> None:
        """Wait until what was written to a file is on the medium."""
        os.fsync(fd)

    def fsync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are on the medium: what was made, replaced or removed there."""
        fd = os.open(path, os.O_RDONLY | _SAFE_FLAGS)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

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

    def stat(self, path: Path) -> os.stat_result:
        """As `lstat`, of what symbolic links lead to."""
        return os.stat(path)

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


def read_into(fd: int, buffer: memoryview, offset: int, *, needed: int | None = None, step: int = 1) -> None:
    """Fill `buffer`, over as many reads as it takes.

    Args:
        fd, offset: where from.
        buffer: flat bytes.
        needed: how many must come, by default all; the end of the file may cut off the rest.
        step: go on at multiples of this only, as unbuffered reads must; `buffer` and `offset` are multiples, too.

    Raises:
        EOFError: when the file ends first; the message says how much is missing.
        OSError: as the system says; `EINVAL` also where it stopped within a step.
    """
    done, needed = 0, len(buffer) if needed is None else needed
    while done < needed:
        count = disk.pread_into(fd, request(buffer, done), offset + done)
        if done + count < needed:
            count = _whole_steps(count, step)
        if count <= 0:
            raise EOFError(f"{needed - done} of {needed} bytes are missing at offset {offset}")
        done += count


def write_all(fd: int, buffer: memoryview, offset: int, *, step: int = 1) -> None:
    """Write all of `buffer` (flat bytes), over as many writes as it takes.

    Raises:
        OSError: as the system says, or when a write makes no progress; `EINVAL` where it stopped within a step.
    """
    done = 0
    while done < len(buffer):
        count = _whole_steps(disk.pwrite(fd, request(buffer, done), offset + done), step)
        if count <= 0:
            raise OSError("a write made no progress")
        done += count


def request(buffer: memoryview, done: int) -> memoryview:
    """What of `buffer` the next system call should move, when `done` bytes were. A short rest goes with what is before
    it."""
    whole = len(buffer) - done < REQUEST_BYTES * 3 // 2
    return buffer[done:] if whole else buffer[done : done + REQUEST_BYTES]


def _whole_steps(count: int, step: int) -> int:
    """So much of `count` bytes as lies in whole steps."""
    if 0 < count < step:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return count - count % step
