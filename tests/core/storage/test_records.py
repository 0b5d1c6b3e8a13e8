"""The record: its header and payload, against bytes that were written down once."""

from __future__ import annotations

import struct
from pathlib import Path

import attrs
import hypothesis.strategies as st
import pytest
import torch
import xxhash
from hypothesis import given

from ollm.contracts.blocks import BlockKey, Extent, KVBlock, KVLayout, Location
from ollm.errors import CorruptDataError
from ollm.storage import records
from ollm.storage.records import ALIGNMENT, DTYPE_CODES, check_header, check_payload, identity, make_header, padded
from ollm.storage.tensors import head_spans, lay_out, pack, unpack
from ollm.testing.case import some

STORE_ID = bytes(range(16))
KEY = BlockKey(layer=3, branch=2, start=2**33 + 5, tokens=7, rows=2)
LAYOUT = KVLayout(torch.bfloat16, kv_heads=4, key_size=64, value_size=32)
PAYLOAD = b"hello world"
LOCATION = Location(len(PAYLOAD), 0, ALIGNMENT, encoded=True)
DIGEST = 0xD447B1EA40E6988B  # xxh3-64 of the payload, as the reference implementation prints it
GOLDEN = Path(__file__).parent / "golden" / "record.hex"
MOST_HASHES = 502  # what fits behind 68 bytes of fields and in front of the checksum


def begins(key: BlockKey = KEY, layout: KVLayout = LAYOUT, location: Location = LOCATION) -> bytes:
    return identity(STORE_ID, key, layout, location)


def header_block(payload: bytes = PAYLOAD) -> bytearray:
    location = attrs.evolve(LOCATION, nbytes=len(payload))
    return bytearray(make_header(begins(location=location), memoryview(payload)).ljust(ALIGNMENT, b"\0"))


def with_good_checksum(block: bytearray, hashes: int = 1) -> bytearray:
    end = 68 + 8 * hashes
    struct.pack_into("<Q", block, end, xxhash.xxh3_64_intdigest(bytes(block[:end])))
    return block


def test_a_record_has_the_bytes_that_were_written_down() -> None:
    assert header_block() == bytes.fromhex(GOLDEN.read_text()).ljust(ALIGNMENT, b"\0")


def test_the_fields_lie_where_the_format_says() -> None:
    block = header_block()
    assert len(block) == ALIGNMENT == 4096
    assert block[:4] == b"OKVR"
    assert struct.unpack_from("<HBBIIIIIIIQQ", block, 4) == (2, 3, 1, 3, 2, 2, 7, 4, 64, 32, 2**33 + 5, 11)
    assert block[52:68] == STORE_ID
    assert struct.unpack_from("<Q", block, 68) == (DIGEST,)
    assert struct.unpack_from("<Q", block, 76) == (xxhash.xxh3_64_intdigest(bytes(block[:76])),)
    assert not any(block[84:])


def test_the_codes_of_dtypes_never_change() -> None:
    names = "float32 float16 bfloat16 float64 float8_e4m3fn float8_e5m2 int8 uint8"
    assert {name: code for code, name in enumerate(names.split(), 1)} == DTYPE_CODES


def test_a_header_that_is_asked_for_is_accepted() -> None:
    found = check_header(memoryview(header_block()), begins())
    assert found == bytes(header_block()[:84])
    check_payload(memoryview(PAYLOAD), found)


@pytest.mark.parametrize("payload", [PAYLOAD, bytes(3 * 2**15 + 5), b""], ids=["one piece", "four", "none"])
def test_every_flipped_bit_of_the_header_block_is_noticed(payload: bytes) -> None:
    block, asked = header_block(payload), begins(location=attrs.evolve(LOCATION, nbytes=len(payload)))
    view = memoryview(block)
    for bit in some(range(8 * ALIGNMENT), 1640):
        block[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptDataError):
            check_header(view, asked)
        block[bit // 8] ^= 1 << bit % 8
    check_header(view, asked)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        *(("key", {name: getattr(KEY, name) + 1}) for name in ("layer", "branch", "start", "tokens", "rows")),
        *(("layout", {name: getattr(LAYOUT, name) + 1}) for name in ("kv_heads", "key_size", "value_size")),
        ("layout", {"dtype": torch.float16}),
        ("location", {"nbytes": 12}),
        ("location", {"encoded": False}),
    ],
    ids=str,
)
def test_a_whole_record_other_than_the_one_asked_for_is_refused(field: str, change: dict[str, object]) -> None:
    asked = attrs.evolve({"key": KEY, "layout": LAYOUT, "location": LOCATION}[field], **change)
    with pytest.raises(CorruptDataError, match="another record") as error:
        check_header(memoryview(header_block()), begins(**{field: asked}))
    assert "layer 3, tokens 8589934597..8589934604, 2 rows, 11 bytes of bfloat16, of branch 2" in str(error.value)


