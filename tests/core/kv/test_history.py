"""The engine against `torch.cat`: whatever is appended, cropped and reordered, a layer gives back exactly that."""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from core.kv.engine_fixtures import ANY
from core.storage.storage_fixtures import open_storage, read_raw
from ollm.builtin.chunked import ChunkedStore
from ollm.contracts.blocks import EXTENT_BYTES
from ollm.contracts.spill import SpillPlan
from ollm.errors import BatchMismatchError, DiskFullError
from ollm.io.buffers import ALIGNMENT
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession
from ollm.kv.table import Entries

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


def spans(layer):
    return [(entry.start, entry.stop) for entry in layer.table.entries]


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
            folder, FixedStore if fixed else ChunkedStore,
            flush_tokens=flush, hot_tokens=min(hot, flush - 1), resident_bytes=resident,
        )  # fmt: skip
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
            assert layer.tail.tokens == keys.shape[2] - layer.table.tokens
            if keys.shape[2]:
                assert layer.rows == len(keys)
                assert all(map(torch.equal, whole(layer, len(keys)), (keys, values)))
        if fixed:
            assert all(entry.extent.key.tokens == 4 for entry in layer.table.entries)
        session.close()


def test_flush_at_six_and_keep_three_hot(one_layer):
    """3 + 4 tokens leave the 4 oldest stored and 3 hot."""
    session, layer = one_layer(flush_tokens=6, hot_tokens=3)
    layer.append(*tokens(3))
    assert (layer.table.tokens, layer.tail.tokens) == (0, 3)
    layer.append(*tokens(4))
    assert (layer.table.tokens, layer.tail.tokens) == (4, 3)
    assert session.counters.spills == 1


def test_extents_of_fixed_size_leave_the_rest_in_the_tail(one_layer):
    """Capacity 4: appends of 3 + 3 tokens fill [0, 4); the partial page is the tail."""
    _, layer = one_layer(FixedStore, flush_tokens=4)
    layer.append(*tokens(3))
    layer.append(*tokens(3))
    assert spans(layer) == [(0, 4)]
    assert layer.tail.tokens == 2


def test_the_tail_is_flushed_by_bytes_too(one_layer):
    _, layer = one_layer(flush_tokens=1000, flush_bytes=4 * TOKEN_BYTES * 2)
    layer.append(*tokens(3))
    assert layer.table.tokens == 0
    layer.append(*tokens(1))
    assert layer.table.tokens == 4


def test_a_prefill_is_cut_into_extents_of_equal_size_that_disks_like(one_layer):
    _, layer = one_layer()
    keys = torch.zeros(1, 8, 6000, 128, dtype=torch.bfloat16)
    layer.append(keys, keys)
    assert spans(layer) == [(0, 2000), (2000, 4000), (4000, 6000)]
    assert max(entry.extent.location.nbytes for entry in layer.table.entries) <= EXTENT_BYTES


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
    for wrong in (tokens(1, rows=3), tuple(tensor[..., :-1] for tensor in tokens(1))):
        with pytest.raises(BatchMismatchError, match=r"serves one batch.*reset"):
            layer.append(*wrong)
    assert layer.tokens == 3


@pytest.mark.parametrize("dtypes", list(itertools.permutations([torch.float16, torch.float32, torch.float64])))
@pytest.mark.parametrize("flush", [1000, 4, 1])
def test_numbers_become_as_wide_as_the_widest_and_none_is_rounded(one_layer, dtypes, flush):
    """Keys and values may differ as well."""
    _, layer = one_layer(flush_tokens=flush)
    expected = None
    for seed, dtype in enumerate(dtypes):
        keys, values = tokens(3, seed=seed)
        keys, values = keys.to(dtype), values.half()
        layer.append(keys, values)
        new = keys.double(), values.double()
        expected = new if expected is None else tuple(map(torch.cat, zip(expected, new, strict=True), [2, 2]))
        assert all(torch.equal(one.double(), other) for one, other in zip(whole(layer), expected, strict=True))
        fork = layer.fork(layer.table.branch + 1)
        assert all(torch.equal(one.double(), other) for one, other in zip(whole(fork), expected, strict=True))
        fork.close()


