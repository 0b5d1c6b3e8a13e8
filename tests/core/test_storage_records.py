"""The record header, against bytes that were written down once."""

from __future__ import annotations

import struct
from pathlib import Path

import attrs
import pytest
import xxhash

from ollm.errors import CorruptDataError
from ollm.storage.records import (
    ALIGNMENT,
    DTYPE_CODES,
    RecordHeader,
    check_header,
    encode_header,
    padded,
    payload_hash,
)

HEADER = RecordHeader(
    store_id=bytes(range(16)), dtype="bfloat16", layer=3, start=2**33 + 5, tokens=7, rows=2, payload_bytes=11
)
PAYLOAD = b"hello world"
DIGEST = 0xD447B1EA40E6988B  # xxh3-64 of the payload, as the reference implementation prints it
GOLDEN = Path(__file__).parent / "golden" / "record.hex"


def block_of(header: RecordHeader = HEADER, digest: int = DIGEST) -> bytearray:
    return bytearray(encode_header(header, digest))


def test_a_record_has_the_bytes_that_were_written_down() -> None:
    record = encode_header(HEADER, payload_hash(memoryview(PAYLOAD))) + PAYLOAD
    golden = bytes.fromhex(GOLDEN.read_text())
    assert record == golden.ljust(ALIGNMENT, b"\0") + PAYLOAD


def test_the_fields_lie_where_the_format_says() -> None:
    block = block_of()
    assert len(block) == ALIGNMENT == 4096
    assert block[:4] == b"OKVR"
    assert struct.unpack_from("<HHIIIQQ", block, 4) == (1, 3, 3, 2, 7, 2**33 + 5, 11)
    assert block[36:52] == bytes(range(16))
    assert struct.unpack_from("<Q", block, 52) == (DIGEST,)
    assert struct.unpack_from("<Q", block, 60) == (xxhash.xxh3_64_intdigest(bytes(block[:60])),)
    assert not any(block[68:])


def test_the_codes_of_dtypes_never_change() -> None:
    names = "opaque float32 float16 bfloat16 float64 float8_e4m3fn float8_e5m2 int8 uint8"
    assert {name: code for code, name in enumerate(names.split())} == DTYPE_CODES


def test_the_payload_hash_is_xxh3() -> None:
    assert payload_hash(memoryview(PAYLOAD)) == DIGEST


def test_a_header_that_is_asked_for_is_accepted() -> None:
    assert check_header(memoryview(block_of()), HEADER) == DIGEST


def test_every_flipped_bit_of_the_header_block_is_noticed() -> None:
    block = block_of()
    view = memoryview(block)
    for bit in range(8 * ALIGNMENT):
        block[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptDataError):
            check_header(view, HEADER)
        block[bit // 8] ^= 1 << bit % 8
    assert check_header(view, HEADER) == DIGEST


@pytest.mark.parametrize(
    "change",
    [
        {"store_id": bytes(16)},
        {"dtype": "float16"},
        {"dtype": "opaque"},
        {"layer": 2},
        {"start": 5},
        {"tokens": 8},
        {"rows": 1},
        {"payload_bytes": 12},
    ],
    ids=str,
)
def test_a_whole_record_other_than_the_one_asked_for_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CorruptDataError, match="another record"):
        check_header(memoryview(block_of()), attrs.evolve(HEADER, **change))


def test_a_record_of_another_cache_is_called_that() -> None:
    with pytest.raises(CorruptDataError, match="of another cache"):
        check_header(memoryview(block_of()), attrs.evolve(HEADER, store_id=bytes(16)))


@pytest.mark.parametrize(("offset", "code", "value"), [(4, "<H", 0), (4, "<H", 2), (0, "4s", b"OKVX")])
def test_another_version_or_magic_is_refused_even_with_a_good_checksum(offset: int, code: str, value: object) -> None:
    block = block_of()
    struct.pack_into(code, block, offset, value)
    struct.pack_into("<Q", block, 60, xxhash.xxh3_64_intdigest(bytes(block[:60])))
    with pytest.raises(CorruptDataError, match="not a record of version 1"):
        check_header(memoryview(block), HEADER)


@pytest.mark.parametrize(("nbytes", "expected"), [(0, 0), (1, 4096), (4095, 4096), (4096, 4096), (4097, 8192)])
def test_lengths_are_rounded_up_to_the_alignment(nbytes: int, expected: int) -> None:
    assert padded(nbytes) == expected