def test_a_record_of_another_cache_is_called_that() -> None:
    with pytest.raises(CorruptDataError, match="of another cache"):
        check_header(memoryview(header_block()), identity(bytes(16), KEY, LAYOUT, LOCATION))


@pytest.mark.parametrize(
    ("offset", "code", "value"), [(4, "<H", 0), (4, "<H", 1), (4, "<H", 3), (0, "4s", b"OKVX")], ids=str
)
def test_another_version_or_magic_is_refused_even_with_a_good_checksum(offset: int, code: str, value: object) -> None:
    block = header_block()
    struct.pack_into(code, block, offset, value)
    with pytest.raises(CorruptDataError, match="not a record of version 2"):
        check_header(memoryview(with_good_checksum(block)), begins())


@pytest.mark.parametrize("length", [0, 2**15 + 1, 2**40, 2**62, 2**62 + 1, 2**63, 2**64 - 1])
def test_a_header_whose_length_is_a_lie_is_refused(length: int) -> None:
    """However many hashes there would be, none is looked for outside of the header block."""
    block = header_block()
    struct.pack_into("<Q", block, 44, length)
    for hashes in (0, 1, 2, MOST_HASHES):
        with pytest.raises(CorruptDataError):
            check_header(memoryview(with_good_checksum(bytearray(block), hashes)), begins())