def test_a_store_that_fails_in_the_middle_leaves_the_history_as_it_was(one_layer):
    class Failing(FixedStore):
        left = 2

        def write(self, block, key):
            if self.left == 0:
                raise DiskFullError("full")
            self.left -= 1
            return super().write(block, key)

    session, layer = one_layer(Failing, flush_tokens=4)
    layer.append(*tokens(6, seed=1))
    keys, values = tokens(11, seed=2)
    with pytest.raises(DiskFullError):
        layer.append(keys, values)  # two more extents, of which only the first finds room
    assert (layer.tokens, spans(layer)) == (6, [(0, 4)])
    session.store.left = 9
    layer.append(keys, values)
    assert torch.equal(whole(layer)[0], torch.cat([tokens(6, seed=1)[0], keys], 2))


def test_what_is_pinned_keeps_its_bytes_whatever_the_writer_does(one_layer):
    session, layer = one_layer()
    layer.append(*tokens(10, seed=1))
    with session.table.pinned():
        (entry,) = layer.table.entries
        layer.crop(0)
        for seed in range(5):
            layer.append(*tokens(10, seed=seed + 2))
        block = session.store.decode(entry.extent, read_raw(session.store.storage, entry.extent)[0], None)
        assert torch.equal(block.keys, tokens(10, seed=1)[0])
        held = session.store.stats().disk_bytes
    layer.crop(0)
    assert session.store.stats().disk_bytes == 0 < held


def test_a_crop_inside_an_extent_writes_nothing_and_reads_what_is_left(one_layer):
    """Nothing is ever encoded twice: what is visible of the extent becomes less, for every store."""
    session, layer = one_layer()
    layer.append(*tokens(40, seed=1))
    session.store.storage.flush()
    written = session.store.stats().bytes_written
    for length in (33, 21, 7, 1):
        layer.crop(length)
        assert (layer.tokens, layer.table.tokens, layer.tail.tokens) == (length, length, 0)
        assert all(map(torch.equal, whole(layer), (tensor[:, :, :length] for tensor in tokens(40, seed=1))))
    assert session.store.stats().bytes_written == written
    layer.append(*tokens(6, seed=2))
    keys = torch.cat([tokens(40, seed=1)[0][:, :, :1], tokens(6, seed=2)[0]], 2)
    assert torch.equal(whole(layer)[0], keys)
    assert spans(layer) == [(0, 1), (1, 7)]


def test_of_an_extent_that_was_cut_short_only_what_is_left_is_read(one_layer):
    session, layer = one_layer(flush_tokens=1)
    keys = torch.randn(1, 2, 16384, 32)
    layer.append(keys, keys)
    session.store.storage.flush()
    layer.crop(100)
    before = session.store.stats().bytes_read
    assert torch.equal(layer.gather(keys[:, :, :0], keys[:, :, :0])[0], keys[:, :, :100])
    assert session.store.stats().bytes_read - before <= 2 * 2 * 2 * 2**16, "two pieces at most of each run of bytes"


@pytest.mark.parametrize("extents", [4, 64])
def test_a_step_over_many_extents_pins_and_looks_up_as_little_as_over_few(one_layer, monkeypatch, extents):
    """What a step does in Python does not grow with the number of extents."""
    _, layer = one_layer(resident_bytes=2**30)
    for seed in range(extents):
        layer.append(*tokens(5, seed=seed))
    handle = layer.handle(*tokens(1))
    list(handle.blocks(ANY))  # works the route out
    calls = count_calls(lambda: list(layer.handle(*tokens(1)).blocks(ANY)))
    assert calls < 200  # some garbage may be collected in between; one call per extent and function would be 192 more
    assert torch.equal(whole(layer)[0], torch.cat([tokens(5, seed=seed)[0] for seed in range(extents)], 2))


def count_calls(action):
    """How many Python functions run."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_who_selects_gets_the_query_before_anything_is_read(one_layer):
    """Attention sees what was chosen and nothing else."""
    session, layer = one_layer()
    for seed in range(4):
        layer.append(*tokens(5, seed=seed))
    asked = []

    def newest(query, number, entries):
        asked.append((query, number, len(session.source._reader._ahead)))
        return Entries(entries.items[-1:])

    session.select = newest
    query = torch.randn(2, 4, 1, 4)
    starts = [block.start for block in layer.handle(*tokens(1)).blocks(query)]
    assert starts == [15, 20]
    assert asked == [(query, 0, 0)]
