"""`DataFile`: a file of records, read and written past the page cache where the file system lets us.

Keys and values are read in a circle, the worst case for the kernel's cache, which would only take memory from others.
Where a file system refuses unbuffered I/O, bytes are dropped from the cache after use instead. Whether it refuses is
found out by reading, once per mount.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ollm.io import shim
from ollm.io.buffers import ALIGNMENT, aligned_buffer, tensor_bytes

logger = logging.getLogger(__name__)

_unbuffered_mounts: dict[int, bool] = {}


class DataFile:
    """One open file. Buffers and offsets are multiples of `ALIGNMENT`; several threads may read and write at once."""

    def __init__(self, fd: int, *, unbuffered: bool) -> None:
        """Owns `fd`, which was opened with `shim.UNBUFFERED` if `unbuffered`."""
        self.fd = fd
        self._unbuffered = unbuffered

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`.

        Raises:
            EOFError: when the file ends first.
            OSError: as the system says.
        """
        self._operate(shim.read_exactly, buffer, offset)

    def write(self, buffer: memoryview, offset: int) -> None:
        """Write all of `buffer`.

        Raises:
            OSError: as the system says.
        """
        self._operate(shim.write_all, buffer, offset)

    def _operate(self, action: Callable[..., None], buffer: memoryview, offset: int) -> None:
        if self._unbuffered:
            try:
                return action(self.fd, buffer, offset, step=ALIGNMENT)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a length or an offset that this file does not take unbuffered
                    raise
                shim.disk.make_buffered(self.fd)
                self._unbuffered = False
        action(self.fd, buffer, offset)
        with suppress(OSError):  # the bytes were moved; that they stay in the cache harms nobody's data
            shim.disk.forget_cached(self.fd, offset, len(buffer))


def takes_unbuffered(sample: Path) -> bool:
    """Whether the mount that holds `sample`, a small file with content, can be read unbuffered. Warns once if not."""
    mount = shim.disk.lstat(sample).st_dev
    if mount not in _unbuffered_mounts:
        _unbuffered_mounts[mount] = _probe(sample)
        if not _unbuffered_mounts[mount]:
            logger.warning(
                "The file system of %s takes no unbuffered reads: keys and values go through the page cache, and are "
                "dropped from it after use. A cache_dir on a local disk is faster.",
                sample.parent.parent,
            )
    return _unbuffered_mounts[mount]


def _probe(sample: Path) -> bool:
    buffer = tensor_bytes(aligned_buffer(ALIGNMENT))
    try:
        fd = shim.disk.open(sample, shim.UNBUFFERED)
        try:
            return bool(shim.UNBUFFERED) and shim.disk.pread_into(fd, buffer, 0) > 0
        finally:
            shim.disk.close(fd)
    except OSError:
        return False
