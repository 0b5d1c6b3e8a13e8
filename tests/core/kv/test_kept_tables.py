"""What a cache holds, written down by a commit and taken up again by another: windows with sinks, reordered batches."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from core.kv.engine_fixtures import HEADS, SIZE, TOKENS, extents_of, tokens
from core.storage.storage_fixtures import reopen
from ollm.builtin.chunked import ChunkedStore
from ollm.contracts.spill import SpillPlan
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession
from ollm.kv.table import Entry, LayerTable
from ollm.storage.folder import CacheFolder
from ollm.storage.kept import extents_of as all_extents_of
from ollm.storage.segments import SegmentedStorage

WINDOW, SINKS, LAYERS = 40, TOKENS, 2


def session_over(storage: SegmentedStorage, *, window: int | None = None) -> KVSession:
    store = ChunkedStore(storage)
    store.window, store.sinks = window, SINKS if window else 0
    plan = SpillPlan(flush_tokens=TOKENS, flush_bytes=2**30, read_buffers=4)
    return KVSession(store, plan, strategy="test", layers=range(LAYERS))


def layers_of(session: KVSession) -> list[LayerHistory]:
    layers = [LayerHistory(layer, session) for layer in range(LAYERS)]
    for layer, following in zip(layers, layers[1:] + layers[:1], strict=True):
        layer.next = weakref.ref(following)
    return layers


def stored(session: KVSession, table: LayerTable) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each extent that a layer has, as the rows of today, by position."""
    with session.table.pinned():
        return {entry.start: session.source.tensors(entry, torch.device("cpu")) for entry in table.entries}


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(one, other) for start in ours for one, other in zip(ours[start], theirs[start], strict=True)
    )


def taken_up(path: Path, *, window: int | None = None) -> tuple[KVSession, list[LayerTable]]:
    """What the last commit listed, in another session."""
    storage = reopen(path)
    session = session_over(storage, window=window)
    session.store.adopt(all_extents_of(storage.committed))
    tables = [LayerTable(session.table, layer, 0) for layer in range(LAYERS)]
    for table, kept in zip(tables, storage.committed, strict=True):
        table.adopt(kept)
    return session, tables


@pytest.fixture
def folder(tmp_path: Path) -> CacheFolder:
    return CacheFolder.create(tmp_path, "kv_cache_test", keep=True)


def test_a_window_with_sinks(folder: CacheFolder) -> None:
    """A gap behind the sinks, and the position counted although most of it is gone."""
    session = session_over(SegmentedStorage(folder, strategy="test"), window=WINDOW)
    layers = layers_of(session)
    given = {}
    for number in range(8):
        for layer, history in enumerate(layers):
            pair = tokens(TOKENS, seed=100 * layer + number)
            history.append(*pair)
            given[layer, TOKENS * number] = pair
    gone = layers[0].table.first_kept
    assert gone > SINKS, "or this tests no gap"
    session.store.storage.commit([history.table.listed() for history in layers])
    session.close()
    again, tables = taken_up(folder.path, window=WINDOW)
    for layer, table in enumerate(tables):
        assert (table.tokens, table.first_kept) == (8 * TOKENS, gone)
        assert same(
            stored(again, table), {start: given[layer, start] for start in (0, *range(gone, 8 * TOKENS, TOKENS))}
        )
        table.evict(10 * TOKENS, WINDOW, SINKS)
        assert [entry.start for entry in table.entries] == [0, *range(gone + 2 * TOKENS, 8 * TOKENS, TOKENS)]
    again.close()


def test_a_window_that_all_of_it_has_left(folder: CacheFolder) -> None:
    session = session_over(SegmentedStorage(folder, strategy="test"), window=WINDOW)
    layers = layers_of(session)
    for history in layers:
        history.append(*tokens(TOKENS))
        history.table.evict(TOKENS + WINDOW, WINDOW, 0)
        assert not history.table.entries
    session.store.storage.commit([history.table.listed() for history in layers])
    session.close()
    again, tables = taken_up(folder.path, window=WINDOW)
    assert [(len(table.entries), table.tokens, table.first_kept) for table in tables] == 2 * [(0, TOKENS, TOKENS)]
    again.close()


def test_a_batch_that_was_reordered(folder: CacheFolder) -> None:
    """Extents of one row and of three, each with the map that it had; those that shared one share it again."""
    session = session_over(SegmentedStorage(folder, strategy="test"))
    layers = layers_of(session)
    for history in layers:
        for seed in (1, 2):
            history.append(*tokens(TOKENS, seed=seed))
        history.select_rows(torch.tensor([0, 0, 0]))
        for seed in (3, 4):
            history.append(*tokens(TOKENS, seed=seed, rows=3))
        history.select_rows(torch.tensor([2, 0, 0]))
        history.append(*tokens(TOKENS, seed=5, rows=3))
        history.crop(5 * TOKENS - 3)
    expected = [stored(session, history.table) for history in layers]
    assert torch.equal(expected[0][2 * TOKENS][0], tokens(TOKENS, seed=3, rows=3)[0][[2, 0, 0]])
    extents = [extents_of(history) for history in layers]
    session.store.storage.commit([history.table.listed() for history in layers])
    session.close()
    again, tables = taken_up(folder.path)
    for table, ours, true in zip(tables, extents, expected, strict=True):
        assert [entry.extent for entry in table.entries] == ours
        assert same(stored(again, table), true)
        maps = [entry.row_map for entry in table.entries]
        assert maps[0] is maps[1]
        assert maps[2] is maps[3]
        assert maps[4] is None
        assert table.tokens == 5 * TOKENS - 3
    assert expected[0][0][0].shape == (3, HEADS, TOKENS, SIZE)
    again.close()


def test_what_was_taken_up_is_freed_when_it_is_dropped(folder: CacheFolder) -> None:
    session = session_over(SegmentedStorage(folder, strategy="test"))
    layers = layers_of(session)
    for history in layers:
        history.append(*tokens(2 * TOKENS))
    session.store.storage.commit([history.table.listed() for history in layers])
    session.close()
    again, tables = taken_up(folder.path)
    assert again.store.stats().disk_bytes > 0
    for table in tables:
        assert all(isinstance(entry, Entry) for entry in table.entries)
        table.crop(0)
    again.give_back()
    assert again.store.stats().disk_bytes == 0
    again.close()
