"""The journal: the contract, its index, and what its frames tell when nothing else does."""

from __future__ import annotations

import random
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from core.storage.golden_files import check_golden, fix_store_id, small_block
from ollm.testing import KVStoreTests, PluginTests, store_context
from ollm.testing import random_block as block
from ollm_kv_journal.journal import Entry, JournalStore

ALIGNMENT = 4096
GOLDEN = Path(__file__).parent / "golden"


def make(folder, entries=4):
    return JournalStore(store_context(folder).storage(), compaction_entries=entries)


class TestJournal(KVStoreTests):
    def open(self, context):
        return JournalStore(context.storage(), compaction_entries=4)


class TestPlugin(PluginTests):
    distribution = "ollm-kv-journal"
    project = Path(__file__).parents[2] / "packages" / "ollm-kv-journal"


def indexed(store, layer):
    """The extents that a layer's index stands for."""
    layout = store.layout(layer)
    return [extent for entry in store.index(layer) for extent in entry.extents(layer, layout, store.storage)]


def file_of(store, layer=0):
    store.storage.flush()
    return store.storage.path / f"segment-{layer:06d}.kv"


def test_contiguous_entries_become_one_at_the_threshold(tmp_path):
    store = make(tmp_path, entries=4)
    counts = []
    for tokens in (2, 3, 1, 5, 2, 2, 2, 2):
        store.append(0, *block(tokens))
        counts.append(len(store.index(0)))
    assert counts == [1, 2, 3, 1, 2, 3, 1, 2]
    assert store.index(0)[0] == Entry(0, ALIGNMENT, 2, (2, 3, 1, 5, 2, 2, 2))
    assert store.stats().compactions == 2
    assert indexed(store, 0) == list(store.extents(0))
    store.close()


def test_each_layer_has_an_index_of_its_own(tmp_path):
    store = make(tmp_path, entries=3)
    for _ in range(3):
        store.append(0, *block(2))
    store.append(1, *block(2))
    assert (len(store.index(0)), len(store.index(1)), len(store.index(2))) == (1, 1, 0)
    store.close()


def test_frames_of_other_rows_and_behind_a_gap_begin_an_entry(tmp_path):
    store = make(tmp_path, entries=2)
    store.append(0, *block(2))
    store.append(0, *block(2, rows=3))
    assert [entry.rows for entry in store.index(0)] == [2, 3]
    dropped = store.extents(0)[1:]
    store.truncate(0, 2)  # somebody still reads what was dropped, so that the next frame lies behind it
    store.append(0, *block(2))
    assert [entry.start for entry in store.index(0)] == [0, 2]
    assert indexed(store, 0) == list(store.extents(0))
    store.release(dropped)
    store.close()


@given(
    steps=st.lists(st.one_of(st.integers(1, 9), st.sampled_from(["crop", "crop and read", "rows"])), max_size=25),
    entries=st.integers(2, 6),
    seed=st.integers(0, 99),
)
def test_the_index_stands_for_the_extents_whatever_happens(tmp_path_factory, steps, entries, seed):
    store = make(tmp_path_factory.mktemp("journal"), entries)
    chosen, rows = random.Random(seed), 1
    for step in steps:
        if isinstance(step, int):
            store.append(0, *block(step, rows=rows))
        elif step == "rows":
            rows = 3 - rows
        elif store.extents(0):
            keep = chosen.randrange(len(store.extents(0)))
            dropped = store.extents(0)[keep:]
            store.truncate(0, dropped[0].start)
            if step == "crop":
                store.release(dropped)
        if store.extents(0):
            assert indexed(store, 0) == list(store.extents(0))
    store.close()


def test_compaction_depends_on_the_flushes_alone(tmp_path):
    """Not on what is being read or written in between."""
    quiet, busy = make(tmp_path / "quiet"), make(tmp_path / "busy")
    for number in range(20):
        for store in (quiet, busy):
            store.append(0, *block(1 + number % 3))
        busy.storage.flush()
        busy.storage.frames(0)
        assert quiet.index(0) == busy.index(0)
    assert quiet.stats().compactions == busy.stats().compactions == 6
    quiet.close()
    busy.close()


def test_the_frames_tell_of_everything_that_was_appended(tmp_path):
    store = make(tmp_path)
    assert store.recover(0) == ()
    for tokens in (3, 1, 700, 2):
        store.append(0, *block(tokens))
    assert store.recover(0) == store.extents(0)
    store.truncate(0, 4)
    store.append(0, *block(2))  # behind frames that somebody still reads
    assert store.recover(0) == store.extents(0)
    store.close()


def test_a_journal_that_was_cut_anywhere_is_recovered_up_to_there(tmp_path):
    store = make(tmp_path)
    for tokens in (3, 1, 2, 4):
        store.append(0, *block(tokens))
    extents, file = store.extents(0), file_of(store)
    whole = file.read_bytes()
    for length in range(len(whole), -1, -512):
        file.write_bytes(whole[:length])
        assert store.recover(0) == tuple(extent for extent in extents if extent.offset + ALIGNMENT <= length)
    store.close()


@pytest.mark.parametrize("place", [10, 60, 3000, 4097, 4500])
def test_recovery_stops_before_the_first_bad_frame(tmp_path, place):
    store = make(tmp_path)
    for tokens in (3, 7, 2, 4):
        store.append(0, *block(tokens))
    extents, file = store.extents(0), file_of(store)
    whole = file.read_bytes()
    for number, extent in enumerate(extents):
        at = extent.offset - ALIGNMENT + place
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert store.recover(0) == extents[:number]
    store.close()


def test_frames_of_another_journal_are_no_frames(tmp_path):
    ours, other = make(tmp_path / "ours"), make(tmp_path / "other")
    for store in (ours, other):
        for _ in range(3):
            store.append(0, *block(2))
    stranger = file_of(other).read_bytes()
    file = file_of(ours)
    file.write_bytes(file.read_bytes()[: 2 * ALIGNMENT] + stranger[2 * ALIGNMENT :])
    assert ours.recover(0) == ours.extents(0)[:1]
    ours.close()
    other.close()


def test_the_file_has_the_bytes_that_were_written_down(tmp_path, monkeypatch):
    fix_store_id(monkeypatch)
    store = make(tmp_path)
    for number, tokens in enumerate((2, 1, 3)):
        store.append(0, *small_block(tokens, 10 * number))
    dropped = store.extents(0)[2:]
    store.truncate(0, 3)
    store.append(0, *small_block(1, 70))
    store.storage.flush()  # else what is released may never be written
    store.release(dropped)
    check_golden(store, GOLDEN / "log-structured-journal.txt")
