"""The record: a 4 KiB header block, then the payload. Written before every payload, compared on every read.

A read compares the header with what was asked for, so that a misplaced or stale record is noticed, not only a
damaged one. This module knows bytes and numbers, not files or tensors.
"""

from __future__ import annotations

import struct

import attrs
import xxhash

from ollm.errors import CorruptDataError

ALIGNMENT = 4096
"""Records begin and payloads lie at multiples of this, so that they can be read unbuffered, straight into place."""

MAGIC = b"OKVR"
RECORD_VERSION = 1
STORE_ID_BYTES = 16

# magic, version, dtype code, layer, rows, tokens, start, payload length, store id, payload hash; then header checksum
_FIELDS = struct.Struct("<4sHHIIIQQ16sQ")
_CHECKSUM = struct.Struct("<Q")

_ZEROS = bytes(ALIGNMENT - _FIELDS.size - _CHECKSUM.size)

DTYPE_CODES = {
    "opaque": 0,
    "float32": 1,
    "float16": 2,
    "bfloat16": 3,
    "float64": 4,
    "float8_e4m3fn": 5,
    "float8_e5m2": 6,
    "int8": 7,
    "uint8": 8,
}
"""Codes of payload dtypes. `opaque`: the store's own encoding, which only it can read."""


@attrs.frozen(kw_only=True)
class RecordHeader:
    """What a record says about itself, and what a reader asks for."""

    store_id: bytes
    dtype: str
    layer: int
    start: int
    tokens: int
    rows: int
    payload_bytes: int


def payload_hash(buffers: list[memoryview]) -> int:
    """xxh3-64 of the buffers as if they were one."""
    digest = xxhash.xxh3_64()
    for buffer in buffers:
        digest.update(buffer)
    return digest.intdigest()


def encode_header(header: RecordHeader, payload_digest: int) -> bytes:
    """The header block: `ALIGNMENT` bytes, zeros after the checksum."""
    body = _FIELDS.pack(
        MAGIC,
        RECORD_VERSION,
        DTYPE_CODES[header.dtype],
        header.layer,
        header.rows,
        header.tokens,
        header.start,
        header.payload_bytes,
        header.store_id,
        payload_digest,
    )
    return (body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))).ljust(ALIGNMENT, b"\0")


def check_header(block: memoryview, asked: RecordHeader) -> int:
    """Compare a header block with what was asked for; returns the payload hash that it states.

    Raises:
        CorruptDataError: when the block is damaged, of another version, or describes another record.
    """
    body = bytes(block[: _FIELDS.size])
    (checksum,) = _CHECKSUM.unpack(block[_FIELDS.size : _FIELDS.size + _CHECKSUM.size])
    if checksum != xxhash.xxh3_64_intdigest(body) or bytes(block[_FIELDS.size + _CHECKSUM.size :]) != _ZEROS:
        raise CorruptDataError("the record header is damaged")
    magic, version, code, layer, rows, tokens, start, length, store_id, digest = _FIELDS.unpack(body)
    if magic != MAGIC or version != RECORD_VERSION:
        raise CorruptDataError(f"not a record of version {RECORD_VERSION} (found {magic!r}, version {version})")
    found = (store_id, code, layer, start, tokens, rows, length)
    wanted = (
        asked.store_id,
        DTYPE_CODES[asked.dtype],
        asked.layer,
        asked.start,
        asked.tokens,
        asked.rows,
        asked.payload_bytes,
    )
    if found != wanted:
        raise CorruptDataError(
            f"another record lies here: layer {layer}, tokens {start}..{start + tokens}, {rows} rows, {length} bytes"
            + ("" if store_id == asked.store_id else ", of another cache")
        )
    return int(digest)


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
