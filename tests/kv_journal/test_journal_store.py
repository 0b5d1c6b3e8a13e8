"""The journal: the contract, and when its table is compacted."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import hypothesis.strategies as st
import pytest
from hypothesis import given

from core.storage.golden_files import check_golden, fix_store_id, small_block
from ollm.plugin import KVBlock
from ollm.storage.kept import KeptEntry, extents_of
from ollm.testing import KVStoreTests, PluginTests, assert_holds, read_extent, store_context, write_blocks
from ollm.testing import random_block as block
from ollm.testing.case import kept_layers
from ollm_kv_journal.journal import JournalStore

GOLDEN = Path(__file__).parent / "golden"


def make(folder, entries=4, keep=False):
    storage = store_context(folder, keep=keep).storage(compact_from=entries)
    return JournalStore(storage)


class TestJournal(KVStoreTests):
    def open(self, context):
        return JournalStore(context.storage(compact_from=4))


class TestPlugin(PluginTests):
    distribution = "ollm-kv-journal"
    project = Path(__file__).parents[2] / "packages" / "ollm-kv-journal"


OF_TWO = {1: (0, 0), 2: None, 3: (2, 0)}
"""Which rows of an extent of so many a batch of two stands for."""


def append(store, table, tokens, *, rows=2, **place):
    """A frame behind a table."""
    start = table[-1].stop if table else 0
    table += write_blocks(store, [block(tokens, rows=rows, seed=start)], start=start, **place)


def rows_of(store, table):
    """The tokens of the frames of each row, as a commit writes them down. The batch has two rows now."""
    layers = [
        attrs.evolve(
            layer, entries=tuple(KeptEntry(entry.extent, OF_TWO[entry.extent.key.rows]) for entry in layer.entries)
        )
        for layer in kept_layers(table)
    ]
    store.storage.commit(layers)
    content = json.loads((store.storage.path / "manifest.json").read_bytes())
    return [tuple(frame[0] for frame in run["frames"]) for layer in content["layers"] for run in layer["runs"]]


class Model:
    """What the guide asks for, in as many words: a flush adds a row, and a table of so many rows is compacted. Knows
    positions and rows of the batch; each journal is a file of its own, so that what follows in position follows in
    place."""

    def __init__(self, threshold):
        self.threshold, self.compactions = threshold, 0
        self.rows = []  # of (rows of the batch, [tokens of each frame])

    def flush(self, batch_rows, tokens):
        self.rows.append((batch_rows, [tokens]))
        if len(self.rows) < self.threshold:
            return
        joined = []
        for batch, frames in self.rows:
            if joined and joined[-1][0] == batch:
                joined[-1][1].extend(frames)
            else:
                joined.append((batch, list(frames)))
        self.compactions += len(joined) < len(self.rows)
        self.rows = joined

    def frames(self):
        return [tuple(frames) for _, frames in self.rows]


def test_contiguous_rows_become_one_at_the_threshold(tmp_path):
    store, table, counts = make(tmp_path, entries=4), [], []
    for tokens in (2, 3, 1, 5, 2, 2, 2, 2):
        append(store, table, tokens)
        counts.append(len(rows_of(store, table)))
    assert counts == [1, 2, 3, 1, 2, 3, 1, 2]
    assert rows_of(store, table) == [(2, 3, 1, 5, 2, 2, 2), (2,)]
    assert store.stats().compactions == 2
    store.close()


def test_each_layer_and_each_branch_has_a_table_of_its_own(tmp_path):
    store = make(tmp_path, entries=3)
    tables = {(layer, branch): [] for layer in range(2) for branch in range(2)}
    for (layer, branch), table in tables.items():
        for _ in range(2 + (layer == branch == 0)):
            append(store, table, 2, layer=layer, branch=branch)
    rows_of(store, tables[0, 0] + tables[1, 1])
    assert store.stats().compactions == 1
    assert {table[0].location.segment for table in tables.values()} == {0, 1, 2, 3}
    assert rows_of(store, tables[0, 0] + tables[1, 1]) == [(2, 2, 2), (2,), (2,)]
    store.close()


def test_frames_of_other_rows_and_behind_a_gap_begin_a_row(tmp_path):
    store, table = make(tmp_path, entries=2), []
    append(store, table, 2)
    append(store, table, 2, rows=3)
    assert rows_of(store, table) == [(2,), (2,)]
    assert store.stats().compactions == 0, "nothing could be joined"
    dropped = table.pop()  # which somebody still reads, so that the next frame lies behind it
    append(store, table, 2)
    assert rows_of(store, table) == [(2,), (2,)]
    store.free([dropped.location])
    append(store, table, 2)
    assert rows_of(store, table) == [(2,), (2, 2)]
    store.close()


@given(
    flushes=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 9)), max_size=25),
    entries=st.integers(2, 6),
    closed=st.integers(0, 25),
)
def test_it_is_compacted_when_the_table_of_a_manifest_is_whoever_wrote_it(tmp_path_factory, flushes, entries, closed):
    """Also by a store that goes on from what an earlier one committed."""
    folder, model, table = tmp_path_factory.mktemp("journal"), Model(entries), []
    store = make(folder, entries, keep=True)
    for number, (rows, tokens) in enumerate(flushes):
        if number == closed:
            rows_of(store, table)
            store.close()
            store = make(folder, entries, keep=True)
            assert extents_of(store.storage.committed) == table
            store.adopt(table)
        append(store, table, tokens, rows=rows)
        model.flush(rows, tokens)
        assert rows_of(store, table) == model.frames()
        assert store.stats().compactions == model.compactions
    store.close()


def test_compaction_depends_on_the_flushes_alone(tmp_path):
    """Not on what is being read, freed or written to other journals in between."""
    quiet, busy = make(tmp_path / "quiet"), make(tmp_path / "busy")
    tables, compactions = {quiet: [], busy: []}, []
    for number in range(20):
        for store, table in tables.items():
            append(store, table, 1 + number % 3)
        busy.storage.flush()
        read_extent(busy, tables[busy][number // 2])
        busy.free([write_blocks(busy, [block(2)], layer=1, branch=number)[0].location])
        assert rows_of(quiet, tables[quiet]) == rows_of(busy, tables[busy])
        compactions.append((quiet.stats().compactions, busy.stats().compactions))
    assert compactions == [(number, number) for number in (0, 0, 0, *(n for n in range(1, 6) for _ in range(3)), 6, 6)]
    quiet.close()
    busy.close()


def test_payloads_are_never_rewritten(tmp_path):
    store, table, written = make(tmp_path, entries=2), [], 0
    for number in range(6):
        append(store, table, 3)
        store.storage.flush()
        assert store.stats().bytes_written - written == 8192, "one frame of two blocks of the disk"
        written = store.stats().bytes_written
        places = [extent.location.offset for extent in table]
        assert places == [4096 + 8192 * place for place in range(number + 1)]
    assert_holds(store, table, [block(3, seed=3 * number) for number in range(6)])
    store.close()


@pytest.mark.parametrize("place", [10, 60, 80, 3000, 4097, 4500])
def test_a_bad_frame_is_noticed_and_costs_no_other(tmp_path, place):
    """There is no scan: what was committed is found whatever became of the frames before it."""
    store, table = make(tmp_path, keep=True), []
    for tokens in (3, 7, 2, 4):
        append(store, table, tokens)
    rows_of(store, table)
    store.close()
    (file,) = store.storage.path.glob("segment-*")
    whole = file.read_bytes()
    for number, extent in enumerate(table):
        at = extent.location.offset - 4096 + place
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        again = make(tmp_path, keep=True)
        again.adopt(table)
        readable = []
        for other in table:
            try:
                read_extent(again, other)
            except Exception as error:
                assert type(error).__name__ == "CorruptDataError"
            else:
                readable.append(other)
        assert readable == [*table[:number], *table[number + 1 :]]
        again.close()


def test_the_file_has_the_bytes_that_were_written_down(tmp_path, monkeypatch):
    fix_store_id(monkeypatch)
    store = make(tmp_path)
    blocks = [KVBlock(*small_block(tokens, 10 * number)) for number, tokens in enumerate((2, 1, 3))]
    extents = write_blocks(store, blocks)
    store.storage.flush()  # else what is freed may never be written
    write_blocks(store, [KVBlock(*small_block(1, 70))], start=3)
    store.storage.flush()
    store.free([extents[2].location])
    check_golden(store, GOLDEN / "log-structured-journal.txt")
