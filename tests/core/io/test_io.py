"""Worker threads, buffers and the probe for unbuffered I/O."""

from __future__ import annotations

import errno
import logging
import os
import threading

import psutil
import pytest
import torch

from core.storage.storage_fixtures import DIRECTORY, get, open_storage, put, tree
from ollm.errors import MemoryLimitError
from ollm.io import buffers as buffers_module
from ollm.io import files, shim
from ollm.io import scheduler as scheduler_module
from ollm.io.buffers import ALIGNMENT, HUGE_PAGE, BufferPool, aligned_buffer, tensor_bytes
from ollm.io.ledger import MemoryLedger
from ollm.io.scheduler import WORKERS, scheduler_of
from ollm.storage.folder import CacheFolder
from ollm.storage.segments import SegmentedStorage
from ollm.testing.faults import FaultyDisk, fails


@pytest.mark.parametrize("nbytes", [0, 1, ALIGNMENT, ALIGNMENT + 1, 5 * 2**20])
def test_buffers_are_aligned_and_long_enough(nbytes):
    buffer = aligned_buffer(nbytes)
    assert buffer.data_ptr() % ALIGNMENT == 0
    assert buffer.numel() % ALIGNMENT == 0
    assert nbytes <= buffer.numel() < max(nbytes, 1) + ALIGNMENT
    buffer.fill_(7)


@pytest.mark.parametrize("more", [0, 1, 2**16])
def test_large_buffers_begin_where_a_huge_page_can(more):
    buffers = [aligned_buffer(HUGE_PAGE + more) for _ in range(5)]
    assert all(buffer.data_ptr() % HUGE_PAGE == 0 for buffer in buffers)


def test_a_large_buffer_takes_no_more_memory_than_it_is_long():
    process = psutil.Process()
    before = process.memory_info().rss
    buffers = [aligned_buffer(HUGE_PAGE + 2**16).fill_(7) for _ in range(20)]
    assert process.memory_info().rss - before < 20 * (HUGE_PAGE + 2**17)
    del buffers


class CountingDisk(shim.Disk):
    """Knows the length of every transfer."""

    def __init__(self):
        self.reads, self.writes = [], []

    def pread_into(self, fd, buffer, offset):
        self.reads.append(len(buffer))
        return super().pread_into(fd, buffer, offset)

    def pwrite(self, fd, buffer, offset):
        self.writes.append(len(buffer))
        return super().pwrite(fd, buffer, offset)


@pytest.mark.parametrize(
    ("nbytes", "requests"),
    [
        (0, []),
        (5, [5]),
        (2**20, [2**20]),
        (2**20 + 4096, [2**20 + 4096]),
        (3 * 2**19, [2**20, 2**19]),
        (3 * 2**20 + 4096, [2**20, 2**20, 2**20 + 4096]),
    ],
)
def test_requests_are_of_a_size_that_disks_like(tmp_path, monkeypatch, nbytes, requests):
    disk = CountingDisk()
    monkeypatch.setattr(shim, "disk", disk)
    content = bytes(os.urandom(nbytes))
    found = bytearray(nbytes)
    with (tmp_path / "file").open("w+b") as file:
        shim.write_all(file.fileno(), memoryview(content), 0)
        shim.read_into(file.fileno(), memoryview(found), 0)
    assert found == content
    assert disk.writes == disk.reads == requests


@pytest.mark.parametrize("unbuffered", [True, False])
def test_the_end_of_a_file_may_cut_off_what_is_not_needed(tmp_path, unbuffered):
    content = os.urandom(3 * ALIGNMENT + 100)
    (tmp_path / "file").write_bytes(content)
    buffer = tensor_bytes(aligned_buffer(4 * ALIGNMENT))
    fd = shim.disk.open(tmp_path / "file", os.O_RDONLY | shim.UNBUFFERED * unbuffered)
    file = files.DataFile(fd, unbuffered=unbuffered)
    file.read(buffer, 0, needed=len(content))
    assert bytes(buffer[: len(content)]) == content
    file.read(buffer, ALIGNMENT, needed=5)
    assert bytes(buffer[:5]) == content[ALIGNMENT : ALIGNMENT + 5]
    for needed in (len(content) + 1, None):
        with pytest.raises(EOFError, match="bytes are missing at offset 0"):
            file.read(buffer, 0, needed=needed)
    shim.disk.close(fd)


def test_what_must_outlast_a_power_failure_can_be_made_to_fail(tmp_path, monkeypatch):
    disk = FaultyDisk(fails(errno.EIO), 2, lasting=True, only=frozenset({"fsync", "fsync_folder"}))
    monkeypatch.setattr(shim, "disk", disk)
    with (tmp_path / "file").open("wb") as file:
        shim.disk.fsync(file.fileno())
        shim.disk.fsync_folder(tmp_path)
        with pytest.raises(OSError, match="Input/output"):
            shim.disk.fsync(file.fileno())
        with pytest.raises(OSError, match="Input/output"):
            shim.disk.fsync_folder(tmp_path)
    assert disk.operations == ["fsync", "fsync_folder"] * 2


def test_a_pool_makes_as_many_buffers_as_are_used_at_once_and_uses_them_again():
    pool = BufferPool("Buffers", 3, ALIGNMENT)
    assert pool.nbytes == 0
    first, _ = pool.take(10), pool.take(ALIGNMENT)
    assert pool.nbytes == 2 * ALIGNMENT
    pool.give_back(first)
    again = pool.take(5)
    assert again.data_ptr() == first.data_ptr()
    third = pool.take(1)
    assert not pool.has_free
    pool.give_back(third)
    larger = pool.take(3 * ALIGNMENT)
    assert larger.numel() == 3 * ALIGNMENT
    assert pool.nbytes == 5 * ALIGNMENT
    pool.close()
    pool.close()


