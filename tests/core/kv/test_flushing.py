"""When a tail is flushed: the examples of the reference system, and what must hold for any plan."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from core.kv.engine_fixtures import make_session, tokens
from core.storage.storage_fixtures import open_storage
from ollm.builtin.chunked import ChunkedStore
from ollm.contracts.spill import SpillPlan
from ollm.kv.flushing import cuts, even, tokens_to_flush
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession


class FourTokens(ChunkedStore):
    extent_tokens = 4


def spans(layer):
    return [(entry.start, entry.stop) for entry in layer.table.entries]


def history(folder, store_type=FourTokens, **plan):
    store = store_type(open_storage(folder))
    session = KVSession(store, SpillPlan(**{"flush_bytes": 2**30, **plan}), strategy="test", layers=[0])
    return session, LayerHistory(0, session)


def test_flush_six_retain_three(tmp_path):
    """3 + 4 tokens leave the 4 oldest cold and 3 hot."""
    session, layer = history(tmp_path, ChunkedStore, flush_tokens=6, hot_tokens=3)
    layer.append(*tokens(3))
    assert spans(layer) == []
    layer.append(*tokens(4))
    assert (spans(layer), layer.tail.tokens) == ([(0, 4)], 3)
    session.close()


def test_pages_of_four_take_three_and_three_tokens(tmp_path):
    """Where nothing may wait in memory, 3 + 3 tokens are the pages [0, 4) and [4, 6)."""
    session, layer = history(tmp_path, flush_tokens=1, flush_bytes=1)
    layer.append(*tokens(3, seed=1))
    assert spans(layer) == [(0, 3)]
    layer.append(*tokens(3, seed=2))
    assert (spans(layer), layer.tail.tokens) == ([(0, 4), (4, 6)], 0)
    keys, _ = layer.gather(*tokens(0))
    assert keys.equal(torch.cat([tokens(3, seed=1)[0], tokens(3, seed=2)[0]], dim=2))
    session.close()


def test_a_page_that_is_not_full_waits_where_memory_allows_it(tmp_path):
    session, layer = history(tmp_path, flush_tokens=1)
    layer.append(*tokens(3))
    assert (spans(layer), layer.tail.tokens) == ([], 3)
    layer.append(*tokens(3))
    assert (spans(layer), layer.tail.tokens) == ([(0, 4)], 2)
    session.close()


def test_a_short_page_whose_rows_were_picked_stays_as_it_is(tmp_path):
    session, layer = history(tmp_path, flush_tokens=1, flush_bytes=1)
    layer.append(*tokens(3))
    layer.select_rows(torch.tensor([0, 0]))
    layer.append(*tokens(6, rows=2))
    assert spans(layer) == [(0, 3), (3, 7), (7, 9)]
    session.close()


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_bytes_are_counted_once_though_pages_are_written_again(tmp_path, step):
    session, layer = history(tmp_path, flush_tokens=1, flush_bytes=1)
    for _ in range(0, 30, step):
        layer.append(*tokens(step))
    assert session.counters.saved_bytes == layer.table.tokens * sum(tensor[:, :, :1].nbytes for tensor in tokens(1))
    session.close()


plans = st.integers(1, 300).flatmap(
    lambda flush: st.builds(
        SpillPlan,
        flush_tokens=st.just(flush),
        flush_bytes=st.integers(1, 3000),
        hot_tokens=st.integers(0, min(flush - 1, 200)),
    )
)


@given(
    plan=plans,
    size=st.one_of(st.none(), st.integers(1, 64)),
    token_bytes=st.integers(1, 200),
    steps=st.lists(st.integers(1, 100), max_size=40),
)
def test_no_tail_outgrows_the_plan_and_no_token_is_lost(plan, size, token_bytes, steps):
    tail = stored = given = 0
    for tokens_more in steps:
        given += tokens_more
        short = stored % size if size else 0
        pending = tail + tokens_more
        flush = tokens_to_flush(plan, size, token_bytes, pending=pending, short=short)
        assert flush == 0 or short < flush <= short + pending
        if flush:
            stored, tail = stored - short + flush, pending - (flush - short)
            if size:
                assert all(high - low <= size for low, high in cuts(flush, size))
        else:
            tail = pending
        assert stored + tail == given
        assert tail * token_bytes < plan.flush_bytes, "bytes are what a plan is about"
        assert tail < max(size or plan.flush_tokens, plan.hot_tokens + (size or 1)) + (size or 1)


@given(tokens_in_all=st.integers(1, 5000), most=st.integers(1, 700))
def test_cuts_are_even_and_cover_everything(tokens_in_all, most):
    size = even(tokens_in_all, most)
    pieces = cuts(tokens_in_all, size)
    assert size <= most
    assert len(pieces) == -(-tokens_in_all // most)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == tokens_in_all
    assert all(before[1] == after[0] for before, after in itertools.pairwise(pieces))


def test_engine_fixtures_agree(tmp_path):
    """What other tests build on: whole extents of every layer are on the disk."""
    session, layers = make_session(tmp_path, layers=2, extents=3)
    assert [len(layer.table.entries) for layer in layers] == [3, 3]
    session.close()
