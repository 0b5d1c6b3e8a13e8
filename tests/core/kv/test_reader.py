"""Reading ahead: counted, bounded, right under every change of plan, and gone when it should be."""

from __future__ import annotations

import errno
import itertools
import os
import threading

import pytest
import torch

from core.kv.engine_fixtures import ANY, EXTENT_BYTES, TOKENS, expected, extents_of, joined, make_session, tokens, walk
from ollm.builtin.chunked import ChunkedStore
from ollm.errors import CorruptDataError, StorageError
from ollm.io import shim
from ollm.io.buffers import ALIGNMENT
from ollm.kv import route
from ollm.storage.options import BUFFER_BYTES
from ollm.testing.faults import FaultyDisk, fails

pytestmark = pytest.mark.timeout(60)

LAYERS, EXTENTS = 3, 6


@pytest.fixture(autouse=True)
def one_extent_at_a_time(monkeypatch):
    """So that small tests have as many reads as large caches."""
    monkeypatch.setattr(route, "BUFFER_BYTES", EXTENT_BYTES + 2 * ALIGNMENT)


@pytest.fixture
def cache(tmp_path):
    session, layers = make_session(tmp_path, layers=LAYERS, extents=EXTENTS)
    yield session, layers
    session.close()
    assert list(tmp_path.iterdir()) == []


def check_step(layers, extents=EXTENTS):
    for index, layer in enumerate(layers):
        assert torch.equal(joined(walk(layer), extents * TOKENS), expected(index, extents))


class Watching(shim.Disk):
    """Notes every read, and can hold all of them back."""

    def __init__(self):
        self.reads = []
        self.opened = threading.Event()
        self.opened.set()
        self.waiting = 0
        self.changed = threading.Condition()

    def pread_into(self, fd, buffer, offset):
        with self.changed:
            self.reads.append((fd, offset))
            self.waiting += 1
            self.changed.notify_all()
        assert self.opened.wait(30)
        with self.changed:
            self.waiting -= 1
        return super().pread_into(fd, buffer, offset)

    def wait_for(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: self.waiting >= count, 30)


def test_a_step_reads_every_cold_extent_once_and_the_next_step_goes_on_where_it_ended(cache, monkeypatch):
    session, layers = cache
    disk = Watching()
    monkeypatch.setattr(shim, "disk", disk)
    for step in range(1, 4):
        check_step(layers)
        assert session.counters.loaded_bytes == step * LAYERS * EXTENTS * EXTENT_BYTES
        assert len(disk.reads) <= step * LAYERS * EXTENTS + session.plan.read_buffers
    assert len(set(disk.reads)) == LAYERS * EXTENTS


def test_reads_in_flight_reach_the_number_of_buffers_across_layers(cache, monkeypatch):
    session, layers = cache
    disk = Watching()
    monkeypatch.setattr(shim, "disk", disk)
    blocks = layers[0].handle(*tokens(1)).blocks(ANY)
    for _ in range(EXTENTS - 1):
        next(blocks)
    disk.opened.clear()
    before = len(session.source._reader._ahead)
    next_block = threading.Thread(target=lambda: next(blocks))
    next_block.start()
    disk.wait_for(1)
    disk.opened.set()
    next_block.join(30)
    assert before == len(session.source._reader._ahead) == session.plan.read_buffers - 1
    fds = {fd for fd, _ in disk.reads}
    assert len(fds) == 2, "the next layer is being read while this one is in use"
    assert session.source.buffer_bytes <= session.plan.read_buffers * BUFFER_BYTES
    blocks.close()
    assert len(session.source._reader._ahead) == 0


def test_memory_does_not_grow_over_many_steps(cache):
    session, layers = cache
    check_step(layers)
    first = session.source.buffer_bytes, len(session.source._reader._ahead)
    addresses = set()
    for _ in range(200):
        for layer in layers:
            for block in layer.handle(*tokens(1)).blocks(ANY):
                if block.start < EXTENTS * TOKENS:
                    addresses.add(block.keys.untyped_storage().data_ptr())
    assert (session.source.buffer_bytes, len(session.source._reader._ahead)) == first
    assert len(addresses) <= session.plan.read_buffers, "blocks are views of the same few buffers"


def test_an_interrupted_step_leaves_no_read_behind_and_the_next_one_is_right(cache):
    session, layers = cache
    check_step(layers)
    blocks = layers[1].handle(*tokens(1)).blocks(ANY)
    next(blocks)
    blocks.close()
    assert len(session.source._reader._ahead) == 0
    check_step(layers)


def test_layers_in_another_order_than_foreseen_are_right(cache):
    _, layers = cache
    for order in itertools.permutations(range(LAYERS)):
        for index in order:
            assert torch.equal(joined(walk(layers[index]), EXTENTS * TOKENS), expected(index, EXTENTS))


