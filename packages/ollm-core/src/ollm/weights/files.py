"""`WeightFile`: one safetensors file that is open, and whether it is still the one that was opened."""

from __future__ import annotations

import os
import stat
import weakref
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ollm.errors import ModelDirectoryError, WeightsError
from ollm.io import shim
from ollm.io.files import DataFile, open_to_read


class Identity(NamedTuple):
    """What changes when a file is replaced or written to."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    """Changes with the bytes even where the time above is set back; and with names and modes."""

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class WeightFile(DataFile):
    """Opened to be read, and closed when nobody holds this object any more."""

    def __init__(self, path: Path) -> None:
        """Open a file; a symbolic link, as in a Hub cache, is followed once.

        Raises:
            ModelDirectoryError: when it cannot be opened or is no plain file.
        """
        self.path = path
        try:
            self._real = path.resolve(strict=True)
            fd, unbuffered = open_to_read(self._real)
            super().__init__(fd, unbuffered=unbuffered)
            weakref.finalize(self, _close, fd)
            status = shim.disk.fstat(fd)
        except OSError as error:
            raise ModelDirectoryError(f"Cannot open the weights in {path}: {error}.") from error
        if not stat.S_ISREG(status.st_mode):
            raise ModelDirectoryError(f"The weights in {path} are no plain file.")
        self.identity = Identity.of(status)

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self.identity.size

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


def _close(fd: int) -> None:
    with suppress(OSError):
        shim.disk.close(fd)
