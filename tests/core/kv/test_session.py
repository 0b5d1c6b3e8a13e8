"""How a session ends: whatever fails, all else is given back, and what is dropped gives back as well."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch

from core.kv.engine_fixtures import EXTENT_BYTES, TOKENS, make_session, tokens, walk
from core.storage.storage_fixtures import open_storage
from ollm.builtin.chunked import ChunkedStore
from ollm.contracts.blocks import BlockKey, Extent, KVBlock, KVLayout, Location
from ollm.errors import CacheForkedError, DiskFullError, StorageError
from ollm.io.buffers import HUGE_PAGE
from ollm.io.ledger import ledger
from ollm.kv import encoded
from ollm.seam.cache import _close_all
from ollm.testing.processes import in_child

CPU = torch.device("cpu")


@pytest.fixture
def claims():
    """What was claimed since the test began."""
    gc.collect()
    before = list(ledger._claims)
    return lambda: [claim.purpose for claim in ledger._claims if claim not in before]


def fails(*_):
    raise StorageError("planted")


def test_what_was_resident_is_dropped_when_its_claim_is(tmp_path, claims):
    """Layers that somebody still has refer to nothing of it, nor do the routes that were worked out for them."""
    session, layers = make_session(tmp_path, layers=1, extents=4, resident_bytes=2**30)
    walk(layers[0])
    route = weakref.ref(session.source._routes.route(layers[0].table.entries))
    assert route().resident
    session.close()
    assert route() is None
    assert claims() == []


@pytest.mark.parametrize("failing", range(6))
def test_what_fails_while_a_source_ends_keeps_nothing_else(tmp_path, claims, failing):
    session, layers = make_session(tmp_path, layers=1, extents=4, resident_bytes=2 * EXTENT_BYTES)
    walk(layers[0])
    ends = session.source._ends
    assert len(ends) == 6
    end, ends[failing] = ends[failing], fails
    with pytest.raises(StorageError, match="planted"):
        session.close()
    assert list(tmp_path.iterdir()) == []
    assert claims() == {1: ["resident keys and values"], 4: ["Read buffers"]}.get(failing, [])
    ends[failing] = end
    session.close()
    assert claims() == []


def test_a_cache_that_cannot_give_up_leaves_all_the_same(tmp_path):
    session, _ = make_session(tmp_path, layers=1, extents=1)
    first, second = session.join(), session.join()
    with pytest.raises(StorageError):
        session.leave(second, fails)
    assert session.table.branches == {first}
    session.leave(first, fails)  # the last one: everything ends, and nothing is given up
    assert list(tmp_path.iterdir()) == []


def test_each_layer_is_given_up_whatever_becomes_of_the_others(tmp_path):
    session, layers = make_session(tmp_path, layers=3, extents=1)
    layers[1].close = fails
    with pytest.raises(StorageError):
        _close_all(layers)
    assert [layer.tokens for layer in layers] == [0, TOKENS, 0]
    session.close()


def test_what_a_dropped_cache_fails_with_is_told_once(tmp_path):
    session, layers = make_session(tmp_path, layers=1, extents=1)
    session.join()
    session.leave_soon(session.join(), fails)
    with pytest.raises(StorageError):
        layers[0].append(*tokens(1))
    layers[0].append(*tokens(1))
    assert session.table.branches == {0}
    session.close()


def test_the_last_cache_ends_everything_though_a_dropped_one_was_not_tidied_up(tmp_path):
    session, _ = make_session(tmp_path, layers=1, extents=1)
    user = session.join()
    session.leave_soon(session.join(), lambda: None)
    session.leave(user, fails)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_though_giving_back_fails(tmp_path):
    class Full(ChunkedStore):
        def write(self, block, key):
            if key.start >= TOKENS:
                raise DiskFullError("full")
            return super().write(block, key)

        free = fails

    session, (layer,) = make_session(tmp_path, layers=1, store_type=Full)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(session.source), "extent_bytes", property(lambda self: EXTENT_BYTES))
        with pytest.raises(DiskFullError):
            layer.append(*tokens(2 * TOKENS))
    assert layer.tokens == 0
    session.close()


def test_a_session_that_is_dropped_gives_back_all_that_it_claimed(tmp_path, claims, workers):
    """At once: nothing of it waits for the garbage collector."""
    gc.disable()
    try:
        session, layers = make_session(tmp_path, layers=2, extents=4, resident_bytes=2 * EXTENT_BYTES)
        assert {"Read buffers", "Write buffers", "resident keys and values"} == set(claims())
        del session, layers
        assert claims() == []
        assert workers() == []
        assert list(tmp_path.iterdir()) == []
    finally:
        gc.enable()


def test_a_decoded_block_is_noticed_to_be_where_it_should_be():
    """Large buffers do not begin where their memory does."""
    layout = KVLayout(torch.float32, 1, 64, 64)
    rows = HUGE_PAGE // layout.nbytes(1, 1) + 1
    extent = Extent.of(BlockKey(0, 0, 0, rows, 1), layout, Location(layout.nbytes(1, rows)))
    scratch, before = encoded.Scratch(CPU), list(ledger._claims)
    block = scratch.block(extent)
    assert block.keys.untyped_storage().data_ptr() != block.keys.data_ptr()
    scratch.used(block)
    assert scratch.block(extent).keys.data_ptr() == block.keys.data_ptr()
    (claim,) = (claim for claim in ledger._claims if claim not in before)
    assert claim.used == claim.nbytes == extent.location.nbytes
    scratch.used(KVBlock(*tokens(1)))
    assert scratch.block(extent) is None
    assert claim not in ledger._claims


def test_rows_that_stay_where_they_are_change_nothing(tmp_path):
    session, (layer,) = make_session(tmp_path, layers=1)
    layer.append(*tokens(TOKENS, rows=3))
    before = layer.table.entries
    layer.select_rows(torch.arange(3))
    assert layer.table.entries is before
    layer.select_rows(torch.tensor([2, 0]))
    assert layer.table.entries is not before
    after = layer.table.entries
    layer.select_rows(torch.arange(2))
    assert layer.table.entries is after
    layer.select_rows(torch.arange(1))
    assert [entry.row_map.tolist() for entry in layer.table.entries] == [[2]]
    session.close()


@pytest.mark.parametrize("index", [[0, 3], [-1], [3]], ids=str)
def test_rows_that_do_not_exist_are_refused_where_all_is_stored_too(tmp_path, index):
    session, (layer,) = make_session(tmp_path, layers=1)
    layer.append(*tokens(TOKENS, rows=3))
    assert layer.tail.tokens == 0
    for _ in range(2):
        with pytest.raises(IndexError, match="rows"):
            layer.select_rows(torch.tensor(index))
        layer.select_rows(torch.tensor([1, 0, 2]))
    session.close()


def test_a_record_whose_place_a_store_cannot_note_is_free_again(tmp_path):
    class Forgetful(ChunkedStore):
        broken = True

        def placed(self, extent):
            if self.broken:
                raise KeyboardInterrupt

    store = Forgetful(open_storage(tmp_path))
    block = KVBlock(*tokens(TOKENS))
    write = functools.partial(store.write, block, BlockKey(0, 0, 0, TOKENS, 1))
    with pytest.raises(KeyboardInterrupt):
        write()
    assert not store.storage.holds(0)
    store.broken = False
    assert write().offset == 4096
    store.close()


def test_a_child_closes_and_frees_nothing_of_its_parent_whatever_the_store_is(tmp_path):
    """A store with files of its own need not know of processes: it is not asked there."""

    class Mine(ChunkedStore):
        touched = 0

        def close(self):
            Mine.touched += 1
            super().close()

        def free(self, locations):
            Mine.touched += 1
            super().free(locations)

    session, layers = make_session(tmp_path, layers=1, extents=2, store_type=Mine)
    branch = session.join()

    def child():
        for use in (session.join, session.raise_failed, lambda: layers[0].append(*tokens(1))):
            with pytest.raises(CacheForkedError):
                use()
        session.leave(branch, functools.partial(_close_all, layers))
        assert Mine.touched == 0

    in_child(child)
    session.leave(branch, functools.partial(_close_all, layers))
    assert Mine.touched
    assert list(tmp_path.iterdir()) == []
