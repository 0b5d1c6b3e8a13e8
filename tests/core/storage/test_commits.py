"""Commits, and storages that go on from one: the table that was written down, its bytes, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import hypothesis.strategies as st
import pytest
from hypothesis import given

from core.storage.storage_fixtures import (
    DIRECTORY,
    block_of,
    commit,
    committed_extents,
    file_of,
    flip,
    get,
    get_pieces,
    layout_of,
    locations,
    open_storage,
    put,
    reopen,
    tree,
)
from ollm.contracts.blocks import BlockKey, Extent, KVBlock, Location
from ollm.errors import (
    CacheBusyError,
    CacheClosedError,
    CacheForkedError,
    CorruptDataError,
    StorageError,
    StoreContractError,
)
from ollm.io import shim
from ollm.io.buffers import ALIGNMENT
from ollm.io.shim import Disk
from ollm.storage import manifest, records
from ollm.storage.folder import CacheFolder
from ollm.storage.kept import KeptEntry, KeptLayer
from ollm.storage.records import record_span
from ollm.storage.segments import SegmentedStorage
from ollm.testing.case import some
from ollm.testing.processes import in_child

BLOCK = 2 * ALIGNMENT
"""What a small record takes."""


@pytest.fixture
def storage(tmp_path: Path) -> SegmentedStorage:
    storage = open_storage(tmp_path, keep=True)
    yield storage
    storage.close()


def payload(number: int, size: int = 100) -> bytes:
    return random.Random(number).randbytes(size)


def filled(storage: SegmentedStorage, count: int = 3, *, segment: int = 0) -> list[Extent]:
    """So many records of one layer, from position 0."""
    return [put(storage, payload(number), segment=segment, layer=segment, start=number) for number in range(count)]


def committed(storage: SegmentedStorage, count: int = 3) -> list[Extent]:
    """The same, committed, and the storage closed."""
    extents = filled(storage, count)
    commit(storage, extents)
    storage.close()
    return extents


def adopted(path: Path, **options: Any) -> tuple[SegmentedStorage, tuple[Extent, ...]]:
    """A storage that goes on from the last commit, and what that lists."""
    storage = reopen(path, **options)
    storage.adopt(committed_extents(storage))
    return storage, committed_extents(storage)


def test_what_was_committed_is_found_again_cut_extents_as_they_are(storage: SegmentedStorage) -> None:
    block, key = block_of(payload(0)), BlockKey(layer=0, branch=0, start=0, tokens=4, rows=1)
    block = KVBlock(block.keys.expand(1, 1, 4, 1), block.values.expand(1, 1, 4, 99))
    first = Extent(key, block.layout, storage.write(block, key, segment=0), visible=3)
    second = put(storage, payload(1), branch=1, start=3)
    other = put(storage, payload(2), segment=7, layer=2, branch=3)
    commit(storage, [first, second, other])
    assert committed_extents(storage) == (first, second, other)
    storage.close()
    again, found = adopted(storage.path)
    assert found == (first, second, other)
    expected = [payload(0)[:1] * 4 + payload(0)[1:] * 4, payload(1), payload(2)]
    assert [get(again, extent) for extent in found] == expected
    assert get_pieces(again, first, 10, 20) == expected[0][10:20]
    again.close()


def test_a_new_storage_has_committed_nothing(storage: SegmentedStorage) -> None:
    assert committed_extents(storage) == ()
    put(storage, b"not committed")
    storage.close()
    again, found = adopted(storage.path)
    assert found == ()
    assert again.stats().disk_bytes == 0
    assert not file_of(again).exists()
    again.close()


def test_a_commit_takes_the_place_of_the_one_before(storage: SegmentedStorage) -> None:
    extents = filled(storage, 4)
    for count in (4, 1, 3):
        commit(storage, extents[:count])
        assert committed_extents(storage) == tuple(extents[:count])
        raw = json.loads((storage.path / "manifest.json").read_bytes())
        (layer,) = raw["layers"]
        assert (layer["tokens"], len(layer["runs"][0]["frames"])) == (count, count)
    storage.close()
    assert reopened_table(storage.path) == tuple(extents[:3])


def reopened_table(path: Path) -> tuple[Extent, ...]:
    storage = reopen(path)
    storage.close()
    return committed_extents(storage)


def test_the_checksum_in_the_manifest_is_that_of_the_header(storage: SegmentedStorage) -> None:
    (extent,) = filled(storage, 1)
    commit(storage, [extent])
    (frame,) = json.loads((storage.path / "manifest.json").read_bytes())["layers"][0]["runs"][0]["frames"]
    header = file_of(storage).read_bytes()[: 68 + 2 * 8]
    assert frame == [1, 1, 100, f"{int.from_bytes(header[-8:], 'little'):016x}"]


def test_a_window_and_a_batch_that_was_reordered_are_found_again(storage: SegmentedStorage) -> None:
    """What left a window is not listed, and rows that stand for others are."""
    sinks, first, second = (put(storage, payload(start), start=start) for start in (0, 7, 8))
    layer = KeptLayer(0, (KeptEntry(sinks, (0, 0)), KeptEntry(first, (0, 0)), KeptEntry(second, (0, 0))), 9, 7)
    empty = KeptLayer(2, (), 9, 9)
    storage.commit([layer, empty])
    storage.close()
    again = reopen(storage.path)
    assert again.committed == (layer, empty)
    again.adopt(committed_extents(again))
    assert [get(again, extent) for extent in (sinks, first, second)] == [payload(start) for start in (0, 7, 8)]
    again.close()


def test_another_number_of_visible_tokens_is_noticed(storage: SegmentedStorage) -> None:
    """Nothing else would tell that the last extent was not cut there."""
    block, key = block_of(payload(0)), BlockKey(layer=0, branch=0, start=0, tokens=4, rows=1)
    block = KVBlock(block.keys.expand(1, 1, 4, 1), block.values.expand(1, 1, 4, 99))
    extent = Extent(key, block.layout, storage.write(block, key, segment=0), visible=3)
    commit(storage, [extent])
    storage.close()
    path = storage.path / "manifest.json"
    changed = path.read_bytes().replace(b"[4,3,", b"[4,2,").replace(b'"tokens":3', b'"tokens":2')
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    with pytest.raises(CorruptDataError, match="was changed"):
        reopen(storage.path)


def test_commits_are_compacted_as_the_storage_was_told(tmp_path: Path) -> None:
    for compact_from, runs in ((1, 1), (4, 1), (5, 4)):
        storage = open_storage(tmp_path, keep=True, compact_from=compact_from)
        extents = filled(storage, 4)
        commit(storage, extents)
        assert len(json.loads((storage.path / "manifest.json").read_bytes())["layers"][0]["runs"]) == runs
        storage.close()
        assert reopened_table(storage.path) == tuple(extents)


def test_live_bytes_are_never_overwritten_after_reopening(storage: SegmentedStorage) -> None:
    """A hole between two records is used again; what was written goes around those that are there."""
    extents = filled(storage, 5)
    storage.free(locations(extents[1], *extents[3:]))
    commit(storage, extents[:1])
    storage.close()
    again, kept = reopen(storage.path), [extents[0], extents[2]]
    again.adopt(kept)
    new = [put(again, payload(10), start=10), put(again, payload(11), start=11, at=BLOCK)]
    spans = sorted(record_span(extent.location) for extent in (*kept, *new))
    assert spans == [(number * BLOCK, (number + 1) * BLOCK) for number in range(4)]
    assert [get(again, extent) for extent in (*kept, *new)] == [payload(number) for number in (0, 2, 10, 11)]
    again.close()


def test_what_is_behind_the_last_record_is_dropped(storage: SegmentedStorage) -> None:
    extents = committed(storage, 2)
    with file_of(storage).open("ab") as file:
        file.write(b"garbage" * 10_000)
    (storage.path / "segment-000005.kv").write_bytes(b"of a store that was killed")
    again, _ = adopted(storage.path)
    assert file_of(again).stat().st_size == again.stats().disk_bytes == 2 * BLOCK
    assert tree(again.path) == ["lock", "manifest.json", "segment-000000.kv"]
    assert put(again, b"next", start=2).location.offset == 2 * BLOCK + ALIGNMENT
    assert get(again, extents[1]) == payload(1)
    again.close()


def test_what_is_not_adopted_is_free(storage: SegmentedStorage) -> None:
    extents = committed(storage, 3)
    again = reopen(storage.path)
    again.adopt(extents[:1])
    assert again.stats().disk_bytes == BLOCK
    with pytest.raises(CorruptDataError, match="is not in this storage"):
        get(again, extents[1])
    assert put(again, b"next", start=1).location.offset == extents[1].location.offset
    again.close()


def test_stores_that_go_on_from_each_other_grow_and_commit(storage: SegmentedStorage) -> None:
    extents = committed(storage, 1)
    for life in range(1, 4):
        again, found = adopted(storage.path)
        assert found == tuple(extents)
        extents.append(put(again, payload(life), start=life))
        commit(again, extents)  # most of it was never read here
        again.close()
    again, found = adopted(storage.path)
    assert [get(again, extent) for extent in found] == [payload(life) for life in range(4)]
    again.close()


def test_what_was_adopted_without_a_commit_can_be_committed(storage: SegmentedStorage) -> None:
    """The checksum is then read from the disk, and so is damage."""
    extents = filled(storage, 2)
    storage.close()
    again = reopen(storage.path)
    again.adopt(extents)
    flip(file_of(again), 8 * BLOCK + 100)
    with pytest.raises(CorruptDataError, match="cannot be trusted"):
        commit(again, extents)
    assert committed_extents(again) == ()
    flip(file_of(again), 8 * BLOCK + 100)
    commit(again, extents)
    again.close()
    assert reopened_table(storage.path) == tuple(extents)


def test_kill_9_behind_a_commit_leaves_the_commit(tmp_path: Path) -> None:
    def live() -> None:
        storage = open_storage(tmp_path, keep=True)
        extents = filled(storage)
        commit(storage, extents, durable=True)
        for number in range(3, 9):
            put(storage, payload(number), start=number)
        os.kill(os.getpid(), signal.SIGKILL)

    in_child(live, killed=True)
    (path,) = tmp_path.glob(f"{DIRECTORY}/entry-*")
    open_storage(tmp_path).close()  # whose tidying up leaves it alone
    storage, found = adopted(path)
    assert [get(storage, extent) for extent in found] == [payload(number) for number in range(3)]
    assert storage.stats().disk_bytes == file_of(storage).stat().st_size == 3 * BLOCK
    storage.close()


def test_a_commit_of_what_is_not_there_changes_nothing(storage: SegmentedStorage) -> None:
    extents = filled(storage, 2)
    commit(storage, extents)
    storage.free(locations(extents[1]))
    elsewhere = attrs.evolve(extents[1], location=attrs.evolve(extents[1].location, segment=9))
    for table in (extents, [extents[0], elsewhere]):
        with pytest.raises(CorruptDataError, match=r"is not in this storage|no segment 9"):
            commit(storage, table)
    gap = put(storage, b"x", start=7)
    with pytest.raises(CorruptDataError, match="leave a gap"):
        commit(storage, [extents[0], gap])
    storage.close()
    assert reopened_table(storage.path) == tuple(extents)


def test_a_closed_storage_and_a_forked_child_commit_and_adopt_nothing(storage: SegmentedStorage) -> None:
    extents = filled(storage, 1)

    def use() -> None:
        for action in (lambda: commit(storage, extents), lambda: storage.adopt(extents)):
            with pytest.raises(CacheForkedError):
                action()

    in_child(use)
    commit(storage, extents)
    storage.close()
    for action in (lambda: commit(storage, extents), lambda: storage.adopt(extents)):
        with pytest.raises(CacheClosedError):
            action()


def test_a_second_owner_is_refused(storage: SegmentedStorage) -> None:
    with pytest.raises(CacheBusyError):
        reopen(storage.path)
    assert get(storage, put(storage, b"still ours")) == b"still ours"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"strategy": "other"}, "strategy='test', not 'other'"),
        ({"parameters": {"size": 4}}, r"parameters=\{\}, not \{'size': 4\}"),
    ],
)
def test_another_strategy_or_other_parameters_are_refused(
    storage: SegmentedStorage, options: dict[str, Any], problem: str
) -> None:
    committed(storage)
    before = tree(storage.path)
    with pytest.raises(CorruptDataError, match=problem):
        reopen(storage.path, **options)
    assert tree(storage.path) == before
    adopted(storage.path)[0].close()


def test_options_that_change_no_byte_do_not_matter(tmp_path: Path) -> None:
    """And those that do are compared as they come back from JSON, which has no tuples."""
    parameters = {"sizes": (1, 2), "page_tokens": None}
    folder = CacheFolder.create(tmp_path, DIRECTORY, keep=True)
    storage = SegmentedStorage(folder, strategy="test", parameters=parameters)
    extents = committed(storage)
    again, found = adopted(storage.path, parameters=parameters, verify="never", max_disk_bytes=2**20, min_free_bytes=1)
    assert found == tuple(extents)
    again.close()


@pytest.mark.parametrize(
    "damage",
    {
        "another version": lambda raw: raw.replace(b'"version":2', b'"version":3'),
        "another lifecycle": lambda raw: raw.replace(b'"persistent"', b'"runtime-scoped"'),
        "cut off": lambda raw: raw[:-1],
        "empty": lambda raw: b"",
        "larger than any manifest": lambda raw: raw + b" " * manifest.MAX_MANIFEST_BYTES,
        "gone": lambda raw: None,
    }.items(),
    ids=lambda item: item[0],
)
def test_a_damaged_manifest_is_refused_and_nothing_is_changed(
    storage: SegmentedStorage, damage: tuple[str, Callable[[bytes], bytes | None]]
) -> None:
    committed(storage)
    path = storage.path / "manifest.json"
    raw = path.read_bytes()
    damaged = damage[1](raw)
    path.unlink() if damaged is None else path.write_bytes(damaged)
    before, threads = tree(storage.path), len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with pytest.raises(CorruptDataError, match=f"{storage.path.name} (cannot be gone on with|was written with)"):
            reopen(storage.path)
    assert tree(storage.path) == before
    assert len(os.listdir("/proc/self/fd")) == threads
    path.write_bytes(raw)
    adopted(storage.path)[0].close()


@pytest.mark.parametrize(
    "read", [get, lambda storage, extent: get_pieces(storage, extent, 0, 100)], ids=["all", "part"]
)
@pytest.mark.parametrize("verify", ["first", "never"])
def test_a_sound_record_that_was_exchanged_is_noticed_by_the_checksum_in_the_manifest(
    storage: SegmentedStorage, read: Callable[[SegmentedStorage, Extent], bytes], verify: str
) -> None:
    """Same cache, same key, same length: an older state of the very same file, say. Only the manifest tells."""
    (extent,) = filled(storage, 1)
    older = file_of(storage).read_bytes()
    storage.free(locations(extent))
    assert put(storage, payload(77)) == extent
    commit(storage, [extent])
    storage.close()
    newer = file_of(storage).read_bytes()
    for content, expected in ((newer, payload(77)), (older, None)):
        file_of(storage).write_bytes(content)
        again, _ = adopted(storage.path, verify=verify)
        if expected is None:
            with pytest.raises(CorruptDataError, match="replaced by another one that looks like it"):
                read(again, extent)
        else:
            assert read(again, extent) == expected
        again.close()


def test_any_flipped_bit_of_an_adopted_record_is_noticed(storage: SegmentedStorage) -> None:
    (extent,) = committed(storage, 1)
    densely = [
        *range(0, 8 * 84, 7),
        *range(8 * 84, 8 * ALIGNMENT, 2003),
        *range(8 * ALIGNMENT, 8 * ALIGNMENT + 800, 31),
    ]
    for bit in some(densely, 20):
        flip(file_of(storage), bit)
        again, _ = adopted(storage.path)
        for read in (get, lambda storage, extent: get_pieces(storage, extent, 0, 100)):
            with pytest.raises(CorruptDataError, match="cannot be trusted"):
                read(again, extent)
        again.close()
        flip(file_of(storage), bit)


@pytest.mark.parametrize("length", [0, 1, ALIGNMENT, 2 * BLOCK - 1])
def test_a_file_that_was_cut_is_refused_at_once(storage: SegmentedStorage, length: int) -> None:
    extents = committed(storage, 2)
    os.truncate(file_of(storage), length)
    again = reopen(storage.path)
    with pytest.raises(CorruptDataError, match="overlap or end behind the file"):
        again.adopt(extents)
    assert file_of(storage).stat().st_size == length, "what is left of it is left alone"
    again.close()


def test_a_file_that_is_gone_is_refused(storage: SegmentedStorage) -> None:
    extents = committed(storage)
    file_of(storage).unlink()
    again = reopen(storage.path)
    with pytest.raises(CorruptDataError, match="no segment 0"):
        again.adopt(extents)
    assert not file_of(again).exists(), "and it is not made"
    again.close()


def test_after_an_attempt_that_failed_nothing_of_it_is_written_to(storage: SegmentedStorage) -> None:
    """A file that it had opened, and that the next attempt does not keep, is gone, not written to without a name."""
    extents = committed(storage, 2)
    other = attrs.evolve(extents[0], location=attrs.evolve(extents[0].location, segment=3))
    before, again = len(os.listdir("/proc/self/fd")), reopen(storage.path)
    held = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CorruptDataError, match="no segment 3"):
        again.adopt([*extents, other])
    assert len(os.listdir("/proc/self/fd")) == held
    again.adopt(())
    new = put(again, b"new")
    assert file_of(again).stat().st_size == BLOCK
    commit(again, [new])
    again.close()
    assert len(os.listdir("/proc/self/fd")) == before
    again, found = adopted(storage.path)
    assert [get(again, extent) for extent in found] == [b"new"]
    again.close()


def test_what_is_to_stay_is_adopted_once_before_anything_else(storage: SegmentedStorage) -> None:
    """Else what was written meanwhile would be taken for free."""
    extents = committed(storage, 2)
    again, _ = adopted(storage.path)
    with pytest.raises(StoreContractError, match="adopt what is to stay once"):
        again.adopt(())
    assert [get(again, extent) for extent in extents] == [payload(0), payload(1)]
    again.close()
    new = open_storage(storage.path.parent.parent)
    extent = put(new, b"mine")
    with pytest.raises(StoreContractError, match="adopt what is to stay once"):
        new.adopt(())
    assert get(new, extent) == b"mine"
    new.close()


@pytest.mark.parametrize("fails", ["replace", "lstat"])
def test_a_storage_that_cannot_be_made_leaves_no_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Before its manifest is there, and just behind that."""
    folder = CacheFolder.create(tmp_path, DIRECTORY, keep=True)

    class Failing(Disk):
        def replace(self, source: Path, target: Path) -> None:
            self.fail("replace")
            super().replace(source, target)

        def lstat(self, path: Path) -> os.stat_result:
            if Path(path).name == "manifest.json":
                self.fail("lstat")
            return super().lstat(path)

        def fail(self, name: str) -> None:
            if name == fails:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(shim, "disk", Failing())
        with pytest.raises(StorageError):
            SegmentedStorage(folder, strategy="test")
    assert tree(tmp_path) == []


