"""The record: a 4 KiB header block, then the payload, padded to 4 KiB. Every read compares the header.

A read compares the header with what was asked for, so that a misplaced or stale record is noticed, not only a
damaged one. This module knows bytes and numbers, not files or tensors.
"""

from __future__ import annotations

import struct

import attrs
import xxhash

from ollm.contracts.kv import Extent
from ollm.errors import CorruptDataError
from ollm.io.buffers import ALIGNMENT

MAGIC = b"OKVR"
RECORD_VERSION = 1
STORE_ID_BYTES = 16

# magic, version, dtype code, layer, rows, tokens, start, payload length, store id, payload hash; then header checksum
_FIELDS = struct.Struct("<4sHHIIIQQ16sQ")
_CHECKSUM = struct.Struct("<Q")

HEADER_BYTES = _FIELDS.size + _CHECKSUM.size
"""Of a header block; the rest are zeros."""

_ZEROS = bytes(ALIGNMENT - HEADER_BYTES)

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

_DTYPES = {code: name for name, code in DTYPE_CODES.items()}


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


def payload_hash(payload: memoryview) -> int:
    """xxh3-64 of the payload."""
    return xxhash.xxh3_64_intdigest(payload)


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


def decode_header(block: memoryview) -> tuple[RecordHeader, int]:
    """What a header block says, and the payload hash that it states.

    Raises:
        CorruptDataError: when the block is damaged or of another version.
    """
    body = bytes(block[: _FIELDS.size])
    (checksum,) = _CHECKSUM.unpack(block[_FIELDS.size : HEADER_BYTES])
    if checksum != xxhash.xxh3_64_intdigest(body) or bytes(block[HEADER_BYTES:]) != _ZEROS:
        raise CorruptDataError("the record header is damaged")
    magic, version, code, layer, rows, tokens, start, length, store_id, digest = _FIELDS.unpack(body)
    if magic != MAGIC or version != RECORD_VERSION:
        raise CorruptDataError(f"not a record of version {RECORD_VERSION} (found {magic!r}, version {version})")
    if code not in _DTYPES:
        raise CorruptDataError(f"the record has the unknown dtype code {code}")
    header = RecordHeader(
        store_id=store_id, dtype=_DTYPES[code], layer=layer, start=start, tokens=tokens, rows=rows,
        payload_bytes=length,
    )  # fmt: skip
    return header, int(digest)


def is_header(record: memoryview, header: bytes) -> bool:
    """Whether a record begins with just this header, of `HEADER_BYTES`, in its block."""
    return bytes(record[:HEADER_BYTES]) == header and bytes(record[HEADER_BYTES:ALIGNMENT]) == _ZEROS


def check_header(block: memoryview, asked: RecordHeader) -> int:
    """Compare a header block with what was asked for; returns the payload hash that it states.

    Raises:
        CorruptDataError: when the block is damaged, of another version, or describes another record.
    """
    found, digest = decode_header(block)
    if found != asked:
        raise CorruptDataError(
            f"another record lies here: layer {found.layer}, tokens {found.start}..{found.start + found.tokens}, "
            f"{found.rows} rows, {found.payload_bytes} bytes of {found.dtype}"
            + ("" if found.store_id == asked.store_id else ", of another cache")
        )
    return digest


def check_record(record: memoryview, asked: RecordHeader, *, payload: bool) -> None:
    """Compare a record's header, and with `payload` its payload's hash, too.

    Raises:
        CorruptDataError: says what does not match.
    """
    digest = check_header(record[:ALIGNMENT], asked)
    if payload and payload_hash(record[ALIGNMENT : ALIGNMENT + asked.payload_bytes]) != digest:
        raise CorruptDataError("the payload does not match its hash")


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def record_bytes(payload_bytes: int) -> int:
    """What a record of so long a payload takes, header and padding included."""
    return ALIGNMENT + padded(payload_bytes)


def record_span(extent: Extent) -> tuple[int, int]:
    """Where the record of an extent begins and ends in its segment, header and padding included."""
    return extent.offset - ALIGNMENT, extent.offset + padded(extent.nbytes)
