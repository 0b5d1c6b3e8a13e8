"""Is there room for a record, and what does a refusal of the system mean? Asks before writing, explains afterwards."""

from __future__ import annotations

import errno
from pathlib import Path

from ollm.errors import DiskFullError, StorageError
from ollm.io import shim
from ollm.storage.options import StorageOptions
from ollm.units import format_size

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_room(folder: Path, size: int, used: int, growth: int, options: StorageOptions) -> None:
    """Refuse a record of `size` bytes that would exceed a limit.

    Args:
        folder: where the record would go.
        size: bytes that it would take.
        used: bytes that the cache takes already.
        growth: by how many that would grow: fewer where the record goes into a hole, more where it leaves one.
        options: the limits.

    Raises:
        DiskFullError: names the bytes needed and those that are left.
    """
    limit = options.max_disk_bytes
    if limit is not None and used + growth > limit:
        raise DiskFullError(
            f"Keys and values need {format_size(growth)} more in {folder}, but {format_size(used)} of "
            f"max_disk_bytes={format_size(limit)} are taken. Raise the limit or use a shorter context."
        )
    free, floor = _free_bytes(folder), options.min_free_bytes
    if free - size < floor:
        raise DiskFullError(
            f"Keys and values need {format_size(size)} more in {folder}, and of {format_size(free)} free "
            f"{format_size(floor)} must stay so (min_free_bytes). Free some space or choose another cache_dir."
        )


def failed_write(error: OSError, folder: Path, size: int) -> StorageError:
    """The typed error for a write of `size` bytes that the system refused."""
    if error.errno in _NO_ROOM:
        return DiskFullError(
            f"The disk took no {format_size(size)} more of keys and values in {folder} ({reason(error)}; "
            f"{format_size(_free_bytes(folder))} free). Free some space or choose another cache_dir."
        )
    return StorageError(f"Cannot write keys and values to {folder}: {reason(error)}.")


def reason(error: OSError) -> str:
    """Why the system refused, in words."""
    if error.errno == errno.ENOENT:
        return "the folder was removed while the cache was in use"
    return error.strerror or str(error)


def _free_bytes(folder: Path) -> int:
    try:
        return shim.disk.free_bytes(folder)
    except OSError as error:
        raise StorageError(f"Cannot tell how much room is left in {folder}: {reason(error)}.") from error
