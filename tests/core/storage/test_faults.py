"""Every single operation on the disk goes wrong once, in every way: all or nothing, and a typed error."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from core.storage.storage_fixtures import (
    DIRECTORY,
    commit,
    committed_extents,
    get,
    get_pieces,
    locations,
    open_storage,
    put,
    reopen,
    tree,
)
from ollm.contracts.blocks import Extent
from ollm.errors import DiskFullError, OllmError, StorageError
from ollm.io import files, shim
from ollm.io.shim import Disk
from ollm.storage.segments import SegmentedStorage
from ollm.testing.case import depth
from ollm.testing.faults import FAULTS, OPERATIONS, Fault, FaultyDisk, fails
from ollm.testing.processes import in_child

INTERRUPTIONS = (KeyboardInterrupt, MemoryError)
EMPTY_ROOT = {DIRECTORY, f"{DIRECTORY}/lock", f"{DIRECTORY}/CACHEDIR.TAG"}


def attempt(action: Callable[[], Any], errors: list[BaseException]) -> Any:
    """The result of an action, which may fail once; the second attempt must succeed."""
    try:
        return action()
    except (OllmError, *INTERRUPTIONS) as error:  # anything else, such as a bare OSError, fails the test
        errors.append(error)
        return action()


def scenario(cache_dir: Path, disk: FaultyDisk, errors: list[BaseException], monkeypatch: pytest.MonkeyPatch) -> int:
    """Create, write, read, free, commit, write again and close, with a check of everything after every step.

    Returns how many operations there were before `close`.
    """
    with monkeypatch.context() as patch:
        patch.setattr(shim, "disk", disk)
        storage: SegmentedStorage = attempt(lambda: open_storage(cache_dir, verify="always"), errors)
        use(storage, errors)
        before_close = len(disk.operations)
        attempt(storage.close, errors)
    return before_close


def use(storage: SegmentedStorage, errors: list[BaseException]) -> None:
    model: dict[Extent, bytes] = {}

    def write(payload: bytes, segment: int) -> None:
        extent = attempt(lambda: put(storage, payload, segment=segment, start=len(model), flush=False), errors)
        assert extent not in model
        model[extent] = payload

    def check() -> None:
        for extent, payload in model.items():
            assert attempt(lambda extent=extent: get(storage, extent), errors) == payload
            assert attempt(lambda extent=extent: get_pieces(storage, extent, 3, 9), errors) == payload[3:9]

    for payload, segment in ((b"a" * 10, 0), (b"b" * 5000, 1), (b"c" * 4096, 0)):
        write(payload, segment)
        check()
    freed = list(model)[-1]
    attempt(lambda: storage.free(locations(freed)), errors)
    del model[freed]
    check()
    attempt(lambda: commit(storage, model), errors)
    assert committed_extents(storage) == tuple(model)
    write(b"d" * 20, 0)
    check()


def chosen(sound: FaultyDisk, fault: str) -> list[tuple[int, str]]:
    """The operations that fail, one at a time: in `make nightly` all; else every third, not the same for each fault, so
    that over all faults each does."""
    operations = list(enumerate(sound.operations))
    return operations if depth(1) > 1 else operations[list(FAULTS).index(fault) % 3 :: 3]


def open_files() -> set[str]:
    """What this process has open, except for the listing itself."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return set(links)


