"""Options that every store on the storage helper shares, which a store's own options class may inherit; and how large
reads and writes are, and how many there may be at a time."""

from __future__ import annotations

import attrs

from ollm.contracts.blocks import EXTENT_BYTES
from ollm.contracts.options import option
from ollm.units import ByteSize

WRITE_BUFFERS = 4
"""How many records may wait to be written, where a store does not say otherwise."""
BUFFER_BYTES = EXTENT_BYTES + 2**16
"""One read or one write: an extent of up to 8 MiB with its header."""
PARTS_IN_FLIGHT = 32
"""Reads of parts of extents at a time; see `benchmarks/results`, small-reads."""
MOST_READ_BYTES = 256 * 2**10
"""Of pieces of an extent that are read together: larger ones are no faster there."""
DEVICE_BUFFERS = 3
"""Staging buffers on an accelerator: one is being computed with, one is filled, one waits."""

VERIFY_CHOICES = ("always", "first", "never")


def _not_negative(_: object, attribute: attrs.Attribute[int], value: int) -> None:
    if value < 0:
        raise ValueError(f"{attribute.name}={value} is negative")


def _verify_choice(_: object, attribute: attrs.Attribute[str], value: str) -> None:
    if value not in VERIFY_CHOICES:
        raise ValueError(f"{attribute.name}={value!r} is none of {', '.join(VERIFY_CHOICES)}")


@attrs.frozen(kw_only=True)
class StorageOptions:
    """How carefully and how much a store may use the disk."""

    verify: str = option(
        "first",
        help="Check payload hashes: on every read (always), on the first read of a whole record and on every read of "
        "parts of one (first), or never.",
        validator=_verify_choice,
        changes_format=False,
    )
    max_disk_bytes: ByteSize | None = option(
        None,
        help="Bytes that this cache may take on disk; reaching them is an error. Default: no limit of its own.",
        changes_format=False,
    )
    min_free_bytes: ByteSize = option(
        ByteSize(256 * 2**20),
        help="Bytes that must stay free on the disk; checked before writing.",
        validator=_not_negative,
        changes_format=False,
    )
