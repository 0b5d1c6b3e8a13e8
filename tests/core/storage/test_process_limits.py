"""A process that gets no more threads, descriptors or memory: a typed error each time, nothing lost, nothing left, and
it works again as soon as there are some. In children, which have real limits."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from core.storage.storage_fixtures import DIRECTORY, get, open_storage, put, tree
from ollm.errors import CacheForkedError, MemoryLimitError, OllmError, StorageError
from ollm.io import files, scheduler, shim
from ollm.io.files import takes_unbuffered
from ollm.io.scheduler import scheduler_of
from ollm.io.shim import Disk
from ollm.storage.folder import CacheFolder
from ollm.storage.options import WRITE_BUFFERS
from ollm.testing.processes import in_child

NOBODY = 65534


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


@contextmanager
def limited(what: int, value: int) -> Iterator[None]:
    """Until the end of the `with` block, a limit of this process."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


@pytest.mark.parametrize("has_threads", [False, True])
def test_without_new_threads_writing_is_a_typed_error_or_goes_on_with_those_that_there_are(
    open_to_all: Path, has_threads: bool
) -> None:
    """More often than there are buffers: an attempt that failed keeps none."""

    def child() -> None:
        if os.geteuid() == 0:  # whom no such limit holds
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        storage = open_storage(open_to_all)
        kept = {put(storage, b"before"): b"before"} if has_threads else {}
        with limited(resource.RLIMIT_NPROC, 1):
            for number in range(3 * WRITE_BUFFERS):
                payload = bytes([number])
                if has_threads:
                    kept[put(storage, payload, start=number)] = payload
                else:
                    with pytest.raises(StorageError, match="No thread reads or writes here"):
                        put(storage, payload, start=number)
        for number in range(3 * WRITE_BUFFERS):
            payload = b"after %d" % number
            kept[put(storage, payload, segment=1, start=number)] = payload
        for extent, payload in kept.items():
            assert get(storage, extent) == payload
        storage.close()

    in_child(child)
    assert tree(open_to_all) == []


def test_however_few_descriptors_there_are_it_works_or_is_a_typed_error_that_leaves_nothing(tmp_path: Path) -> None:
    """For every number of free ones from none: also when they come to an end between two steps, and at the end."""
    mounts = dict(files._unbuffered_mounts)

    def child() -> None:
        outcomes = []
        for free in range(12):
            cache_dir, others = tmp_path / str(free) / "cache", []
            files._unbuffered_mounts.clear()
            files._unbuffered_mounts.update(mounts)
            with limited(resource.RLIMIT_NOFILE, 200):
                with suppress(OSError):
                    while True:
                        others.append(os.dup(0))
                for _ in range(free):
                    os.close(others.pop())
                done, storage = 0, None
                with suppress(OllmError):
                    storage = open_storage(cache_dir)
                    for segment in range(2):
                        extent = put(storage, b"x", segment=segment)
                        assert get(storage, extent) == b"x"
                        done += 1
                if storage is not None:
                    storage.close()
                for fd in others:
                    os.close(fd)
            left = tree(tmp_path)
            assert left == ([] if storage is None else [str(free), f"{free}/cache"]), f"{free} free: {left}"
            if storage is not None:
                cache_dir.rmdir()
                cache_dir.parent.rmdir()
            outcomes.append((storage is not None, done))
        assert outcomes[0] == (False, 0)
        assert outcomes[-1] == (True, 2)
        assert len(set(outcomes)) >= 3, outcomes

    in_child(child)


def test_a_folder_is_removed_though_its_own_descriptor_is_the_only_one(tmp_path: Path) -> None:
    """To look into it takes one."""

    def child() -> None:
        for closing in (CacheFolder.close, CacheFolder.give_up):
            folder, others = CacheFolder.create(tmp_path, DIRECTORY), []
            with limited(resource.RLIMIT_NOFILE, 200):
                with suppress(OSError):
                    while True:
                        others.append(os.dup(0))
                closing(folder)
                for fd in others:
                    os.close(fd)
            assert tree(tmp_path) == []

    in_child(child)


def test_that_no_descriptor_is_left_says_nothing_of_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again, and may take unbuffered reads then."""
    sample = tmp_path / "sample"
    sample.write_bytes(b"content")
    monkeypatch.setattr(files, "_unbuffered_mounts", {})
    expected = takes_unbuffered(sample)
    files._unbuffered_mounts.clear()

    class Exhausted(Disk):
        def open(self, path: Path, flags: int, mode: int = 0o600) -> int:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(shim, "disk", Exhausted())
        with pytest.raises(OSError, match="Too many open files"):
            takes_unbuffered(sample)
    assert takes_unbuffered(sample) == expected


def test_memory_that_is_not_given_is_a_typed_error(tmp_path: Path) -> None:
    """Whatever the system says is free: here it may not have it."""

    def child() -> None:
        storage = open_storage(tmp_path)
        kept = put(storage, b"kept")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        with limited(resource.RLIMIT_AS, size + 2**20):
            from ollm.io.buffers import aligned_buffer

            with pytest.raises(MemoryLimitError, match=r"gives no 8\.0 MiB more of memory"):
                aligned_buffer(8 * 2**20)
            with pytest.raises(MemoryLimitError, match="of memory"):
                open_storage(tmp_path)._writes.buffer(4096)
            assert get(storage, kept) == b"kept"
        assert get(storage, put(storage, b"more", start=1)) == b"more"
        storage.close()

    in_child(child)
    assert tree(tmp_path) == []


def test_nobody_waits_in_a_child_for_what_a_thread_of_its_parent_was_to_do(tmp_path: Path) -> None:
    ours, gate = scheduler_of(tmp_path), os.pipe()
    running = [ours.submit(os.read, gate[0], 1) for _ in range(scheduler.WORKERS)]
    waiting, promised = ours.submit(list), scheduler.promise()

    def child() -> None:
        for future in (*running, waiting, promised):
            assert wait([future], timeout=0).done, "at once"
            with pytest.raises(CacheForkedError):
                future.result()
        with pytest.raises(CacheForkedError):
            ours.submit(list)
        ours.release()
        own = scheduler_of(tmp_path)
        assert own.submit(len, "own").result() == 3
        own.release()

    try:
        with ours._workers.executor._shutdown_lock:  # as whoever asks for a thread may, just then
            in_child(child, seconds=20)
    finally:
        os.write(gate[1], b"x" * len(running))
    assert [future.result(30) for future in running] == [b"x"] * len(running)
    assert waiting.result(30) == []
    promised.set_result(None)
    ours.release()
    assert not scheduler._open
    for fd in gate:
        os.close(fd)
