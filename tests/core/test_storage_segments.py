"""Records in segments: right bytes or a typed error, limits, and the reuse of space."""

from __future__ import annotations

import itertools
import json
import random
import struct
from pathlib import Path

import attrs
import pytest
import torch

from core.storage_fixtures import as_tensor, get, open_storage, put, read_raw
from ollm.contracts.kv import Extent
from ollm.errors import (
    CacheClosedError,
    CacheForkedError,
    ConfigurationError,
    CorruptDataError,
    DiskFullError,
)
from ollm.io import shim
from ollm.io.buffers import ALIGNMENT
from ollm.storage import records
from ollm.storage.segments import SegmentedStorage
from ollm.testing.faults import FaultyDisk
from ollm.testing.processes import in_child

SIZES = [0, 1, 4095, 4096, 4097, 10_000]


def file_of(storage: SegmentedStorage, segment: int = 0) -> Path:
    return storage.path / f"segment-{segment:06d}.kv"


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
        assert extent.nbytes == len(payload)


def test_tensors_are_stored_one_behind_the_other_whatever_their_strides(storage: SegmentedStorage) -> None:
    bits = torch.arange(12, dtype=torch.int16).view(torch.bfloat16).reshape(3, 4)
    payload = [as_tensor(b"keys!"), bits.T, as_tensor(b"")]
    extent = storage.write(payload, segment=0, layer=1, start=2, tokens=3, rows=4, dtype="float16")
    assert extent == Extent(layer=1, start=2, tokens=3, rows=4, nbytes=29, segment=0, offset=ALIGNMENT)
    storage.flush()
    expected = b"keys!" + struct.pack("<12h", *(column + 4 * row for column in range(4) for row in range(3)))
    assert get(storage, extent) == expected
    assert file_of(storage).read_bytes()[ALIGNMENT:] == expected.ljust(ALIGNMENT, b"\0")


