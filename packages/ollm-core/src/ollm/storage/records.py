"""The record: a 4 KiB header block, then the payload, padded to 4 KiB. Every read compares the header.

A read compares the header with what was asked for, so that a misplaced or stale record is noticed, not only a damaged
one. The header holds a hash for each piece of the payload, so that a part can be verified without the rest. This module
knows bytes and numbers, not files or tensors.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

import xxhash

from ollm.contracts.blocks import BlockKey, Extent, KVLayout, Location
from ollm.errors import CorruptDataError
from ollm.io.buffers import ALIGNMENT

MAGIC = b"OKVR"
RECORD_VERSION = 2
STORE_ID_BYTES = 16

# magic, version, dtype code, encoded, layer, branch, rows, tokens, heads, key and value size, start, length, store id
_FIELDS = struct.Struct("<4sHBBIIIIIIIQQ16s")
_HASH = struct.Struct("<Q")
_ZEROS = bytes(ALIGNMENT)

_LEAST_PIECE_BYTES = 32 * 2**10
_MOST_PIECES = (ALIGNMENT - _FIELDS.size - _HASH.size) // _HASH.size

DTYPE_CODES = {
    "float32": 1,
    "float16": 2,
    "bfloat16": 3,
    "float64": 4,
    "float8_e4m3fn": 5,
    "float8_e5m2": 6,
    "int8": 7,
    "uint8": 8,
}
"""Codes of the dtypes of keys and values."""

_DTYPES = {code: name for name, code in DTYPE_CODES.items()}


def piece_bytes(payload_bytes: int) -> int:
    """How many bytes of such a payload share a hash: 32 KiB, or the least power of two above that with which the
    hashes of all pieces fit into the header block."""
    size = _LEAST_PIECE_BYTES
    while size * _MOST_PIECES < payload_bytes:
        size *= 2
    return size


def identity(store_id: bytes, key: BlockKey, layout: KVLayout, location: Location) -> bytes:
    """What the header of a record begins with: all that a reader knows of it beforehand."""
    return _FIELDS.pack(
        MAGIC, RECORD_VERSION, DTYPE_CODES[layout.dtype_name], location.encoded, key.layer, key.branch, key.rows,
        key.tokens, layout.kv_heads, layout.key_size, layout.value_size, key.start, location.nbytes, store_id,
    )  # fmt: skip


def make_header(begins: bytes, payload: memoryview) -> bytes:
    """The header of a record without the zeros behind it.

    Args:
        begins: its `identity`.
        payload: all of it.
    """
    size = piece_bytes(len(payload))
    hashes = (xxhash.xxh3_64_intdigest(payload[at : at + size]) for at in range(0, len(payload), size))
    body = begins + b"".join(map(_HASH.pack, hashes))
    return body + _HASH.pack(xxhash.xxh3_64_intdigest(body))


def checksum(header: bytes) -> int:
    """Of a header without the zeros behind it: stands for all that the record holds."""
    (found,) = _HASH.unpack(header[-_HASH.size :])
    return int(found)


def is_header(block: memoryview, header: bytes) -> bool:
    """Whether a header block holds just this header."""
    return block[: len(header)] == header and block[len(header) :] == _ZEROS[: ALIGNMENT - len(header)]


def check_header(block: memoryview, begins: bytes) -> bytes:
    """The header in a header block, without the zeros behind it, once it is what was asked for.

    Raises:
        CorruptDataError: when the block is damaged, of another version, or describes another record.
    """
    found = bytes(block[: _FIELDS.size])
    magic, version, *_, length, _ = _FIELDS.unpack(found)
    if magic != MAGIC or version != RECORD_VERSION:
        raise CorruptDataError(f"not a record of version {RECORD_VERSION} (found {magic!r}, version {version})")
    pieces = -(-length // piece_bytes(length)) if length <= 2**62 else _MOST_PIECES + 1
    end = _FIELDS.size + _HASH.size * (pieces + 1)
    header = bytes(block[: min(end, ALIGNMENT)])
    if end > ALIGNMENT or xxhash.xxh3_64_intdigest(header[: -_HASH.size]) != checksum(header):
        raise CorruptDataError("the record header is damaged")
    if not is_header(block, header):
        raise CorruptDataError("the record header is damaged")
    if found != begins:
        raise CorruptDataError(f"another record lies here: {_described(found, begins)}")
    return header


def check_payload(payload: memoryview, header: bytes, *, at: int = 0) -> None:
    """Compare pieces of a payload with their hashes.

    Args:
        payload: whole pieces, or all that there is behind the first.
        header: of the record, sound.
        at: the byte of the payload that these begin at.

    Raises:
        CorruptDataError: one does not match.
    """
    length = _FIELDS.unpack(header[: _FIELDS.size])[-2]
    size = piece_bytes(length)
    for number, place in zip(itertools.count(at // size), range(0, len(payload), size), strict=False):
        (stated,) = _HASH.unpack_from(header, _FIELDS.size + number * _HASH.size)
        if xxhash.xxh3_64_intdigest(payload[place : place + size]) != stated:
            raise CorruptDataError(f"piece {number} of the payload does not match its hash")


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def record_bytes(payload_bytes: int) -> int:
    """What a record of so long a payload takes, header and padding included."""
    return ALIGNMENT + padded(payload_bytes)


def record_span(location: Location) -> tuple[int, int]:
    """Where a record begins and ends in its segment, header and padding included."""
    return location.offset - ALIGNMENT, location.offset + padded(location.nbytes)


def run_span(extents: Sequence[Extent]) -> tuple[int, int]:
    """Where the first of some records that are neighbours begins, and where the last one ends."""
    return record_span(extents[0].location)[0], record_span(extents[-1].location)[1]


def _described(found: bytes, asked: bytes) -> str:
    _, _, code, _, layer, branch, rows, tokens, _, _, _, start, length, store_id = _FIELDS.unpack(found)
    return (
        f"layer {layer}, tokens {start}..{start + tokens}, {rows} rows, {length} bytes of {_DTYPES.get(code, code)}"
        + (f", of branch {branch}" if branch else "")
        + ("" if asked.endswith(store_id) else ", of another cache")
    )
