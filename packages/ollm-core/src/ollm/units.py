"""Sizes as people write them: `"512MiB"` to bytes and back."""

import re
from decimal import Decimal
from typing import NewType

from ollm.errors import ConfigurationError

ByteSize = NewType("ByteSize", int)
"""A number of bytes. As an option it also takes text such as `512MiB`, `2GB` or `1.5 GiB`."""

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(value: object, argument: str) -> ByteSize:
    """Bytes from an int or a string such as `"512MiB"`; `argument` names the culprit in the error.

    Raises:
        ConfigurationError: for negative numbers, bools, floats and text that is no size.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return ByteSize(value)
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match and match[2].lower() in _UNITS:
            return ByteSize(int(Decimal(match[1]) * _UNITS[match[2].lower()]))
    raise ConfigurationError(
        f"{argument}={value!r} is not a size: give a number of bytes or text such as '512MiB', '2GB' or '0'."
    )


def format_size(nbytes: int) -> str:
    """Bytes for people, with binary units: `1536` becomes `1.5 KiB`."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
