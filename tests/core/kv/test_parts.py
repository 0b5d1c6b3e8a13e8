"""Some heads and tokens of extents: right, each piece read once, many reads in flight, and none after an error."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from core.storage.storage_fixtures import commit, file_of, flip, open_storage, reopen
from ollm.contracts.blocks import BlockKey, Extent, KVBlock
from ollm.contracts.storage import Pieces
from ollm.errors import CorruptDataError, StorageError
from ollm.io import shim
from ollm.io.buffers import ALIGNMENT
from ollm.io.scheduler import WORKERS
from ollm.io.shim import Disk
from ollm.kv.parts import Part, PartReader
from ollm.storage.options import MOST_READ_BYTES, PARTS_IN_FLIGHT
from ollm.storage.segments import SegmentedStorage

pytestmark = pytest.mark.timeout(60)

PIECE = 2**15


def numbers(
    rows: int, heads: int, tokens: int, key_size: int, value_size: int, dtype: torch.dtype, seed: int = 0
) -> KVBlock:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        torch.randint(-(2**7), 2**7, (rows, tokens, heads, size), generator=generator).to(dtype).transpose(1, 2)
        for size in (key_size, value_size)
    )
    return KVBlock(keys, values)


def write(storage: SegmentedStorage, block: KVBlock, *, layer: int = 0, flush: bool = True) -> Extent:
    rows, _, tokens, _ = block.keys.shape
    key = BlockKey(layer, 0, 0, tokens, rows)
    extent = Extent.of(key, block.layout, storage.write(block, key, segment=layer))
    if flush:
        storage.flush()
    return extent


def check(part: Part, found: KVBlock, block: KVBlock) -> None:
    """What was read is that slice of the whole."""
    heads, tokens = slice(part.heads.start, part.heads.stop), slice(part.tokens.start, part.tokens.stop)
    for ours, theirs in ((found.keys, block.keys), (found.values, block.values)):
        assert torch.equal(ours, theirs[:, heads, tokens])


class _Noting:
    """A storage that notes which pieces it is asked for."""

    def __init__(self, storage: SegmentedStorage, asked: list[Pieces]) -> None:
        self._storage = storage
        self._asked = asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def read_pieces(self, pieces: Pieces, buffer: Tensor) -> Tensor:
        self._asked.append(pieces)
        return self._storage.read_pieces(pieces, buffer)


class Counted(PartReader):
    """Notes which pieces the storage is asked for."""

    def __init__(self, storage: SegmentedStorage) -> None:
        self.asked: list[Pieces] = []
        super().__init__(_Noting(storage, self.asked))

    def pieces(self) -> list[tuple[Extent, int]]:
        """Each piece that was read, as often as it was."""
        return [(run.extent, at) for run in self.asked for at in range(run.start, run.stop, PIECE)]


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[SegmentedStorage]:
    storage = open_storage(tmp_path, keep=True)
    yield storage
    storage.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SegmentedStorage, list[tuple[Extent, KVBlock]]]]:
    """Extents of several shapes: smaller than a piece, exactly some pieces, keys and values of other sizes, and runs of
    a head that begin anywhere in a piece."""
    storage = open_storage(tmp_path_factory.mktemp("parts"))
    shapes: list[tuple[Any, ...]] = [
        (1, 1, 1, 1, 1, torch.uint8),
        (2, 3, 5, 8, 4, torch.float32),
        (1, 4, 512, 64, 64, torch.bfloat16),  # a head's keys are a piece
        (2, 2, 700, 60, 36, torch.bfloat16),
        (1, 2, 900, 128, 0, torch.float16),
        (1, 8, 4000, 16, 16, torch.float32),  # two mebibytes, of which a read takes a part
    ]
    written = []
    for seed, shape in enumerate(shapes):
        block = numbers(*shape, seed=seed)
        written.append((write(storage, block, layer=seed % 2), block))
    yield storage, written
    storage.close()


@given(data=st.data())
def test_any_parts_of_any_extents_are_the_slices_of_the_whole(
    shared: tuple[SegmentedStorage, list[tuple[Extent, KVBlock]]], data: st.DataObject
) -> None:
    storage, written = shared
    parts, blocks = [], []
    for number in data.draw(st.lists(st.integers(0, len(written) - 1), max_size=6)):
        extent, block = written[number]
        head = data.draw(st.integers(0, extent.layout.kv_heads))
        token = data.draw(st.integers(0, extent.key.tokens))
        heads = range(head, data.draw(st.integers(head, extent.layout.kv_heads)))
        parts.append(Part(extent, heads, range(token, data.draw(st.integers(token, extent.key.tokens)))))
        blocks.append(block)
    reader = Counted(storage)
    try:
        for part, found, block in zip(parts, reader.read(parts), blocks, strict=True):
            check(part, found, block)
        assert len(set(reader.pieces())) == len(reader.pieces()), "each piece once"
        assert all(run.start < run.stop <= run.start + MOST_READ_BYTES for run in reader.asked)
    finally:
        reader.close()


def test_no_piece_is_read_that_holds_nothing_of_what_is_wanted(storage: SegmentedStorage) -> None:
    """4 heads, each of which has one piece of keys and one of values."""
    block = numbers(1, 4, 256, 64, 64, torch.bfloat16)
    extent, reader = write(storage, block), Counted(storage)
    wanted = [Part(extent, range(2, 3), range(1)), Part(extent, range(1), range(244, 256))]
    for part, found in zip(wanted, reader.read(wanted), strict=True):
        check(part, found, block)
    assert sorted(at // PIECE for _, at in reader.pieces()) == [0, 1, 4, 5]
    assert len(reader.asked) == 2, "neighbours at once"
    reader.close()


def test_parts_that_lie_over_each_other_are_read_once_and_given_to_each(storage: SegmentedStorage) -> None:
    block = numbers(1, 2, 2048, 64, 64, torch.bfloat16)
    extent, reader = write(storage, block), Counted(storage)
    spans = (range(2048), range(100, 101), range(90, 1900), range(0), range(100, 101))
    parts = [Part(extent, range(2), tokens) for tokens in spans]
    for part, found in zip(parts, reader.read(parts), strict=True):
        check(part, found, block)
    assert len(reader.pieces()) == len(set(reader.pieces())) == extent.location.nbytes // PIECE
    reader.close()


def test_pieces_that_are_larger_than_a_read_are_read_one_by_one(
    storage: SegmentedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of an extent beyond 125 MiB are."""
    monkeypatch.setattr("ollm.kv.parts.MOST_READ_BYTES", PIECE // 2)
    block = numbers(1, 2, 2048, 64, 64, torch.bfloat16)
    extent, reader = write(storage, block), Counted(storage)
    part = Part(extent, range(2), range(100, 1900))
    check(part, *reader.read([part]), block)
    assert [run.stop - run.start for run in reader.asked] == [PIECE] * (extent.location.nbytes // PIECE)
    assert len(set(reader.pieces())) == len(reader.pieces())
    reader.close()


class Gate(Disk):
    """Reads wait until the gate is opened, and are counted; those of some numbers, from 0, meet an error then."""

    def __init__(self, fails: frozenset[int] = frozenset()) -> None:
        self.opened = threading.Event()
        self.full = threading.Semaphore(0)
        self.begun = self.now = self.most = 0
        self._fails = fails
        self._lock = threading.Lock()

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        with self._lock:
            number, self.begun = self.begun, self.begun + 1
            self.now += 1
            self.most = max(self.most, self.now)
        self.full.release()
        try:
            assert self.opened.wait(30)
            if number in self._fails:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().pread_into(fd, buffer, offset)
        finally:
            with self._lock:
                self.now -= 1


@pytest.fixture
def many(storage: SegmentedStorage) -> tuple[list[Part], list[KVBlock]]:
    """One token of one head of 3 × `PARTS_IN_FLIGHT` extents, each a read of its own."""
    blocks = [numbers(1, 1, 4, 8, 8, torch.float32, seed=seed) for seed in range(3 * PARTS_IN_FLIGHT)]
    extents = [write(storage, block, flush=False) for block in blocks]
    storage.flush()
    return [Part(extent, range(1), range(1, 3)) for extent in extents], blocks


def test_many_reads_are_in_flight_and_never_more_than_there_are_buffers(
    storage: SegmentedStorage, many: tuple[list[Part], list[KVBlock]], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, blocks = many
    submitted: list[int] = []
    done = threading.Event()
    real = storage.submit

    def submit(action: Any, *arguments: Any) -> Any:
        submitted.append(1)
        if len(submitted) == PARTS_IN_FLIGHT:
            done.set()
        return real(action, *arguments)

    gate, reader, results = Gate(), PartReader(storage), []
    monkeypatch.setattr(shim, "disk", gate)
    monkeypatch.setattr(storage, "submit", submit)
    reading = threading.Thread(target=lambda: results.extend(reader.read(parts)))
    reading.start()
    assert done.wait(30)
    for _ in range(WORKERS):
        assert gate.full.acquire(timeout=30)
    assert (gate.now, len(submitted)) == (WORKERS, PARTS_IN_FLIGHT), "all workers are at it, the others wait for them"
    assert reader.buffer_bytes == PARTS_IN_FLIGHT * MOST_READ_BYTES
    gate.opened.set()
    reading.join(30)
    for part, found, block in zip(parts, results, blocks, strict=True):
        check(part, found, block)
    assert gate.begun == len(parts)
    reader.close()
    assert reader.buffer_bytes == 0


@pytest.mark.parametrize("fails", [0, 5, PARTS_IN_FLIGHT + 3, 3 * PARTS_IN_FLIGHT - 1])
def test_after_an_error_nothing_is_in_flight_and_the_reader_goes_on(
    storage: SegmentedStorage, many: tuple[list[Part], list[KVBlock]], monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    parts, blocks = many
    reader, gate = PartReader(storage), Gate(frozenset({fails}))
    gate.opened.set()
    for _ in range(2):
        gate.begun = 0
        with monkeypatch.context() as patch:
            patch.setattr(shim, "disk", gate)
            with pytest.raises(StorageError, match="Input/output error"):
                reader.read(parts)
            begun = gate.begun
            storage.submit(lambda: None).result(30)
        assert (gate.now, gate.begun) == (0, begun), "nobody reads any more, and nobody begins to"
    for part, found, block in zip(parts, reader.read(parts), blocks, strict=True):
        check(part, found, block)
    reader.close()


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_interrupt_while_asking_leaves_nothing_in_flight(
    storage: SegmentedStorage,
    many: tuple[list[Part], list[KVBlock]],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    parts, blocks = many
    reader, real, count = PartReader(storage), storage.submit, []

    def submit(action: Any, *arguments: Any) -> Any:
        count.append(1)
        if len(count) == 10:
            raise error
        return real(action, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "submit", submit)
        with pytest.raises(error):
            reader.read(parts)
    for part, found, block in zip(parts, reader.read(parts), blocks, strict=True):  # which takes all buffers
        check(part, found, block)
    reader.close()


def test_memory_of_the_buffers_is_claimed_and_given_back(storage: SegmentedStorage, claims) -> None:
    reader = PartReader(storage)
    assert sum(claim.nbytes for claim in claims()) == PARTS_IN_FLIGHT * MOST_READ_BYTES
    reader.close()
    reader.close()
    assert claims() == []


@pytest.mark.parametrize("is_reopened", [False, True])
def test_a_damaged_piece_is_noticed_and_damage_elsewhere_is_not_read(
    storage: SegmentedStorage, is_reopened: bool
) -> None:
    block = numbers(1, 4, 256, 64, 64, torch.bfloat16)
    extent = write(storage, block)
    if is_reopened:
        commit(storage, [extent])
        storage.close()
        storage = reopen(storage.path)
        storage.adopt([extent])
    reader = PartReader(storage)
    flip(file_of(storage), 8 * (ALIGNMENT + 2 * PIECE + 12_345))  # in the keys of head 1
    for head in (0, 2, 3):
        part = Part(extent, range(head, head + 1), range(256))
        check(part, *reader.read([part]), block)
    with pytest.raises(CorruptDataError, match="piece 2 of the payload does not match"):
        reader.read([Part(extent, range(4), range(7, 8))])
    flip(file_of(storage), 8 * (ALIGNMENT + 2 * PIECE + 12_345))
    part = Part(extent, range(4), range(7, 8))
    check(part, *reader.read([part]), block)
    reader.close()
    storage.close()


def test_parts_of_a_record_that_is_being_written_or_was_refused_by_the_disk(
    storage: SegmentedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Writes(Disk):
        opened, works, reads = threading.Event(), False, 0

        def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
            assert self.opened.wait(30)
            if not self.works:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().pwrite(fd, buffer, offset)

        def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
            self.reads += 1
            return super().pread_into(fd, buffer, offset)

    disk = Writes()
    monkeypatch.setattr(shim, "disk", disk)
    block = numbers(1, 4, 512, 64, 64, torch.bfloat16)
    extent, reader, found = write(storage, block, flush=False), PartReader(storage), []
    part = Part(extent, range(1, 3), range(300, 400))
    reading = threading.Thread(target=lambda: found.extend(reader.read([part])))
    reading.start()
    disk.opened.set()
    reading.join(30)
    check(part, *found, block)
    assert disk.reads == 0, "from memory: the disk has nothing of it"
    disk.works = True
    with pytest.raises(StorageError):
        storage.raise_failed()
    storage.raise_failed()  # tries again
    check(part, *reader.read([part]), block)
    assert disk.reads > 0
    reader.close()
