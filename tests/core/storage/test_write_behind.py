"""Records on their way to the disk: in the background, bounded, and never lost. Gates instead of clocks."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from concurrent.futures import wait

import pytest

from core.interrupts import interrupted
from core.storage.storage_fixtures import (
    commit,
    committed_extents,
    get,
    get_pieces,
    locations,
    open_storage,
    put,
    read_raw,
)
from ollm.errors import DiskFullError, StorageError
from ollm.io import shim
from ollm.io.scheduler import scheduler_of
from ollm.storage.options import WRITE_BUFFERS
from ollm.testing.faults import FaultyDisk
from ollm.testing.processes import watchdog

pytestmark = pytest.mark.timeout(60)


class Gate(FaultyDisk):
    """Writes wait until the gate is opened; then they work, or meet an error."""

    def __init__(self, code=None):
        super().__init__()
        self.opened = threading.Event()
        self.code = code

    def pwrite(self, fd, buffer, offset):
        assert self.opened.wait(30)
        if self.code is not None:
            raise OSError(self.code, os.strerror(self.code))
        return super().pwrite(fd, buffer, offset)


@pytest.fixture
def gate(monkeypatch):
    def make(code=None):
        gate = Gate(code)
        monkeypatch.setattr(shim, "disk", gate)
        return gate

    return make


@pytest.fixture
def storage(tmp_path):
    storage = open_storage(tmp_path)
    yield storage
    storage.close()


def test_writing_does_not_wait_for_the_disk_until_all_buffers_are_in_use(storage, gate):
    disk = gate()
    extents = [put(storage, bytes([number]), flush=False) for number in range(WRITE_BUFFERS)]
    assert storage.stats().bytes_written == 0
    done = []
    writer = threading.Thread(target=lambda: done.append(put(storage, b"one more", flush=False)))
    writer.start()
    assert not done, "the next one waits: that is the back-pressure"
    disk.opened.set()
    writer.join(30)
    storage.flush()
    assert [get(storage, extent) for extent in [*extents, *done]] == [
        *(bytes([n]) for n in range(WRITE_BUFFERS)),
        b"one more",
    ]
    assert storage.stats().bytes_written == 2 * 4096 * (WRITE_BUFFERS + 1)
    assert storage.buffer_bytes > 0


def test_a_read_waits_for_the_write_of_what_it_wants(storage, gate):
    disk = gate()
    extent = put(storage, b"wanted", flush=False)
    results = []
    reader = threading.Thread(target=lambda: results.append(get(storage, extent)))
    reader.start()
    assert not results
    disk.opened.set()
    reader.join(30)
    assert results == [b"wanted"]


def test_a_read_of_a_part_waits_too_and_asks_the_disk_for_no_header(storage, gate):
    """The header is known once the record is written, and before that there is none on the disk."""
    disk = gate()
    extent = put(storage, b"wanted", flush=False)
    part = storage.submit(get_pieces, storage, extent, 2, 5)
    assert not part.done()
    disk.opened.set()
    assert part.result(30) == b"nte"
    assert disk.operations.count("pread_into") == 1


def test_a_part_of_what_the_disk_refused_comes_from_memory(storage, gate):
    disk = gate(errno.EIO)
    payload = bytes(range(256)) * 300  # two pieces
    extent = put(storage, payload, flush=False)
    disk.opened.set()
    with pytest.raises(StorageError):
        storage.flush()
    for start, stop in ((0, 1), (2**15 - 1, 2**15 + 1), (2**15, len(payload))):
        assert get_pieces(storage, extent, start, stop) == payload[start:stop]
    disk.code = None
    storage.raise_failed()
    assert get_pieces(storage, extent, 2**15, 2**15 + 9) == payload[2**15 : 2**15 + 9], "from the disk"
    assert disk.operations.count("pread_into") == 1


def test_an_error_of_the_background_is_raised_once_then_tried_again_and_nothing_is_lost(storage, gate, monkeypatch):
    disk = gate(errno.ENOSPC)
    kept = put(storage, b"kept", flush=False)
    disk.opened.set()
    with pytest.raises(DiskFullError, match=r"took no 8\.0 KiB more"):
        storage.flush()
    assert get(storage, kept) == b"kept", "from memory"
    with pytest.raises(DiskFullError):
        storage.raise_failed()  # tried again, and still full
    disk.code = None
    storage.raise_failed()
    assert storage.stats().bytes_written == 8192
    assert get(storage, kept) == b"kept", "from the disk"
    assert get(storage, put(storage, b"more")) == b"more"


def test_when_every_buffer_holds_what_the_disk_refused_the_next_write_says_so(storage, gate):
    disk = gate(errno.EIO)
    extents = [put(storage, bytes([number]), flush=False) for number in range(WRITE_BUFFERS)]
    disk.opened.set()
    wait([write.future for write in storage._writes._writes.values()])  # each tells of its failure once
    for _ in range(WRITE_BUFFERS + 2):
        with pytest.raises(StorageError, match="Input/output error"):
            put(storage, b"no buffer left", flush=False)
    assert [get(storage, extent) for extent in extents] == [bytes([number]) for number in range(WRITE_BUFFERS)]
    disk.code = None
    assert get(storage, put(storage, b"again")) == b"again"
    assert [get(storage, extent) for extent in extents] == [bytes([number]) for number in range(WRITE_BUFFERS)]


def test_neighbours_of_which_one_is_only_in_memory_are_read_together(storage, gate, monkeypatch):
    first = put(storage, b"first")
    disk = gate(errno.EIO)
    second = put(storage, b"second", flush=False)
    disk.opened.set()
    with pytest.raises(StorageError):
        storage.flush()
    assert [raw.numpy().tobytes() for raw in read_raw(storage, first, second)] == [b"first", b"second"]


def test_what_was_freed_before_it_was_written_is_never_written_over_what_comes_after(storage, gate):
    disk = gate()
    gone = put(storage, b"gone", flush=False)
    freeing = threading.Thread(target=storage.free, args=(locations(gone),))
    freeing.start()
    disk.opened.set()
    freeing.join(30)
    after = put(storage, b"after")
    assert after.location.offset == gone.location.offset
    assert get(storage, after) == b"after"


def test_closing_gives_up_what_is_not_written_and_waits_for_what_is_being_written(tmp_path, gate):
    storage = open_storage(tmp_path)
    disk = gate()
    for number in range(WRITE_BUFFERS):
        put(storage, bytes([number]), flush=False)
    closing = threading.Thread(target=storage.close)
    closing.start()
    disk.opened.set()
    closing.join(30)
    assert list(tmp_path.iterdir()) == []
    storage.close()


def test_a_commit_waits_for_what_is_being_written_and_says_if_it_failed(tmp_path, gate):
    storage = open_storage(tmp_path)
    disk = gate(errno.EIO)
    extent = put(storage, b"wanted", flush=False)
    disk.opened.set()
    with pytest.raises(StorageError, match="Input/output error"):
        commit(storage, [extent])
    assert committed_extents(storage) == ()
    disk.code = None
    commit(storage, [extent])
    assert committed_extents(storage) == (extent,)
    assert storage.stats().bytes_written == 8192
    storage.close()


def test_without_a_thread_a_write_is_an_error_that_adds_nothing_and_costs_no_buffer(tmp_path, no_new_threads, workers):
    """However often it happens; and what can be written later is."""
    storage = open_storage(tmp_path)
    with no_new_threads():
        for _ in range(WRITE_BUFFERS + 2):
            with pytest.raises(StorageError, match=r"No thread .*ulimit"):
                put(storage, b"refused")
    assert storage.stats().disk_bytes == 0
    extents = [put(storage, bytes([number]), flush=False) for number in range(2 * WRITE_BUFFERS)]
    storage.flush()
    assert [get(storage, extent) for extent in extents] == [bytes([number]) for number in range(2 * WRITE_BUFFERS)]
    storage.close()
    assert workers() == []


def test_the_threads_that_there_are_do_all_the_work_where_no_more_can_be_had(tmp_path, no_new_threads, workers):
    storage = open_storage(tmp_path)
    put(storage, b"first")
    assert len(workers()) == 1
    with no_new_threads():
        gates = [storage.submit(threading.Event().wait, 0) for _ in range(20)]
        extents = [put(storage, bytes([number]), flush=False) for number in range(2 * WRITE_BUFFERS)]
        storage.flush()
        assert not any(gate.result() for gate in gates)
    assert [get(storage, extent) for extent in extents] == [bytes([number]) for number in range(2 * WRITE_BUFFERS)]
    storage.close()


def test_an_interrupt_while_a_failed_write_is_tried_again_leaves_nobody_waiting(tmp_path, gate, monkeypatch):
    for at in itertools.count():
        storage = open_storage(tmp_path)
        disk = gate(errno.EIO)
        extent = put(storage, b"kept", flush=False)
        disk.opened.set()
        with pytest.raises(StorageError):
            storage.flush()
        disk.code = None
        where = interrupted(storage.raise_failed, at)
        with watchdog(30):
            storage.flush()
            assert get(storage, extent) == b"kept", where
            for _ in range(WRITE_BUFFERS + 1):
                put(storage, b"more")
            storage.close()
        if not where:
            return


def test_what_was_asked_for_in_vain_is_never_run(tmp_path, monkeypatch, workers):
    """The thread pool has put it into its queue by the time that it finds no thread."""
    scheduler, ran = scheduler_of(tmp_path), []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            scheduler.submit(ran.append, "in vain")
    scheduler.submit(ran.append, "later").result()
    scheduler.release()
    assert ran == ["later"]