def test_what_grows_shrinks_and_is_written_anew_between_steps_is_read_as_it_is(cache):
    session, layers = cache
    check_step(layers)
    for index, layer in enumerate(layers):
        layer.append(*tokens(TOKENS, seed=100 * index + EXTENTS))
    check_step(layers, EXTENTS + 1)
    for layer in layers:
        layer.crop(2 * TOKENS)
    check_step(layers, 2)
    for layer in layers:
        layer.crop(0)
    assert len(session.source._reader._ahead) == 0
    assert session.store.stats().disk_bytes == 0
    for number in range(EXTENTS):
        for index, layer in enumerate(layers):
            layer.append(*tokens(TOKENS, seed=100 * index + number))
    check_step(layers)


def test_small_neighbours_are_read_together(tmp_path, monkeypatch):
    monkeypatch.undo()
    session, layers = make_session(tmp_path, layers=2, extents=EXTENTS)
    disk = Watching()
    monkeypatch.setattr(shim, "disk", disk)
    for step in range(1, 4):
        check_step(layers)
        assert len(disk.reads) <= 2 * step + 2
    session.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODEV], ids=errno.errorcode.get)
def test_an_error_in_any_read_surfaces_where_its_bytes_are_wanted(cache, monkeypatch, code):
    session, layers = cache
    total = LAYERS * EXTENTS
    for at in range(total):
        session.source.cancel_reads()
        disk = FaultyDisk(fails(code), at, lasting=True, only=frozenset({"pread_into"}))
        with monkeypatch.context() as patch:
            patch.setattr(shim, "disk", disk)
            with pytest.raises(StorageError, match=r"Cannot read Layer \d, tokens"):
                for _ in range(2):
                    check_step(layers)
            assert len(session.source._reader._ahead) == 0
        check_step(layers)


def test_a_read_ahead_that_failed_is_read_again_when_it_is_wanted(cache, monkeypatch):
    """The disk may have recovered meanwhile, or was interrupted by something else."""
    _, layers = cache
    check_step(layers)  # afterwards the first extents of the next step are being read ahead
    for at in range(LAYERS * EXTENTS):
        disk = FaultyDisk(fails(errno.EIO), at, only=frozenset({"pread_into"}))
        with monkeypatch.context() as patch:
            patch.setattr(shim, "disk", disk)
            for _ in range(2):
                check_step(layers)
        assert len(disk.operations) > at, "the fault was met"


def test_a_file_that_was_cut_is_an_error_and_no_hang(cache):
    session, layers = cache
    path = next(session.store.storage.path.glob("segment-000001*"))
    os.truncate(path, path.stat().st_size // 2)  # noqa: PTH
    with pytest.raises(CorruptDataError, match="is cut off"):
        check_step(layers)
    assert len(session.source._reader._ahead) == 0


def test_closing_in_the_middle_of_reading_joins_and_removes_everything(tmp_path, monkeypatch, workers):
    session, layers = make_session(tmp_path, layers=LAYERS, extents=EXTENTS)
    check_step(layers)
    disk = Watching()
    monkeypatch.setattr(shim, "disk", disk)
    disk.opened.clear()
    walking = layers[0].handle(*tokens(1)).blocks(ANY)
    next_block = threading.Thread(target=lambda: next(walking))
    next_block.start()
    disk.wait_for(1)
    disk.opened.set()
    next_block.join(30)
    session.close()
    session.close()
    assert list(tmp_path.iterdir()) == []
    assert workers() == []


class Slots(ChunkedStore):
    """Reuses the place of a freed record at once, as a ring does: every segment is one slot."""

    def __init__(self, storage):
        super().__init__(storage)
        self._free, self._next = [], itertools.count()

    def place(self, key, layout):
        return self._free[-1] if self._free else next(self._next), None

    def placed(self, extent):
        if extent.location.segment in self._free:
            self._free.remove(extent.location.segment)

    def free(self, locations):
        super().free(locations)
        self._free += [location.segment for location in locations]


def test_what_is_being_read_is_never_overwritten_by_a_store_that_reuses_its_slots(tmp_path, monkeypatch):
    """Reads are held back while the writer drops what they read and writes something else."""
    session, (layer,) = make_session(tmp_path, layers=1, extents=EXTENTS, store_type=Slots)
    handle = layer.handle(*tokens(1))
    disk = Watching()
    monkeypatch.setattr(shim, "disk", disk)
    disk.opened.clear()
    got = {}
    reading = threading.Thread(
        target=lambda: got.update({block.start: block.keys.clone() for block in handle.blocks(ANY)})
    )
    reading.start()
    disk.wait_for(1)
    layer.table.crop(0)
    assert session.table.due().free == (), "all of them are pinned"
    for number in range(3):
        layer.append(*tokens(TOKENS, seed=900 + number))
    disk.opened.set()
    reading.join(30)
    assert torch.equal(joined(got, EXTENTS * TOKENS), expected(0, EXTENTS))
    segments = {extent.location.segment for extent in extents_of(layer)}
    assert segments.isdisjoint(range(EXTENTS))
    layer.append(*tokens(TOKENS, seed=903))
    layer.append(*tokens(TOKENS, seed=904))
    assert {extent.location.segment for extent in extents_of(layer)} & set(range(EXTENTS)), "used again, once read"
    session.close()
