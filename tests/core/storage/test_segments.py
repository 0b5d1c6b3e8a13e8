"""Records in segments: right bytes or a typed error, limits, and the reuse of space."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import attrs
import pytest
import torch

from core.storage.storage_fixtures import (
    block_of,
    file_of,
    flip,
    get,
    get_pieces,
    locations,
    open_storage,
    put,
    read_raw,
)
from ollm.contracts.blocks import BlockKey, Extent, KVBlock
from ollm.errors import (
    CacheClosedError,
    CacheForkedError,
    ConfigurationError,
    CorruptDataError,
    DiskFullError,
    StorageError,
    StoreContractError,
)
from ollm.io import shim
from ollm.io.buffers import ALIGNMENT, aligned_buffer
from ollm.io.scheduler import IOScheduler
from ollm.storage import records
from ollm.storage.options import WRITE_BUFFERS
from ollm.storage.segments import SegmentedStorage
from ollm.storage.tensors import unpack
from ollm.testing.case import some
from ollm.testing.faults import FAULTS, FaultyDisk
from ollm.testing.processes import in_child

SIZES = [0, 1, 4095, 4096, 4097, 10_000]


@pytest.fixture
def storage(tmp_path: Path) -> SegmentedStorage:
    return open_storage(tmp_path)


def test_what_is_written_is_read_back(storage: SegmentedStorage) -> None:
    model = {}
    for number, (size, segment) in enumerate(itertools.product(SIZES, (0, 7, 999_999))):
        payload = random.Random(number).randbytes(size)
        model[put(storage, payload, segment=segment, layer=number, start=number)] = payload
    for extent, payload in [*model.items(), *reversed(model.items())]:
        assert get(storage, extent) == payload
        assert extent.location.nbytes == len(payload)


def test_a_block_of_any_strides_is_stored_as_the_format_says(storage: SegmentedStorage) -> None:
    keys = torch.arange(2 * 3 * 5 * 4, dtype=torch.float32).view(2, 5, 3, 4).transpose(1, 2)
    block, key = KVBlock(keys, -keys[..., :2]), BlockKey(layer=1, branch=2, start=3, tokens=5, rows=2)
    extent = Extent.of(key, block.layout, storage.write(block, key, segment=4))
    assert (extent.location.segment, extent.location.offset, extent.location.encoded) == (4, ALIGNMENT, False)
    expected = b"".join(
        one[row, head].numpy().tobytes() for row in range(2) for head in range(3) for one in (block.keys, block.values)
    )
    assert get(storage, extent) == expected
    assert file_of(storage, 4).read_bytes()[ALIGNMENT:] == expected.ljust(ALIGNMENT, b"\0")
    found = unpack(extent, read_raw(storage, extent)[0])
    assert torch.equal(found.keys, block.keys)
    assert torch.equal(found.values, block.values)


def test_an_encoding_of_the_stores_own_is_stored_in_place_of_the_block(storage: SegmentedStorage) -> None:
    key, block = BlockKey(1, 0, 2, 1, 1), block_of(b"never written")
    encoded = [torch.tensor([1.5]), torch.tensor([[1, 2], [3, 4]], dtype=torch.int8).T, torch.empty(0)]
    location = storage.write(block, key, segment=0, encoded=encoded)
    assert (location.nbytes, location.encoded) == (8, True)
    extent = Extent.of(key, block.layout, location)
    assert get(storage, extent) == bytes.fromhex("0000c03f") + bytes([1, 3, 2, 4])
    with pytest.raises(CorruptDataError, match="is not in this storage"):
        get(storage, attrs.evolve(extent, location=attrs.evolve(location, encoded=False)))


def test_neighbours_are_read_at_once(storage: SegmentedStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    payloads = [random.Random(size).randbytes(size) for size in SIZES]
    extents = [put(storage, payload) for payload in payloads]
    disk = FaultyDisk()
    monkeypatch.setattr(shim, "disk", disk)
    assert [raw.numpy().tobytes() for raw in read_raw(storage, *extents)] == payloads
    assert disk.operations.count("pread_into") == 1


def test_records_and_payloads_are_aligned(storage: SegmentedStorage) -> None:
    extents = [put(storage, bytes(size)) for size in SIZES]
    assert all(extent.location.offset % ALIGNMENT == 0 for extent in extents)
    assert file_of(storage).stat().st_size == storage.stats().disk_bytes
    assert storage.stats().disk_bytes == ALIGNMENT * (len(SIZES) + 0 + 1 + 1 + 1 + 2 + 3)


def test_the_manifest_says_whose_folder_it_is(storage: SegmentedStorage) -> None:
    manifest = json.loads((storage.path / "manifest.json").read_bytes())
    assert (manifest["format"], manifest["version"], manifest["strategy"]) == ("ollm-kv", 2, "test")
    assert manifest["lifecycle"] == "runtime-scoped"
    put(storage, b"x")
    assert bytes.fromhex(manifest["store_id"]) in file_of(storage).read_bytes()


@pytest.mark.parametrize("segment", [-1, 10**6])
def test_a_segment_number_that_has_no_file_name_is_refused(storage: SegmentedStorage, segment: int) -> None:
    with pytest.raises(ConfigurationError, match="out of range"):
        put(storage, b"x", segment=segment)


def test_any_flipped_bit_of_a_record_is_noticed(storage: SegmentedStorage) -> None:
    extent = put(storage, random.Random(1).randbytes(300))
    used = ALIGNMENT + extent.location.nbytes
    densely = [*range(8 * 90), *range(8 * ALIGNMENT, 8 * used), *range(8 * 90, 8 * ALIGNMENT, 61)]
    for bit in some(densely, 300):
        flip(file_of(storage), bit)
        with pytest.raises(CorruptDataError, match=r"Layer 0, tokens 0\.\.1, in .*segment-000000.kv at 4096"):
            get(storage, extent)
        flip(file_of(storage), bit)
    assert len(get(storage, extent)) == 300


def test_a_flipped_bit_of_the_padding_does_no_harm(storage: SegmentedStorage) -> None:
    extent = put(storage, b"abc")
    damaged = bytearray(file_of(storage).read_bytes())
    damaged[-1] ^= 1
    file_of(storage).write_bytes(damaged)
    assert get(storage, extent) == b"abc"


def test_truncation_at_any_length_is_noticed(storage: SegmentedStorage) -> None:
    whole, cut = put(storage, b"first"), put(storage, random.Random(2).randbytes(900))
    offset = cut.location.offset
    end = offset + cut.location.nbytes
    lengths = {*range(end - 1, offset - 30, -1), *range(offset - 30, offset - ALIGNMENT, -113)}
    for length in sorted(lengths, reverse=True):
        with file_of(storage).open("r+b") as file:
            file.truncate(length)
        with pytest.raises(CorruptDataError, match="is cut off"):
            get(storage, cut)
    assert get(storage, whole) == b"first"


def test_records_that_changed_places_are_noticed(storage: SegmentedStorage) -> None:
    first, second = (put(storage, bytes([number]) * 10, start=number) for number in range(2))
    record = file_of(storage).read_bytes()
    file_of(storage).write_bytes(record[2 * ALIGNMENT :] + record[: 2 * ALIGNMENT])
    for extent in (first, second):
        with pytest.raises(CorruptDataError, match="another record lies here"):
            get(storage, extent)


def test_a_record_of_another_cache_is_noticed(storage: SegmentedStorage, tmp_path: Path) -> None:
    other = open_storage(tmp_path)
    extent = put(storage, b"ours")
    assert put(other, b"ours") == extent
    file_of(storage).write_bytes(file_of(other).read_bytes())
    with pytest.raises(CorruptDataError, match="of another cache"):
        get(storage, extent)


@pytest.mark.parametrize("change", [{"layer": 1}, {"branch": 1}, {"start": 1}, {"tokens": 2}, {"rows": 2}], ids=str)
@pytest.mark.parametrize("read", [get, lambda storage, extent: get_pieces(storage, extent, 0, 4)], ids=["all", "part"])
def test_asking_for_another_block_than_was_written_is_noticed(
    storage: SegmentedStorage, change: dict[str, int], read
) -> None:
    extent = put(storage, b"abcd")
    with pytest.raises(CorruptDataError, match="another record lies here"):
        read(storage, attrs.evolve(extent, key=attrs.evolve(extent.key, **change)))
    with pytest.raises(CorruptDataError, match="another record lies here"):
        read(storage, attrs.evolve(extent, layout=attrs.evolve(extent.layout, kv_heads=2)))
    assert read(storage, extent) == b"abcd"


@pytest.mark.parametrize(
    "change",
    [{"nbytes": 3}, {"encoded": True}, {"segment": 1}, {"segment": -1}, {"offset": 0}, {"offset": 8192}],
    ids=str,
)
def test_asking_where_nothing_was_written_is_noticed(storage: SegmentedStorage, change: dict[str, int]) -> None:
    extent = put(storage, b"abcd")
    extent = attrs.evolve(extent, location=attrs.evolve(extent.location, **change))
    with pytest.raises(CorruptDataError, match=r"not in this storage|no segment"):
        get(storage, extent)
    with pytest.raises(CorruptDataError, match=r"not in this storage|no segment"):
        storage.read_pieces(storage.pieces(extent, 0, 2), aligned_buffer(ALIGNMENT))


def test_a_buffer_that_is_too_small_is_refused_before_anything_is_read(storage: SegmentedStorage) -> None:
    extent = put(storage, bytes(5000))
    for read in (
        lambda buffer: storage.read([extent], buffer),
        lambda buffer: storage.read_pieces(storage.pieces(extent, 0, 5000), buffer),
    ):
        with pytest.raises(ConfigurationError, match=r"4096 bytes does not take the (8192|12288)"):
            read(aligned_buffer(4096))
    assert storage.stats().bytes_read == 0


@pytest.mark.parametrize(("verify", "hashed"), [("always", 6), ("first", 2), ("never", 0)])
def test_payloads_are_hashed_as_often_as_verify_says(
    tmp_path: Path, verify: str, hashed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path, verify=verify)
    extents = [put(storage, b"one"), put(storage, b"two")]
    count = itertools.count()
    real = records.xxhash.xxh3_64_intdigest
    monkeypatch.setattr(records.xxhash, "xxh3_64_intdigest", lambda content: (next(count), real(content))[1])
    for extent in extents * 3:
        get(storage, extent)
    assert next(count) == hashed


def test_the_first_read_of_a_record_is_verified_also_where_another_one_was(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, verify="first")
    old = put(storage, b"old")
    get(storage, old)
    storage.free(locations(old))
    new = put(storage, b"new")
    assert new == old
    record = file_of(storage).read_bytes()
    file_of(storage).write_bytes(record.replace(b"new", b"old"))
    with pytest.raises(CorruptDataError, match="does not match its hash"):
        get(storage, new)


def test_headers_are_compared_even_if_nothing_is_verified(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, verify="never")
    extent = put(storage, b"abc")
    file_of(storage).write_bytes(bytes(2 * ALIGNMENT))
    with pytest.raises(CorruptDataError, match="not a record of version 2"):
        get(storage, extent)


@pytest.mark.parametrize("verify", ["first", "never"])
def test_a_record_that_was_replaced_by_a_sound_one_with_other_bytes_is_noticed(tmp_path: Path, verify: str) -> None:
    storage = open_storage(tmp_path, verify=verify)
    extent = put(storage, b"ours")
    assert get(storage, extent) == b"ours"
    file = file_of(storage)
    begins = records.identity(
        bytes.fromhex(json.loads((storage.path / "manifest.json").read_bytes())["store_id"]),
        extent.key, extent.layout, extent.location,
    )  # fmt: skip
    header = records.make_header(begins, memoryview(b"them"))
    file.write_bytes(header.ljust(ALIGNMENT, b"\0") + b"them".ljust(ALIGNMENT, b"\0"))
    with pytest.raises(CorruptDataError, match="replaced by another one"):
        get(storage, extent)
    if verify == "first":  # a part is compared by hashes alone, those of the record that was written
        with pytest.raises(CorruptDataError, match="does not match its hash"):
            get_pieces(storage, extent, 0, 4)


def test_max_disk_bytes_is_kept_and_named(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, max_disk_bytes=5 * ALIGNMENT)
    kept = [put(storage, b"a" * 10), put(storage, b"b" * 10, segment=1)]
    with pytest.raises(DiskFullError, match=r"need 8\.0 KiB more in .*, but 16\.0 KiB of max_disk_bytes=20\.0 KiB"):
        put(storage, b"c", segment=2)
    assert [get(storage, extent) for extent in kept] == [b"a" * 10, b"b" * 10]
    storage.free(locations(*kept[:1]))
    put(storage, b"c")


def test_a_hole_that_a_record_leaves_counts_and_one_that_it_fills_does_not(tmp_path: Path) -> None:
    """What is between counts as used: `at` may lie behind the end of the file, or between two records."""
    storage = open_storage(tmp_path, max_disk_bytes=6 * ALIGNMENT)
    first = put(storage, b"a", at=0)
    with pytest.raises(DiskFullError, match=r"need 20\.0 KiB more in .*, but 8\.0 KiB of max_disk_bytes=24\.0 KiB"):
        put(storage, b"b", at=4 * ALIGNMENT + ALIGNMENT)
    last = put(storage, b"b", at=4 * ALIGNMENT)
    assert storage.stats().disk_bytes == 6 * ALIGNMENT
    middle = put(storage, b"c", at=2 * ALIGNMENT)
    assert [get(storage, extent) for extent in (first, middle, last)] == [b"a", b"c", b"b"]
    with pytest.raises(DiskFullError):
        put(storage, b"d")
    storage.close()


def test_min_free_bytes_is_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class AlmostFull(FaultyDisk):
        def free_bytes(self, path: Path) -> int:
            return 12 * ALIGNMENT

    monkeypatch.setattr(shim, "disk", AlmostFull())
    put(open_storage(tmp_path, min_free_bytes=10 * ALIGNMENT), b"fits")
    storage = open_storage(tmp_path, min_free_bytes=10 * ALIGNMENT + 1)
    with pytest.raises(DiskFullError, match=r"need 8\.0 KiB more in .*, and of 48\.0 KiB free 40\.0 KiB must stay"):
        put(storage, b"x")
    assert storage.stats().disk_bytes == 0


def test_space_is_reused_once_freed_and_never_before(storage: SegmentedStorage) -> None:
    first, middle, last = (put(storage, bytes([number]) * 5000) for number in range(3))
    storage.free(locations(middle))
    behind = put(storage, b"d")
    assert behind.location.offset > last.location.offset
    storage.free(locations(last, behind))
    assert file_of(storage).stat().st_size == storage.stats().disk_bytes == middle.location.offset - ALIGNMENT
    again = put(storage, b"e")
    assert again.location.offset == middle.location.offset
    assert get(storage, first) == bytes(5000)
    storage.free(locations(first, again))
    assert storage.stats().disk_bytes == file_of(storage).stat().st_size == 0


def test_a_freed_record_cannot_be_read_and_may_be_freed_again(storage: SegmentedStorage) -> None:
    kept, gone = put(storage, b"kept"), put(storage, b"gone")
    for _ in range(2):
        storage.free(locations(gone))
        with pytest.raises(CorruptDataError, match="is not in this storage"):
            get(storage, gone)
    assert get(storage, kept) == b"kept"


def test_bytes_are_counted(storage: SegmentedStorage) -> None:
    extent = put(storage, bytes(5000))
    get(storage, extent), get(storage, extent)
    storage.free(locations(extent))
    stats = storage.stats()
    assert (stats.bytes_written, stats.bytes_read) == (3 * ALIGNMENT, 2 * 3 * ALIGNMENT)
    assert (stats.disk_bytes, stats.memory_bytes) == (0, 0)


def test_a_closed_storage_says_so(storage: SegmentedStorage) -> None:
    extent = put(storage, b"x")
    storage.close()
    for use in (lambda: put(storage, b"y"), lambda: get(storage, extent)):
        with pytest.raises(CacheClosedError):
            use()
    storage.free(locations(extent))  # a reader that ends late has nothing left to give up
    assert storage.stats().disk_bytes == 0


def test_a_forked_child_can_neither_use_nor_damage_the_storage_of_its_parent(storage: SegmentedStorage) -> None:
    extent = put(storage, b"ours")

    def use() -> None:
        for action in (
            lambda: get(storage, extent),
            lambda: put(storage, b"y"),
            lambda: storage.free(locations(extent)),
        ):
            with pytest.raises(CacheForkedError):
                action()
        storage.close()

    in_child(use)
    assert get(storage, extent) == b"ours"


def test_reads_come_as_bytes_on_the_host(storage: SegmentedStorage) -> None:
    (raw,) = read_raw(storage, put(storage, b"abc"))
    assert (raw.dtype, raw.device.type, raw.tolist()) == (torch.uint8, "cpu", [97, 98, 99])


def test_the_storage_refuses_a_place_that_is_held(storage: SegmentedStorage) -> None:
    first = put(storage, bytes(5000), at=8192)
    assert first.location.offset == 8192 + 4096
    for at in (0, 4096, 8192, 12288, 16384, 5, -4096):
        with pytest.raises(StoreContractError, match="are not free in segment 0"):
            put(storage, bytes(5000), at=at)
    assert put(storage, bytes(5000), at=20480).location.offset == 20480 + 4096
    storage.free(locations(first))
    assert put(storage, bytes(5000), at=0).location.offset == 4096


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_write_that_cannot_be_handed_over_gives_its_place_and_its_buffer_back(
    storage: SegmentedStorage, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], when: str
) -> None:
    """However often: neither the file nor the buffers fill up, and what was handed over all the same does no harm."""
    kept, submit = put(storage, b"kept"), IOScheduler.submit

    def interrupted(self: IOScheduler, *arguments: object) -> object:
        if when == "after":
            submit(self, *arguments)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(IOScheduler, "submit", interrupted)
        for _ in range(2 * WRITE_BUFFERS):
            with pytest.raises(error):
                put(storage, b"lost", flush=False)
    storage.flush()
    assert storage.stats().disk_bytes == file_of(storage).stat().st_size == 8192
    again = [put(storage, bytes([number]), flush=False) for number in range(2 * WRITE_BUFFERS)]
    assert again[0].location.offset == kept.location.offset + 8192
    assert [get(storage, extent) for extent in (kept, *again)] == [
        b"kept",
        *(bytes([n]) for n in range(2 * WRITE_BUFFERS)),
    ]


def test_numbers_may_be_asked_for_while_files_are_made(storage: SegmentedStorage) -> None:
    """By another thread: `stats` walks the segments."""
    storage.submit(lambda: None).result()
    asked = [storage.submit(lambda: [storage.stats() for _ in range(50)]) for _ in range(4)]
    for segment in range(200):
        put(storage, b"x", segment=segment, flush=False)
    storage.flush()
    assert all(len(future.result()) == 50 for future in asked)
    assert storage.stats().disk_bytes == 200 * 8192


PIECE = 2**15


@pytest.fixture
def large(storage: SegmentedStorage) -> tuple[Extent, bytes]:
    """Three pieces and a bit."""
    payload = random.Random(3).randbytes(3 * PIECE + 777)
    return put(storage, payload, segment=2), payload


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 1, (0, PIECE)),
        (PIECE - 1, PIECE, (0, PIECE)),
        (PIECE, PIECE + 1, (PIECE, 2 * PIECE)),
        (PIECE - 1, PIECE + 1, (0, 2 * PIECE)),
        (3 * PIECE, 3 * PIECE + 1, (3 * PIECE, 3 * PIECE + 777)),
        (0, 3 * PIECE + 777, (0, 3 * PIECE + 777)),
    ],
)
def test_a_part_is_in_the_fewest_pieces(
    storage: SegmentedStorage, large: tuple[Extent, bytes], start: int, stop: int, expected: tuple[int, int]
) -> None:
    extent, payload = large
    pieces = storage.pieces(extent, start, stop)
    assert (pieces.extent, pieces.start, pieces.stop) == (extent, *expected)
    before = storage.stats().bytes_read
    assert get_pieces(storage, extent, start, stop) == payload[start:stop]
    assert storage.stats().bytes_read - before == expected[1] - expected[0], "and not a byte more"


@pytest.mark.parametrize("verify", ["always", "first"])
def test_every_flipped_bit_of_a_piece_is_noticed_and_none_outside_is_read(tmp_path: Path, verify: str) -> None:
    storage = open_storage(tmp_path, verify=verify)
    payload = random.Random(5).randbytes(2 * PIECE + 300)
    extent = put(storage, payload)
    get(storage, extent)  # that all was verified once says nothing of a later read of a part
    begin = 2 * PIECE  # the last piece, of 300 bytes
    for bit in some(range(8 * begin, 8 * len(payload)), 120):
        flip(file_of(storage), 8 * ALIGNMENT + bit)
        with pytest.raises(CorruptDataError, match=r"Layer 0, tokens 0\.\.1, in .* piece 2 of the payload"):
            get_pieces(storage, extent, begin, begin + 1)
        flip(file_of(storage), 8 * ALIGNMENT + bit)
    for bit in (*range(0, 8 * begin, 4099), 8 * begin - 1):
        flip(file_of(storage), 8 * ALIGNMENT + bit)
    assert get_pieces(storage, extent, begin, len(payload)) == payload[begin:]
    for part in (0, 1):
        with pytest.raises(CorruptDataError, match=f"piece {part} of the payload"):
            get_pieces(storage, extent, part * PIECE, part * PIECE + 1)


def test_a_part_is_not_verified_where_nothing_is(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, verify="never")
    extent = put(storage, bytes(100))
    flip(file_of(storage), 8 * ALIGNMENT)
    assert get_pieces(storage, extent, 0, 100) == b"\1" + bytes(99)


def test_a_part_that_is_cut_off_is_noticed(storage: SegmentedStorage, large: tuple[Extent, bytes]) -> None:
    extent, payload = large
    with file_of(storage, 2).open("r+b") as file:
        file.truncate(ALIGNMENT + 2 * PIECE)
    assert get_pieces(storage, extent, 0, 2 * PIECE) == payload[: 2 * PIECE]
    with pytest.raises(CorruptDataError, match="is cut off"):
        get_pieces(storage, extent, 2 * PIECE, 2 * PIECE + 1)


def test_a_part_that_the_system_cannot_read_is_a_typed_error(
    storage: SegmentedStorage, large: tuple[Extent, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    extent, payload = large
    with monkeypatch.context() as patch:
        patch.setattr(shim, "disk", FaultyDisk(FAULTS["input/output error"], lasting=True))
        with pytest.raises(StorageError, match="Cannot read Layer 0, tokens 0"):
            get_pieces(storage, extent, 0, 1)
    assert get_pieces(storage, extent, 0, 1) == payload[:1]