@pytest.fixture(params=[True, False], ids=["unbuffered", "buffered"])
def unbuffered(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As the file system is said to be, without asking it."""
    mounts = {os.stat(tmp_path).st_dev: request.param}
    monkeypatch.setattr(files, "_unbuffered_mounts", mounts)
    return request.param


def test_the_scenario_uses_every_operation_that_a_session_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbuffered: bool
) -> None:
    disk = FaultyDisk()
    scenario(tmp_path, disk, [], monkeypatch)
    for_durability = {"fsync", "fsync_folder"}  # of which a cache that goes with its session needs none
    unused = for_durability | {"make_buffered"} | ({"forget_cached"} if unbuffered else set())
    assert set(OPERATIONS) - set(disk.operations) == unused
    assert tree(tmp_path) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_anywhere_costs_no_byte_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, unbuffered: bool
) -> None:
    sound = FaultyDisk()
    before_close = scenario(tmp_path, sound, [], monkeypatch)
    before = open_files()
    for at, name in chosen(sound, fault):
        cache_dir = tmp_path / f"{at}-{name}"
        errors: list[BaseException] = []
        scenario(cache_dir, FaultyDisk(FAULTS[fault], at), errors, monkeypatch)
        interrupted = any(isinstance(error, INTERRUPTIONS) for error in errors)
        refused = any("Cannot remove" in str(error) for error in errors)
        where = f"{fault} at operation {at}, {name}: {errors} left {tree(cache_dir)}"
        if at < before_close and not interrupted:
            assert tree(cache_dir) == [], where
        if not interrupted and not refused:
            assert set(tree(cache_dir)) <= EMPTY_ROOT, where
        open_storage(cache_dir).close()  # what could not be removed goes with the next session
        assert tree(cache_dir) == [], where
    if "after" not in fault:  # an interrupt right behind `open` loses the descriptor, in any Python program
        assert open_files() == before


@pytest.mark.parametrize("fault", ["no room", "input/output error", "file too large, half written", "no progress"])
def test_a_disk_that_stays_broken_gives_typed_errors_until_it_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    disk = FaultyDisk()
    monkeypatch.setattr(shim, "disk", disk)
    storage = open_storage(tmp_path)
    extent = put(storage, b"kept")
    monkeypatch.setattr(shim, "disk", FaultyDisk(FAULTS[fault], lasting=True))
    for action in (
        lambda: put(storage, b"x"),
        lambda: put(storage, b"x", segment=1),
        lambda: get(storage, extent),
        lambda: open_storage(tmp_path),
    ):
        with pytest.raises(OllmError):
            action()
    monkeypatch.setattr(shim, "disk", disk)
    assert get(storage, extent) == b"kept"
    assert get(storage, put(storage, b"again", segment=1)) == b"again"
    monkeypatch.setattr(shim, "disk", FaultyDisk(FAULTS[fault], lasting=True))
    if fault != "no progress":
        with pytest.raises(StorageError, match="Cannot remove"):
            storage.close()
    monkeypatch.setattr(shim, "disk", disk)
    open_storage(tmp_path).close()
    assert fault == "no progress" or tree(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
@pytest.mark.parametrize("operation", ["open", "pwrite"])
def test_no_room_is_called_that_and_names_what_was_needed_and_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, code: int
) -> None:
    storage = open_storage(tmp_path)

    class Full(FaultyDisk):
        def free_bytes(self, path: Path) -> int:
            return 3 * 2**20

    disk = Full(only(operation, fails(code)), lasting=True)
    monkeypatch.setattr(shim, "disk", disk)
    with pytest.raises(DiskFullError, match=r"took no 12\.0 KiB more .* \(.*; 3\.0 MiB free\)"):
        put(storage, bytes(5000))
    disk.heal()
    assert get(storage, put(storage, bytes(5000))) == bytes(5000)


def only(operation: str, fault: Fault) -> Fault:
    """That fault for operations of one kind."""
    works: Fault = lambda name, arguments: getattr(Disk(), name)(*arguments)  # noqa: E731
    return lambda name, arguments: (fault if name == operation else works)(name, arguments)


def test_a_write_torn_at_any_byte_by_the_system_itself_adds_nothing(tmp_path: Path) -> None:
    def check() -> None:
        storage = open_storage(tmp_path)
        kept = put(storage, b"kept" * 1000)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for limit in (8192, 8193, 8192 + 60, 12287, 12288, 12289, 13000, 16383):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(DiskFullError, match="File too large"):
                put(storage, b"torn" * 1500)
            assert get(storage, kept) == b"kept" * 1000
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            again = put(storage, b"torn" * 1500)
            assert get(storage, again) == b"torn" * 1500
            storage.free(locations(again))
        storage.close()

    in_child(check)
    assert tree(tmp_path) == []


def test_a_read_that_comes_in_pieces_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FaultyDisk(FAULTS["short"], lasting=True)
    monkeypatch.setattr(shim, "disk", disk)
    storage = open_storage(tmp_path)
    payload = bytes(range(256)) * 40
    assert get(storage, put(storage, payload)) == payload
    assert min(disk.operations.count(name) for name in ("pread_into", "pwrite")) > 10


Tables = list[list[Extent]]
"""What was reported as committed, and what was to be next, if something went wrong then."""


def lives(cache_dir: Path, disk: FaultyDisk, tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that is kept writes and commits twice, with more behind it that it never commits; so does the next one
    over its folder. Until something goes wrong."""
    with monkeypatch.context() as patch:
        patch.setattr(shim, "disk", disk)
        path = None
        for life in range(2):
            storage = reopen(path) if path else open_storage(cache_dir, keep=True)
            path = storage.path
            try:
                storage.adopt(tables[-1])
                for _ in range(2):
                    before = tables[-1]
                    tables.append([*before, put(storage, b"%d" % life, segment=life, start=len(before))])
                    put(storage, b"not committed", segment=life, start=99)
                    commit(storage, tables[-1], durable=True)
                    del tables[:-1]
            finally:
                storage.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_anywhere_loses_nothing_that_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    sound = FaultyDisk()
    lives(tmp_path / "sound", sound, [[]], monkeypatch)
    found = set()
    for at, name in enumerate(sound.operations):
        cache_dir = tmp_path / f"{at}-{name}"
        tables: Tables = [[]]
        with suppress(OllmError, *INTERRUPTIONS):  # anything else, such as a bare OSError, fails the test
            lives(cache_dir, FaultyDisk(FAULTS[fault], at), tables, monkeypatch)
        where = f"{fault} at operation {at}, {name}"
        entries = [path.parent for path in cache_dir.glob(f"{DIRECTORY}/entry-*/manifest.json")]
        if not entries:
            assert tables == [[]], f"{where}: nothing is left"
            continue
        storage = reopen(entries[0])
        table = list(committed_extents(storage))
        assert table in tables, where
        storage.adopt(table)
        assert [get(storage, extent) for extent in table] == [b"0", b"0", b"1", b"1"][: len(table)], where
        found.add(len(table))
        storage.close()
    assert found == ({4} if fault == "short" else {0, 1, 2, 3, 4})