def test_a_buffer_that_is_dropped_is_free_again():
    """Whoever is interrupted between taking one and giving it back has no way to do that."""
    pool = BufferPool("Buffers", 1, ALIGNMENT)
    for _ in range(3):
        buffer = pool.take(1)
        assert not pool.has_free
        part = buffer[:1]
        del buffer
        assert pool.has_free
    other = pool.take(1)
    assert other.data_ptr() != part.data_ptr(), "what somebody still reads or writes is not given to others"
    pool.close()


def test_a_pool_draws_on_the_ledger_and_gives_back(monkeypatch):
    ledger = MemoryLedger()
    monkeypatch.setattr(buffers_module, "ledger", ledger)
    cpu = torch.device("cpu")
    before = ledger.measure(cpu).host_free
    pool = BufferPool("Buffers", 4, 2**30 // 4)
    assert before - ledger.measure(cpu).host_free > 2**29
    pool.close()
    assert abs(before - ledger.measure(cpu).host_free) < 2**29
    with pytest.raises(MemoryLimitError, match=r"Read buffers need .* of memory on cpu, and of .* free"):
        BufferPool("Read buffers", 2, 2**49)


def test_a_disk_has_one_scheduler_whose_threads_end_with_its_last_user(tmp_path, workers):
    first, second = scheduler_of(tmp_path), scheduler_of(tmp_path)
    gate = threading.Barrier(WORKERS + 1)
    futures = [(first, second)[number % 2].submit(gate.wait, 30) for number in range(WORKERS)]
    gate.wait(30)  # all of them run at once
    for future in futures:
        future.result()
    assert len(workers()) == WORKERS
    for _ in range(2):  # the second time does nothing
        first.release()
    assert second.submit(lambda: 7).result() == 7
    second.release()
    assert workers() == []


def test_requests_start_in_order(tmp_path):
    scheduler, started = scheduler_of(tmp_path), []
    for future in [scheduler.submit(started.append, number) for number in range(100)]:
        future.result()
    assert sorted(started) == list(range(100))
    scheduler.release()


def test_a_storage_that_is_closed_or_dropped_ends_its_threads(tmp_path, workers):
    storage = open_storage(tmp_path)
    put(storage, b"x")
    assert workers() != []
    storage.close()
    assert workers() == []
    storage = open_storage(tmp_path)
    put(storage, b"x", flush=False)
    path = storage.path
    del storage
    assert workers() == []
    assert not path.exists()


def test_a_storage_whose_buffers_find_no_memory_leaves_no_folder_and_no_threads(tmp_path, workers):
    folder = CacheFolder.create(tmp_path, DIRECTORY)
    with pytest.raises(MemoryLimitError, match="Write buffers"):
        SegmentedStorage(folder, strategy="test", write_buffers=2**40)
    assert tree(tmp_path) == []
    assert scheduler_module._schedulers == {}
    assert workers() == []


@pytest.mark.parametrize("refusal", ["open", "pread_into"])
def test_a_mount_that_refuses_unbuffered_reads_is_asked_once_and_named_once(tmp_path, monkeypatch, caplog, refusal):
    monkeypatch.setattr(files, "_unbuffered_mounts", {})

    class Refusing(FaultyDisk):
        def open(self, path, flags, mode=0o600):
            if refusal == "open" and flags & shim.UNBUFFERED:
                raise OSError(errno.EINVAL, "no")
            return super().open(path, flags, mode)

        def pread_into(self, fd, buffer, offset):
            if refusal == "pread_into" and len(buffer) == ALIGNMENT:
                raise OSError(errno.EINVAL, "no")
            return super().pread_into(fd, buffer, offset)

    disk = Refusing()
    monkeypatch.setattr(shim, "disk", disk)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            storage = open_storage(tmp_path)
            assert not storage.unbuffered
            assert get(storage, put(storage, b"abc" * 5000)) == b"abc" * 5000
            storage.close()
    assert [record.message for record in caplog.records] == [
        f"The file system of {tmp_path / 'kv_cache_test'} takes no unbuffered reads: keys and values go through the "
        "page cache, and are dropped from it after use. A cache_dir on a local disk is faster."
    ]
    assert disk.operations.count("forget_cached") == 4


def test_a_file_that_refuses_later_is_read_and_written_buffered(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_unbuffered_mounts", {tmp_path.stat().st_dev: True})
    once = FaultyDisk(fails(errno.EINVAL), 0, only=frozenset({"pwrite"}))
    storage = open_storage(tmp_path)
    monkeypatch.setattr(shim, "disk", once)
    extent = put(storage, b"abc")
    assert get(storage, extent) == b"abc"
    assert once.operations == ["pwrite", "pwrite"]
    storage.close()


def test_a_user_that_is_collected_while_another_comes_ends_no_threads_of_it(monkeypatch, workers):
    """The lock can be entered by its own thread, as the garbage collector does."""
    first, join = scheduler_of(None), scheduler_module._Workers.join

    def collected(self):
        first.release()
        return join(self)

    monkeypatch.setattr(scheduler_module._Workers, "join", collected)
    second = scheduler_of(None)
    assert second.submit(lambda: 7).result() == 7
    second.release()
    assert workers() == []
