"""The engine against `torch.cat`: whatever is appended, cropped and reordered, a layer gives back exactly that."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from core.storage_fixtures import open_storage, read_raw
from ollm.builtin.chunked import ChunkedStore
from ollm.contracts.spill import SpillPlan
from ollm.errors import BatchMismatchError, DiskFullError
from ollm.io.buffers import ALIGNMENT
from ollm.kv.history import LayerHistory
from ollm.kv.residency import MOST_EXTENT_BYTES
from ollm.kv.session import KVSession

HEADS, KEY, VALUE = 2, 4, 3
TOKEN_BYTES = HEADS * (KEY + VALUE) * 4


def tokens(count, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, HEADS, count, KEY, generator=generator),
        torch.randn(rows, HEADS, count, VALUE, generator=generator),
    )


def make(folder, store_type=ChunkedStore, *, layers=1, **plan):
    """A session over a store on disk, and its layers."""
    store = store_type(open_storage(Path(folder)))
    plan = SpillPlan(**{"flush_tokens": 5, "flush_bytes": 2**30, **plan})
    session = KVSession(store, plan, strategy="test", layers=range(layers))
    return session, [LayerHistory(layer, session) for layer in range(layers)]


@pytest.fixture
def one_layer(tmp_path):
    """`one_layer(store_type, **plan)`: session and layer, closed at the end."""
    sessions = []

    def build(store_type=ChunkedStore, **plan):
        session, (layer,) = make(tmp_path, store_type, **plan)
        sessions.append(session)
        return session, layer

    yield build
    for session in sessions:
        session.close()


def whole(layer, rows=2):
    """Everything a layer holds, by way of no new tokens."""
    return layer.gather(*tokens(0, rows))


def spans(session, layer=0):
    return [(extent.start, extent.stop) for extent in session.store.extents(layer)]


class FixedStore(ChunkedStore):
    """Wants four tokens in every extent, as a paged store would."""

    extent_tokens = 4


STEPS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 13)),
    st.tuples(st.just("crop"), st.floats(0, 1)),
    st.tuples(st.just("rows"), st.lists(st.integers(0, 3), min_size=1, max_size=4)),
    st.tuples(st.just("reset"), st.none()),
)


@given(
    steps=st.lists(STEPS, max_size=14),
    fixed=st.booleans(),
    flush=st.integers(1, 9),
    hot=st.integers(0, 4),
    resident=st.sampled_from([0, 3 * TOKEN_BYTES * 2, 2**30]),
)
def test_any_schedule_gives_what_torch_cat_gives(steps, fixed, flush, hot, resident):
    with tempfile.TemporaryDirectory() as folder:
        session, (layer,) = make(
            folder, FixedStore if fixed else ChunkedStore, flush_tokens=flush, hot_tokens=hot, resident_bytes=resident
        )
        keys, values = tokens(0, rows=3)
        for seed, (step, argument) in enumerate(steps):
            if step == "append":
                new = tokens(argument, rows=len(keys), seed=seed)
                gathered = layer.gather(*new)
                keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
                assert torch.equal(gathered[0], keys)
                assert torch.equal(gathered[1], values)
                layer.append(*new)
            elif step == "crop":
                length = int(argument * keys.shape[2])
                layer.crop(length)
                keys, values = keys[:, :, :length], values[:, :, :length]
            elif step == "rows" and keys.shape[2]:
                index = torch.tensor([row % len(keys) for row in argument])
                layer.select_rows(index)
                keys, values = keys[index], values[index]
            elif step == "reset":
                layer.crop(0)
                keys, values = tokens(0, rows=2)
            assert layer.tokens == keys.shape[2]
            assert layer.tail.tokens == keys.shape[2] - layer.stored_tokens
            if keys.shape[2]:
                assert layer.rows == len(keys)
                assert all(map(torch.equal, whole(layer, len(keys)), (keys, values)))
        if fixed:
            assert all(extent.tokens == 4 for extent in session.store.extents(0))
        session.close()


def test_flush_at_six_and_keep_three_hot(one_layer):
    """3 + 4 tokens leave the 4 oldest stored and 3 hot."""
    session, layer = one_layer(flush_tokens=6, hot_tokens=3)
    layer.append(*tokens(3))
    assert (layer.stored_tokens, layer.tail.tokens) == (0, 3)
    layer.append(*tokens(4))
    assert (layer.stored_tokens, layer.tail.tokens) == (4, 3)
    assert session.counters.spills == 1


def test_extents_of_fixed_size_leave_the_rest_in_the_tail(one_layer):
    """Capacity 4: appends of 3 + 3 tokens fill [0, 4); the partial page is the tail."""
    session, layer = one_layer(FixedStore, flush_tokens=4)
    layer.append(*tokens(3))
    layer.append(*tokens(3))
    assert spans(session) == [(0, 4)]
    assert layer.tail.tokens == 2


def test_the_tail_is_flushed_by_bytes_too(one_layer):
    _, layer = one_layer(flush_tokens=1000, flush_bytes=4 * TOKEN_BYTES * 2)
    layer.append(*tokens(3))
    assert layer.stored_tokens == 0
    layer.append(*tokens(1))
    assert layer.stored_tokens == 4


def test_a_prefill_is_cut_into_extents_of_equal_size_that_disks_like(one_layer):
    session, layer = one_layer()
    keys = torch.zeros(1, 8, 6000, 128, dtype=torch.bfloat16)
    layer.append(keys, keys)
    assert spans(session) == [(0, 2000), (2000, 4000), (4000, 6000)]
    assert max(extent.nbytes for extent in session.store.extents(0)) <= MOST_EXTENT_BYTES


def test_extents_are_cut_so_that_they_fill_the_resident_share(one_layer):
    session, layer = one_layer(resident_bytes=6 * 2**20)
    keys = torch.zeros(1, 8, 4096, 128, dtype=torch.bfloat16)
    layer.append(keys, keys)
    assert 0.85 * 6 * 2**20 < session.source.resident_bytes <= 6 * 2**20


def test_one_shot_prefill_reads_and_copies_nothing(one_layer):
    session, layer = one_layer()
    new = tokens(50)
    gathered = layer.gather(*new)
    layer.append(*new)
    assert all(ours is theirs for ours, theirs in zip(gathered, new, strict=True))
    assert session.store.stats().bytes_read == 0


@pytest.mark.parametrize("share", [0, 1, 2, 5, 100])
def test_only_what_is_not_resident_is_read(tmp_path, share):
    """The hit rate is budget / size: a fixed set stays, whatever the order of reading."""
    extent_bytes = 5 * TOKEN_BYTES * 2
    session, layers = make(tmp_path, layers=2, resident_bytes=share * extent_bytes * 2)
    for layer in layers:
        for seed in range(6):
            layer.append(*tokens(5, seed=seed))
    resident = min(share, 6)
    assert session.source.resident_bytes == 2 * resident * extent_bytes
    cold = 2 * (6 - resident)
    for step in range(1, 4):
        for layer in layers:
            whole(layer)
        assert session.counters.loaded_bytes == step * cold * extent_bytes
    # at most one step was read ahead of what was asked for
    assert session.store.stats().bytes_read <= 4 * cold * 2 * ALIGNMENT
    layers[0].crop(0)
    assert session.source.resident_bytes == resident * extent_bytes
    session.close()


def test_rows_are_mapped_not_copied(one_layer):
    session, layer = one_layer()
    layer.append(*tokens(20))
    session.store.storage.flush()
    written = session.store.stats().bytes_written
    for _ in range(5):
        layer.select_rows(torch.tensor([1, 0, 1, 1]))
    assert session.store.stats().bytes_written == written
    assert layer.rows == 4


def test_what_is_appended_is_copied(one_layer):
    _, layer = one_layer()
    for count in (3, 9):  # into the tail, and into the store
        new = tokens(count, seed=count)
        layer.append(*new)
        for tensor in new:
            tensor.zero_()
    keys = torch.cat([tokens(3, seed=3)[0], tokens(9, seed=9)[0]], 2)
    assert torch.equal(whole(layer)[0], keys)


def test_another_batch_is_refused(one_layer):
    _, layer = one_layer()
    layer.append(*tokens(3))
    for wrong in (tokens(1, rows=3), tuple(tensor.double() for tensor in tokens(1))):
        with pytest.raises(BatchMismatchError, match=r"serves one batch.*reset"):
            layer.append(*wrong)
    assert layer.tokens == 3


def test_a_store_that_fails_in_the_middle_leaves_the_history_as_it_was(one_layer):
    class Failing(FixedStore):
        left = 2

        def append(self, layer, keys, values):
            if self.left == 0:
                raise DiskFullError("full")
            self.left -= 1
            super().append(layer, keys, values)

    session, layer = one_layer(Failing, flush_tokens=4)
    layer.append(*tokens(6, seed=1))
    keys, values = tokens(11, seed=2)
    with pytest.raises(DiskFullError):
        layer.append(keys, values)  # two more extents, of which only the first finds room
    assert (layer.tokens, spans(session)) == (6, [(0, 4)])
    session.store.left = 9
    layer.append(keys, values)
    assert torch.equal(whole(layer)[0], torch.cat([tokens(6, seed=1)[0], keys], 2))


def test_a_pinned_extent_keeps_its_bytes_whatever_the_writer_does(one_layer):
    session, layer = one_layer()
    layer.append(*tokens(10, seed=1))
    with session.snapshot(session.store.extents(0)) as extents:
        layer.crop(0)
        for seed in range(5):
            layer.append(*tokens(10, seed=seed + 2))
        block = session.store.decode(extents[0], read_raw(session.store.storage, extents[0])[0], None)
        assert torch.equal(block.keys, tokens(10, seed=1)[0])
        held = session.store.stats().disk_bytes
    layer.crop(0)
    assert session.store.stats().disk_bytes == 0 < held
