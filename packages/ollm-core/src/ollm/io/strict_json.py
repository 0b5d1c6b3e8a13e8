"""JSON that others may have written, read with suspicion: what is doubtful in any way is refused."""

from __future__ import annotations

import json
import math
from typing import Any

MOST_DEPTH = 16
"""Objects and lists inside each other, as deep as any file of ours or of a checkpoint goes, and far deeper."""
MOST_VALUES = 4_000_000
"""Of what others may have written, counted by the marks before and between values: some 300,000 tensors of a
checkpoint, or a vocabulary of a million words with its merges."""


def check_bounds(raw: bytes, *, most_bytes: int, most_values: int) -> None:
    """Whether JSON is small enough to be parsed: a few bytes of it can become a hundred in memory.

    Raises:
        ValueError: there are more bytes, or more values, than so many.
    """
    if len(raw) > most_bytes:
        raise ValueError(f"larger than {most_bytes} bytes")
    values = sum(map(raw.count, (b",", b":", b"[", b"{")))
    if values > most_values:
        raise ValueError(f"more than {most_values} values")


def parse(raw: bytes, *, most_bytes: int, most_values: int | None = None) -> Any:
    """What UTF-8 bytes say: no key twice in an object, no NaN, every number finite, nested at most `MOST_DEPTH` deep.

    Raises:
        ValueError: for anything else, and as `check_bounds`; says what is wrong, and nothing of where.
    """
    check_bounds(raw, most_bytes=most_bytes, most_values=most_bytes if most_values is None else most_values)
    try:
        content = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite
        )
    except RecursionError:
        raise _too_deep() from None
    if not is_shallow(content, MOST_DEPTH):
        raise _too_deep()
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _refuse(token: str) -> Any:
    raise ValueError(f"{token} is no JSON")


def _finite(token: str) -> float:
    value = float(token)  # which makes infinity of 1e999
    if not math.isfinite(value):
        raise ValueError(f"{token} is too large")
    return value


def is_shallow(value: object, depth: int) -> bool:
    """Whether objects and lists are nested at most `depth` deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(is_shallow(item, depth - 1) for item in inner)


def _too_deep() -> ValueError:
    return ValueError(f"nested deeper than {MOST_DEPTH}")