FAR = 2**62
HOSTILE = {
    "before the file": {"offset": 0},
    "far before the file": {"offset": -FAR},
    "not aligned": {"offset": ALIGNMENT + 1},
    "behind the file": {"offset": 3 * BLOCK + ALIGNMENT},
    "far behind the file": {"offset": FAR},
    "over the next": {"nbytes": ALIGNMENT + 1},
    "longer than the file": {"nbytes": FAR},
    "of negative length": {"nbytes": -ALIGNMENT - 1},
    "of very negative length": {"nbytes": -FAR},
    "in the place of the next": {"offset": BLOCK + ALIGNMENT},
    "in no file": {"segment": 1},
    "in a file of negative number": {"segment": -1},
    "in a file without a name": {"segment": 10**6},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_extents_that_cannot_be_where_they_are_said_to_be_are_refused(
    storage: SegmentedStorage, change: dict[str, int]
) -> None:
    """All or nothing: afterwards the true table can be adopted, and no byte has changed."""
    extents = committed(storage, 3)
    before = file_of(storage).read_bytes()
    hostile = [attrs.evolve(extents[0], location=attrs.evolve(extents[0].location, **change)), *extents[1:]]
    again = reopen(storage.path)
    for table in (hostile, hostile[::-1], [*extents, extents[1]]):
        with pytest.raises(CorruptDataError, match=r"no segment|overlap or end behind"):
            again.adopt(table)
    assert file_of(storage).read_bytes() == before
    again.adopt(extents)
    assert [get(again, extent) for extent in extents] == [payload(number) for number in range(3)]
    again.close()


@given(st.lists(st.tuples(st.integers(-2, 6), st.integers(-2, 9000)), min_size=1, max_size=4))
def test_any_places_are_adopted_if_they_are_apart_and_inside_the_file(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]]
) -> None:
    """Against a count of who takes which block of the file."""
    storage = open_storage(tmp_path_factory.mktemp("kept"), keep=True)
    committed(storage, 3)  # six blocks
    extents = [
        Extent.of(BlockKey(0, 0, number, 1, 1), layout_of(1), Location(nbytes, 0, block * ALIGNMENT))
        for number, (block, nbytes) in enumerate(places)
    ]
    taken = [at for block, nbytes in places for at in range(block - 1, block - (-nbytes // ALIGNMENT))]
    sound = all(nbytes >= 0 for _, nbytes in places) and len(set(taken)) == len(taken) and set(taken) <= set(range(6))
    again = reopen(storage.path)
    if sound:
        again.adopt(extents)
        assert again.stats().disk_bytes == (max(taken) + 1) * ALIGNMENT
    else:
        with pytest.raises(CorruptDataError):
            again.adopt(extents)
    again.close()
    shutil.rmtree(storage.path)


class Watching(Disk):
    """Notes what is done to which file, in order; one step may fail."""

    STEPS = ("pwrite", "fsync", "replace", "fsync_folder")

    def __init__(self, fails: int | None = None) -> None:
        self.steps: list[tuple[str, str]] = []
        self._fails = fails

    def _note(self, name: str, path: str) -> None:
        self.steps.append((name, Path(path).name))
        if self._fails == len(self.steps) - 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        self._note("pwrite", os.readlink(f"/proc/self/fd/{fd}"))
        return super().pwrite(fd, buffer, offset)

    def fsync(self, fd: int) -> None:
        self._note("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        super().fsync(fd)

    def replace(self, source: Path, target: Path) -> None:
        self._note("replace", str(target))
        super().replace(source, target)

    def fsync_folder(self, path: Path) -> None:
        self._note("fsync_folder", str(path))
        super().fsync_folder(path)


def durable_steps(storage: SegmentedStorage) -> list[tuple[str, str]]:
    """What a durable commit of segments 0 and 3 does, once the records are written."""
    return [
        ("fsync", "segment-000000.kv"),
        ("fsync", "segment-000003.kv"),
        ("pwrite", "manifest.json.tmp"),
        ("fsync", "manifest.json.tmp"),
        ("replace", "manifest.json"),
        ("fsync_folder", storage.path.name),
    ]


def in_two_segments(storage: SegmentedStorage) -> list[Extent]:
    return [put(storage, payload(0)), put(storage, payload(1), segment=3, start=1)]


def test_a_durable_commit_syncs_the_files_then_the_manifest_then_its_name(
    storage: SegmentedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    extents = in_two_segments(storage)
    late = put(storage, payload(2), segment=3, start=2, flush=False)
    disk = Watching()
    with monkeypatch.context() as patch:
        patch.setattr(shim, "disk", disk)
        commit(storage, [*extents, late], durable=True)
        late_write = [("pwrite", "segment-000003.kv")] * (disk.steps[0][0] == "pwrite")  # it may have been quick
        assert disk.steps == late_write + durable_steps(storage)
        disk.steps.clear()
        commit(storage, [*extents, late])
        assert disk.steps == [("pwrite", "manifest.json.tmp"), ("replace", "manifest.json")], "not asked for, not done"


@pytest.mark.parametrize("step", range(6))
def test_whatever_step_of_a_durable_commit_fails_a_whole_commit_is_readable(
    storage: SegmentedStorage, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The old one; only where the very last step failed, the new one, all of which is on the medium but its name."""
    old = in_two_segments(storage)
    commit(storage, old)
    new = [*old, put(storage, payload(2), start=2)]
    with monkeypatch.context() as patch:
        disk = Watching(fails=step)
        patch.setattr(shim, "disk", disk)
        with pytest.raises(StorageError, match="Input/output error"):
            commit(storage, new, durable=True)
    assert disk.steps == durable_steps(storage)[: step + 1]
    copy = storage.path.parent / "entry-0123456789abcdef"
    shutil.copytree(storage.path, copy)
    again, found = adopted(copy)
    assert found == tuple(new if step == 5 else old)
    assert [get(again, extent) for extent in found] == [payload(number) for number in range(len(found))]
    again.close()
    commit(storage, new)
    assert reopened_copy(storage) == tuple(new)


def reopened_copy(storage: SegmentedStorage) -> tuple[Extent, ...]:
    copy = storage.path.parent / "entry-00000000000000ff"
    shutil.copytree(storage.path, copy)
    return reopened_table(copy)


@pytest.mark.parametrize("step", range(6))
def test_after_a_file_that_could_not_be_synced_nothing_is_said_to_be_durable(
    storage: SegmentedStorage, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The system forgets what it could not write, and a second fsync succeeds all the same."""
    extents = in_two_segments(storage)
    with monkeypatch.context() as patch:
        patch.setattr(shim, "disk", Watching(fails=step))
        with pytest.raises(StorageError):
            commit(storage, extents, durable=True)
    if step < 2:
        with pytest.raises(StorageError, match=r"An earlier fsync in .* failed"):
            commit(storage, extents, durable=True)
        assert committed_extents(storage) == ()
    else:
        commit(storage, extents, durable=True)
        assert committed_extents(storage) == tuple(extents)


def test_the_header_of_an_adopted_record_is_read_once(
    storage: SegmentedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    (extent,) = committed(storage, 1)
    again, _ = adopted(storage.path)
    checks = []
    real = records.check_header
    monkeypatch.setattr("ollm.storage.segment.check_header", lambda *a: (checks.append(1), real(*a))[1])
    for _ in range(3):
        assert get_pieces(again, extent, 0, 100) == payload(0)
    assert len(checks) == 1
    again.close()