def test_neighbours_are_read_at_once(storage: SegmentedStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    payloads = [random.Random(size).randbytes(size) for size in SIZES]
    extents = [put(storage, payload) for payload in payloads]
    disk = FaultyDisk()
    monkeypatch.setattr(shim, "disk", disk)
    assert [raw.numpy().tobytes() for raw in read_raw(storage, *extents)] == payloads
    assert disk.operations.count("pread_into") == 1


def test_records_and_payloads_are_aligned(storage: SegmentedStorage) -> None:
    extents = [put(storage, bytes(size)) for size in SIZES]
    assert all(extent.offset % ALIGNMENT == 0 for extent in extents)
    assert file_of(storage).stat().st_size == storage.stats().disk_bytes
    assert storage.stats().disk_bytes == ALIGNMENT * (len(SIZES) + 0 + 1 + 1 + 1 + 2 + 3)


def test_the_manifest_says_whose_folder_it_is(storage: SegmentedStorage) -> None:
    manifest = json.loads((storage.path / "manifest.json").read_bytes())
    assert (manifest["format"], manifest["version"], manifest["strategy"]) == ("ollm-kv", 1, "test")
    assert manifest["lifecycle"] == "runtime-scoped"
    put(storage, b"x")
    assert bytes.fromhex(manifest["store_id"]) in file_of(storage).read_bytes()


@pytest.mark.parametrize("segment", [-1, 10**6])
def test_a_segment_number_that_has_no_file_name_is_refused(storage: SegmentedStorage, segment: int) -> None:
    with pytest.raises(ConfigurationError, match="out of range"):
        put(storage, b"x", segment=segment)


def test_any_flipped_bit_of_a_record_is_noticed(storage: SegmentedStorage) -> None:
    extent = put(storage, random.Random(1).randbytes(300))
    file, record = file_of(storage), file_of(storage).read_bytes()
    used = ALIGNMENT + extent.nbytes
    densely = [*range(8 * 80), *range(8 * ALIGNMENT, 8 * used), *range(8 * 80, 8 * ALIGNMENT, 61)]
    for bit in densely:
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(CorruptDataError, match=r"Layer 0, tokens 0\.\.1, in .*segment-000000.kv at 4096"):
            get(storage, extent)
    file.write_bytes(record)
    assert len(get(storage, extent)) == 300


def test_a_flipped_bit_of_the_padding_does_no_harm(storage: SegmentedStorage) -> None:
    extent = put(storage, b"abc")
    damaged = bytearray(file_of(storage).read_bytes())
    damaged[-1] ^= 1
    file_of(storage).write_bytes(damaged)
    assert get(storage, extent) == b"abc"


def test_truncation_at_any_length_is_noticed(storage: SegmentedStorage) -> None:
    whole, cut = put(storage, b"first"), put(storage, random.Random(2).randbytes(900))
    end = cut.offset + cut.nbytes
    lengths = {*range(end - 1, cut.offset - 30, -1), *range(cut.offset - 30, cut.offset - ALIGNMENT, -113)}
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


@pytest.mark.parametrize("change", [{"layer": 1}, {"start": 1}, {"tokens": 2}, {"rows": 2}, {"nbytes": 3}], ids=str)
def test_asking_for_another_record_than_was_written_is_noticed(
    storage: SegmentedStorage, change: dict[str, int]
) -> None:
    extent = put(storage, b"abcd")
    with pytest.raises(CorruptDataError, match="is not in this storage"):
        get(storage, attrs.evolve(extent, **change))


@pytest.mark.parametrize("change", [{"segment": 1}, {"segment": -1}, {"offset": 0}, {"offset": 8192}], ids=str)
def test_asking_where_nothing_was_written_is_noticed(storage: SegmentedStorage, change: dict[str, int]) -> None:
    extent = attrs.evolve(put(storage, b"abcd"), **change)
    with pytest.raises(CorruptDataError, match=r"not in this storage|no segment"):
        get(storage, extent)


@pytest.mark.parametrize(("verify", "hashed"), [("always", 6), ("first", 2), ("never", 0)])
def test_payloads_are_hashed_as_often_as_verify_says(
    tmp_path: Path, verify: str, hashed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path, verify=verify)
    extents = [put(storage, b"one"), put(storage, b"two")]
    count = itertools.count()
    real = records.payload_hash
    monkeypatch.setattr(records, "payload_hash", lambda payload: (next(count), real(payload))[1])
    for extent in extents * 3:
        get(storage, extent)
    assert next(count) == hashed


def test_the_first_read_of_a_record_is_verified_also_where_another_one_was(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, verify="first")
    old = put(storage, b"old")
    get(storage, old)
    storage.release([old])
    new = put(storage, b"new")
    assert new == old
    record = file_of(storage).read_bytes()
    file_of(storage).write_bytes(record.replace(b"new", b"old"))
    with pytest.raises(CorruptDataError, match="payload does not match"):
        get(storage, new)


def test_headers_are_compared_even_if_nothing_is_verified(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, verify="never")
    extent = put(storage, b"abc")
    file_of(storage).write_bytes(bytes(2 * ALIGNMENT))
    with pytest.raises(CorruptDataError, match="header is damaged"):
        get(storage, extent)


@pytest.mark.parametrize("verify", ["first", "never"])
def test_a_record_that_was_replaced_by_a_sound_one_with_other_bytes_is_noticed(tmp_path: Path, verify: str) -> None:
    storage = open_storage(tmp_path, verify=verify)
    extent = put(storage, b"ours")
    assert get(storage, extent) == b"ours"
    file = file_of(storage)
    asked, _ = records.decode_header(memoryview(file.read_bytes()[:ALIGNMENT]))
    header = records.encode_header(asked, records.payload_hash(memoryview(b"them")))
    file.write_bytes(header + b"them".ljust(ALIGNMENT, b"\0"))
    with pytest.raises(CorruptDataError, match="replaced by another one"):
        get(storage, extent)


def test_max_disk_bytes_is_kept_and_named(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, max_disk_bytes=5 * ALIGNMENT)
    kept = [put(storage, b"a" * 10), put(storage, b"b" * 10, segment=1)]
    with pytest.raises(DiskFullError, match=r"need 8\.0 KiB more in .*, but 16\.0 KiB of max_disk_bytes=20\.0 KiB"):
        put(storage, b"c", segment=2)
    assert [get(storage, extent) for extent in kept] == [b"a" * 10, b"b" * 10]
    storage.release(kept[:1])
    put(storage, b"c")


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


def test_space_is_reused_once_released_and_never_before(storage: SegmentedStorage) -> None:
    first, middle, last = (put(storage, bytes([number]) * 5000) for number in range(3))
    storage.release([middle])
    behind = put(storage, b"d")
    assert behind.offset > last.offset
    storage.release([last, behind])
    assert file_of(storage).stat().st_size == storage.stats().disk_bytes == middle.offset - ALIGNMENT
    again = put(storage, b"e")
    assert again.offset == middle.offset
    assert get(storage, first) == bytes(5000)
    storage.release([first, again])
    assert storage.stats().disk_bytes == file_of(storage).stat().st_size == 0


def test_a_released_record_cannot_be_read_and_may_be_released_again(storage: SegmentedStorage) -> None:
    kept, gone = put(storage, b"kept"), put(storage, b"gone")
    for _ in range(2):
        storage.release([gone])
        with pytest.raises(CorruptDataError, match="is not in this storage"):
            get(storage, gone)
    assert get(storage, kept) == b"kept"


def test_bytes_are_counted(storage: SegmentedStorage) -> None:
    extent = put(storage, bytes(5000))
    get(storage, extent), get(storage, extent)
    storage.release([extent])
    stats = storage.stats()
    assert (stats.bytes_written, stats.bytes_read) == (3 * ALIGNMENT, 2 * 3 * ALIGNMENT)
    assert (stats.disk_bytes, stats.memory_bytes) == (0, 0)


def test_a_closed_storage_says_so(storage: SegmentedStorage) -> None:
    extent = put(storage, b"x")
    storage.close()
    for use in (lambda: put(storage, b"y"), lambda: get(storage, extent)):
        with pytest.raises(CacheClosedError):
            use()
    storage.release([extent])  # a reader that ends late has nothing left to give up
    assert storage.stats().disk_bytes == 0


def test_a_forked_child_can_neither_use_nor_damage_the_storage_of_its_parent(storage: SegmentedStorage) -> None:
    extent = put(storage, b"ours")

    def use() -> None:
        for action in (lambda: get(storage, extent), lambda: put(storage, b"y"), lambda: storage.release([extent])):
            with pytest.raises(CacheForkedError):
                action()
        storage.close()

    in_child(use)
    assert get(storage, extent) == b"ours"


def test_reads_come_as_bytes_on_the_host(storage: SegmentedStorage) -> None:
    (raw,) = read_raw(storage, put(storage, b"abc"))
    assert (raw.dtype, raw.device.type, raw.tolist()) == (torch.uint8, "cpu", [97, 98, 99])
