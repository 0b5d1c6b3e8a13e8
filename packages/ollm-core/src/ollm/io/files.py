"""`DataFile`: a file that is read and written past the page cache where its file system lets us.

Weights, keys and values are read in a circle, the worst case for the kernel's cache, which would only take memory from
others. Where a file system refuses unbuffered I/O, bytes are dropped from the cache after use instead; whether it does
is found out by trying. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from ollm.io import shim
from ollm.io.buffers import ALIGNMENT, aligned_buffer, tensor_bytes

logger = logging.getLogger(__name__)

_unbuffered_mounts: dict[int, bool] = {}


class DataFile:
    """One open file. Buffers and offsets are multiples of `ALIGNMENT`; several threads may read and write at once."""

    def __init__(self, fd: int, *, unbuffered: bool) -> None:
        """Takes over `fd`, which was opened with `shim.UNBUFFERED` if `unbuffered`."""
        self.fd = fd
        self.unbuffered = unbuffered
        """Whether the page cache is left out; no more, once the file system refused a transfer."""

    def read(self, buffer: memoryview, offset: int, needed: int | None = None) -> None:
        """Fill `buffer`, or at least its first `needed` bytes, if the end of the file may cut off the rest.

        Raises:
            EOFError: when the file ends before the needed bytes.
            OSError: as the system says.
        """
        self._transfer(partial(shim.read_into, self.fd, buffer, offset, needed=needed), offset, len(buffer))

    def write(self, buffer: memoryview, offset: int) -> None:
        """Write all of `buffer`.

        Raises:
            OSError: as the system says.
        """
        self._transfer(partial(shim.write_all, self.fd, buffer, offset), offset, len(buffer))

    def _transfer(self, move: Callable[..., None], offset: int, length: int) -> None:
        if self.unbuffered:
            try:
                return move(step=ALIGNMENT)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a length or an offset that this file does not take unbuffered
                    raise
                shim.disk.make_buffered(self.fd)
                self.unbuffered = False
        move()
        with suppress(OSError):  # the bytes were moved; that they stay in the cache harms nobody's data
            shim.disk.forget_cached(self.fd, offset, length)


def open_to_read(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it is unbuffered.

    Raises:
        OSError: as the system says.
    """
    if shim.UNBUFFERED:
        try:
            return shim.disk.open(path, os.O_RDONLY | shim.UNBUFFERED), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return shim.disk.open(path, os.O_RDONLY), False


def takes_unbuffered(sample: Path) -> bool:
    """Whether the mount that holds `sample`, a small file with content, can be read unbuffered. Warns once if not.

    Raises:
        OSError: the file is gone, or there is no descriptor for it.
    """
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
    try:
        fd, unbuffered = open_to_read(sample)
        try:
            file = DataFile(fd, unbuffered=unbuffered)
            if unbuffered:
                file.read(tensor_bytes(aligned_buffer(ALIGNMENT)), 0, needed=1)
            return file.unbuffered
        finally:
            shim.disk.close(fd)
    except EOFError:
        return False
    except OSError as error:
        if error.errno in shim.NO_DESCRIPTOR:  # which says nothing of the mount
            raise
        return False