def pieces_of(length: int) -> tuple[int, int]:
    """Bytes that share a hash, and how many there are: told in another way than the code does."""
    size = next(2**bits for bits in range(15, 64) if -(-length // 2**bits) <= MOST_HASHES)
    return size, -(-length // size)


@pytest.mark.parametrize(
    "length",
    [0, 1, 2**15, 2**15 + 1, MOST_HASHES * 2**15, MOST_HASHES * 2**15 + 1, 32 * 2**20, 2**30 + 7, 2**45, 2**62],
)
def test_pieces_are_as_small_as_the_header_block_takes(length: int) -> None:
    size, count = pieces_of(length)
    assert records.piece_bytes(length) == size
    assert 68 + 8 * count + 8 <= ALIGNMENT
    assert size == 2**15 or 68 + 8 * -(-length // (size // 2)) + 8 > ALIGNMENT, "half of it would do"


@given(st.integers(0, 2**62))
def test_the_hashes_of_any_payload_fit(length: int) -> None:
    assert records.piece_bytes(length) == pieces_of(length)[0]


@pytest.mark.parametrize(("length", "size"), [(1, 2**15), (3 * 2**15 - 1, 2**15), (MOST_HASHES * 2**15 + 1, 2**16)])
def test_each_piece_has_its_hash_behind_the_fields(length: int, size: int) -> None:
    payload = torch.randint(256, (length,), dtype=torch.uint8).numpy().tobytes()
    block = header_block(payload)
    count = -(-length // size)
    hashes = [xxhash.xxh3_64_intdigest(payload[at : at + size]) for at in range(0, length, size)]
    assert list(struct.unpack_from(f"<{count}Q", block, 68)) == hashes
    end = 68 + 8 * count
    assert struct.unpack_from("<Q", block, end) == (xxhash.xxh3_64_intdigest(bytes(block[:end])),)
    assert not any(block[end + 8 :])
    header = check_header(memoryview(block), begins(location=attrs.evolve(LOCATION, nbytes=length)))
    check_payload(memoryview(payload), header)
    for number in range(0, count, 100):
        piece = bytearray(payload[number * size : (number + 1) * size])
        check_payload(memoryview(piece), header, at=number * size)
        piece[-1] ^= 1
        with pytest.raises(CorruptDataError, match=f"piece {number} of the payload"):
            check_payload(memoryview(piece), header, at=number * size)


@pytest.mark.parametrize(("nbytes", "expected"), [(0, 0), (1, 4096), (4095, 4096), (4096, 4096), (4097, 8192)])
def test_lengths_are_rounded_up_to_the_alignment(nbytes: int, expected: int) -> None:
    assert padded(nbytes) == expected
    assert records.record_bytes(nbytes) == 4096 + expected


def numbered(rows: int, heads: int, tokens: int, key_size: int, value_size: int) -> KVBlock:
    """Whole numbers, in memory as attention makes them: not contiguous."""
    keys = torch.arange(rows * tokens * heads * key_size, dtype=torch.int16).view(rows, tokens, heads, key_size)
    values = -1 - torch.arange(rows * tokens * heads * value_size, dtype=torch.int16)
    values = values.view(rows, tokens, heads, value_size)
    return KVBlock(keys.view(torch.bfloat16).transpose(1, 2), values.view(torch.bfloat16).transpose(1, 2))


def test_a_payload_is_head_after_head_keys_then_values() -> None:
    """Written with indices and `struct`, which know nothing of strides."""
    block = numbered(2, 3, 4, 5, 2)
    keys, values = block.keys.view(torch.int16).tolist(), block.values.view(torch.int16).tolist()
    expected = b"".join(
        struct.pack("<h", number)
        for row in range(2)
        for head in range(3)
        for one in (keys, values)
        for token in range(4)
        for number in one[row][head][token]
    )
    assert pack(block).numpy().tobytes() == expected


sizes = st.integers(1, 4)


@given(rows=sizes, heads=sizes, tokens=st.integers(0, 6), key_size=st.integers(0, 5), value_size=st.integers(0, 5))
def test_what_is_packed_is_unpacked_where_it_lies(
    rows: int, heads: int, tokens: int, key_size: int, value_size: int
) -> None:
    block = numbered(rows, heads, tokens, key_size, value_size)
    raw = pack(block)
    extent = Extent.of(BlockKey(0, 0, 0, tokens, rows), block.layout, Location(len(raw)))
    found = unpack(extent, raw)
    assert torch.equal(found.keys.view(torch.int16), block.keys.view(torch.int16))
    assert torch.equal(found.values.view(torch.int16), block.values.view(torch.int16))
    if found.keys.numel():
        assert found.keys.untyped_storage().data_ptr() == raw.untyped_storage().data_ptr()


@given(rows=sizes, heads=sizes, tokens=st.integers(1, 9), key_size=sizes, value_size=st.integers(0, 4), data=st.data())
def test_the_spans_of_a_head_hold_its_tokens(
    rows: int, heads: int, tokens: int, key_size: int, value_size: int, data: st.DataObject
) -> None:
    block = numbered(rows, heads, tokens, key_size, value_size)
    raw = pack(block).numpy().tobytes()
    extent = Extent.of(BlockKey(0, 0, 0, tokens, rows), block.layout, Location(len(raw)))
    head, start = data.draw(st.integers(0, heads - 1)), data.draw(st.integers(0, tokens))
    stop = data.draw(st.integers(start, tokens))
    expected = [
        one[row, head, start:stop].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for row in range(rows)
        for one in (block.keys, block.values)
    ]
    assert [raw[low:high] for low, high in head_spans(extent, head, start, stop)] == expected


def test_tensors_are_laid_out_one_behind_the_other_whatever_their_strides() -> None:
    bits = torch.arange(12, dtype=torch.int16).view(torch.bfloat16).reshape(3, 4)
    into = torch.empty(29, dtype=torch.uint8)
    lay_out([torch.tensor(list(b"keys!"), dtype=torch.uint8), bits.T, torch.empty(0)], into)
    expected = b"keys!" + struct.pack("<12h", *(column + 4 * row for column in range(4) for row in range(3)))
    assert into.numpy().tobytes() == expected


def test_an_empty_block_is_room_for_keys_then_values() -> None:
    raw = torch.arange(2 * 3 * 4 * 5 + 2 * 3 * 4 * 2, dtype=torch.uint8)
    block = KVBlock.empty(KVLayout(torch.uint8, 3, 5, 2), 2, 4, into=raw)
    assert block.keys.is_contiguous()
    assert block.values.is_contiguous()
    assert block.keys.flatten().tolist() + block.values.flatten().tolist() == raw.tolist()
