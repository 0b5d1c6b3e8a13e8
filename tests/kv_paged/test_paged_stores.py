"""The three stores of ollm-kv-paged: the contract, and what each is for."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch

from core.kv.test_interrupts import check_given_back
from core.storage.golden_files import check_golden, fix_store_id, small_block
from ollm.contracts.spill import SpillPlan
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession
from ollm.plugin import CorruptDataError, KVBlock, KVGeometry, LayerGeometry
from ollm.testing import KVStoreTests, PluginTests, assert_holds, store_context, write_blocks
from ollm.testing import random_block as block
from ollm_kv_paged.paged import PagedStore, default_page_tokens
from ollm_kv_paged.ring import RingStore
from ollm_kv_paged.segmented import SegmentedFilesStore

GOLDEN = Path(__file__).parent / "golden"


def open_storage(folder, keep=False):
    return store_context(folder, keep=keep).storage()


def make_paged(folder, page_tokens=64, keep=False):
    return PagedStore(open_storage(folder, keep), page_tokens=page_tokens)


def make_segmented(folder, segment_bytes=60_000, keep=False):
    return SegmentedFilesStore(open_storage(folder, keep), segment_bytes=segment_bytes)


def make_ring(folder, slot_tokens=64, keep=False):
    return RingStore(open_storage(folder, keep), window=100, sinks=0, slot_tokens=slot_tokens)


def write(store, tokens, *, seed=0, rows=2, **place):
    """One random block; its extent."""
    return write_blocks(store, [block(tokens, seed=seed, rows=rows)], **place)[0]


def free(store, *extents):
    store.free([extent.location for extent in extents])


def slots(store, extents):
    """Which slot of its file each is in: those of a file have the size of a whole extent."""
    return [
        extent.location.offset // store.storage.record_bytes(extent.layout.nbytes(extent.key.rows, store.extent_tokens))
        for extent in extents
    ]


def pages(store, extents):
    """Tokens, pool and slot of each."""
    places = zip(extents, slots(store, extents), strict=True)
    return [(extent.start, extent.stop, extent.location.segment, slot) for extent, slot in places]


def segments(extents):
    return [extent.location.segment for extent in extents]


class TestPaged(KVStoreTests):
    def open(self, context):
        return PagedStore(context.storage(), page_tokens=9)


class TestSegmented(KVStoreTests):
    def open(self, context):
        return SegmentedFilesStore(context.storage(), segment_bytes=30_000)


class TestRing(KVStoreTests):
    window_tokens = 16

    def open(self, context):
        return RingStore(context.storage(), window=context.window_tokens, sinks=0, slot_tokens=5)


class TestPlugin(PluginTests):
    distribution = "ollm-kv-paged"
    project = Path(__file__).parents[2] / "packages" / "ollm-kv-paged"


def test_pages_of_all_layers_share_a_pool_and_freed_ones_are_used_again(tmp_path):
    store = make_paged(tmp_path, page_tokens=4)
    blocks = {layer: [block(4, seed=10 * layer + number) for number in range(3)] for layer in range(2)}
    tables = {0: [], 1: []}
    for number in range(3):
        for layer in range(2):
            tables[layer] += write_blocks(store, [blocks[layer][number]], layer=layer, start=4 * number)
    assert slots(store, tables[0]) == [0, 2, 4]
    assert slots(store, tables[1]) == [1, 3, 5]
    size = store.stats().disk_bytes
    free(store, *tables[0])
    tables[1] += write_blocks(store, blocks[0], layer=1, start=12)
    assert slots(store, tables[1]) == [1, 3, 5, 0, 2, 4]
    assert store.stats().disk_bytes == size, "no byte more than before"
    assert_holds(store, tables[1], blocks[1] + blocks[0])
    assert len(list(store.storage.path.glob("segment-*"))) == 1
    store.close()


def test_a_short_page_takes_a_slot_of_its_own(tmp_path):
    store = make_paged(tmp_path, page_tokens=4)
    extents = write_blocks(store, [block(4), block(2)])
    assert pages(store, extents) == [(0, 4, 0, 0), (4, 6, 0, 1)]
    store.close()


def test_pages_of_four_take_three_and_three_tokens_as_one_page_and_a_half(tmp_path):
    """A page that is not full is written anew as it grows, in another slot, and what it was then is free."""
    session = KVSession(make_paged(tmp_path, 4), SpillPlan(flush_tokens=1, flush_bytes=1), strategy="test", layers=[0])
    layer, blocks = LayerHistory(0, session), [block(3, seed=seed) for seed in range(4)]
    tables = []
    for one in blocks:
        layer.append(one.keys, one.values)
        tables.append(pages(session.store, [entry.extent for entry in layer.table.entries]))
    assert [[page[:2] for page in table] for table in tables] == [
        [(0, 3)], [(0, 4), (4, 6)], [(0, 4), (4, 8), (8, 9)], [(0, 4), (4, 8), (8, 12)],
    ]  # fmt: skip
    assert [[page[3] for page in table] for table in tables] == [[0], [1, 2], [1, 0, 3], [1, 0, 2]]
    assert layer.tail.tokens == 0
    none = block(0)
    keys, values = layer.gather(none.keys, none.values)
    assert torch.equal(keys, torch.cat([one.keys for one in blocks], dim=2))
    assert torch.equal(values, torch.cat([one.values for one in blocks], dim=2))
    session.close()


def test_tokens_that_do_not_fill_a_page_wait_in_the_tail(tmp_path):
    plan = SpillPlan(flush_tokens=1, flush_bytes=2**30)
    session = KVSession(make_paged(tmp_path, 4), plan, strategy="test", layers=[0])
    layer = LayerHistory(0, session)
    for seed in range(2):
        one = block(3, seed=seed)
        layer.append(one.keys, one.values)
    extents = [entry.extent for entry in layer.table.entries]
    assert pages(session.store, extents) == [(0, 4, 0, 0)]
    assert layer.tail.tokens == 2
    session.close()


def test_pages_of_other_sizes_have_a_pool_of_their_own(tmp_path):
    store = make_paged(tmp_path, page_tokens=64)
    extents = [write(store, 64), write(store, 64, rows=3, layer=1), write(store, 64, layer=2)]
    assert [page[2:] for page in pages(store, extents)] == [(0, 0), (1, 0), (0, 1)]
    store.close()


def test_a_pool_that_is_empty_leaves_its_file_to_pages_of_another_size(tmp_path):
    store = make_paged(tmp_path, page_tokens=64)
    small, large = write(store, 64), write(store, 64, rows=3)
    free(store, small)
    other = [write(store, 64, rows=4, seed=seed, start=64 * seed) for seed in range(2)]
    assert pages(store, [large, *other]) == [(0, 64, 1, 0), (0, 64, 0, 0), (64, 128, 0, 1)]
    store.close()


@pytest.mark.parametrize(
    ("token_bytes", "expected"), [(4096, 512), (4097, 256), (2048, 1024), (3 * 2**20, 1), (1, 4096)]
)
def test_pages_take_at_most_two_mebibytes(token_bytes, expected):
    layer = LayerGeometry(layer=0, kv_heads=1, key_size=token_bytes, value_size=0, itemsize=1)
    assert default_page_tokens(KVGeometry((layer,))) == expected


def test_a_model_without_stored_layers_has_a_page_size_all_the_same():
    assert default_page_tokens(KVGeometry(())) >= 1


def test_a_file_that_is_full_is_followed_by_another_and_an_empty_one_is_used_again(tmp_path):
    store = make_segmented(tmp_path, segment_bytes=3 * 8192)
    tables = {0: [], 1: []}
    for number in range(7):
        table = tables[number % 2]
        table.append(write(store, 2, seed=number, layer=number % 2, start=2 * len(table)))
    assert segments(tables[0]) == [0, 0, 1, 2]
    assert segments(tables[1]) == [0, 1, 1]
    free(store, *tables[0][:2])
    free(store, tables[1][0])
    new = [write(store, 2, seed=number, layer=5, start=2 * number) for number in range(4)]
    assert segments(new) == [2, 2, 0, 0]
    assert all(extent.location.segment != 0 for extent in tables[0][2:])
    store.close()


def test_a_ring_takes_the_slot_that_left_first(tmp_path):
    store = make_ring(tmp_path, slot_tokens=4)
    table = [write(store, 4, seed=number, start=4 * number) for number in range(3)]
    size = store.stats().disk_bytes
    for number in range(3, 20):
        free(store, table.pop(0))
        table.append(write(store, 4, seed=number, start=4 * number))
        assert slots(store, table[-1:]) == [number % 3]
    assert store.stats().disk_bytes == size
    store.close()


def test_a_slot_that_was_not_freed_is_not_taken(tmp_path):
    """Somebody still reads the first one, though it has left the window."""
    store = make_ring(tmp_path, slot_tokens=4)
    table = [write(store, 4, seed=number, start=4 * number) for number in range(3)]
    assert slots(store, table) == [0, 1, 2]
    free(store, table[1])
    assert slots(store, [write(store, 4, start=12), write(store, 4, start=16)]) == [1, 3]
    store.close()


def test_each_branch_has_a_ring_of_its_own(tmp_path):
    store = make_ring(tmp_path, slot_tokens=4)
    extents = [write(store, 4, layer=layer, branch=branch) for layer in range(2) for branch in range(2)]
    assert segments(extents) == [0, 1, 2, 3]
    free(store, extents[1])
    assert segments([write(store, 4, layer=1, branch=7)]) == [1], "the file of a fork that is gone"
    store.close()


@pytest.mark.parametrize("make", [make_paged, make_ring], ids=["pool", "ring"])
def test_slots_go_on_where_an_earlier_store_ended(tmp_path, make):
    """What lies between is free, and comes first; then the slots behind the last one."""
    store, blocks = make(tmp_path, 4, keep=True), [block(4, seed=number) for number in range(6)]
    extents = write_blocks(store, blocks)
    free(store, extents[1], extents[3])
    store.storage.flush()
    kept = [extents[number] for number in (0, 2, 4, 5)]
    store.close()
    again = make(tmp_path, 4, keep=True)
    again.adopt(kept)
    assert slots(again, kept) == [0, 2, 4, 5]
    new = write_blocks(again, [blocks[number] for number in (1, 3, 0)], start=24)
    assert slots(again, new) == [1, 3, 6]
    assert_holds(again, [*kept, *new], [blocks[number] for number in (0, 2, 4, 5, 1, 3, 0)])
    again.close()


@pytest.mark.parametrize("change", [{"offset": 8192}, {"offset": 12288}, {"nbytes": 8193}], ids=str)
def test_records_that_are_in_no_slot_are_refused(tmp_path, change):
    """Else the next pages would be put over them."""
    store = make_paged(tmp_path, 4, keep=True)
    extents = [write(store, 4, seed=number, start=4 * number, rows=8) for number in range(9)]
    store.storage.flush()
    store.close()
    again = make_paged(tmp_path, 4, keep=True)
    elsewhere = attrs.evolve(extents[0], location=attrs.evolve(extents[0].location, **change))
    with pytest.raises(CorruptDataError, match="is not in a slot of segment 0"):
        again.adopt([elsewhere])
    again.adopt(extents)
    assert slots(again, extents) == list(range(9))
    again.close()


def test_slots_of_two_sizes_in_one_file_are_refused(tmp_path):
    store = make_paged(tmp_path, 64, keep=True)
    extents = [write(store, 64, rows=2), write(store, 1, rows=3)]
    store.storage.flush()
    store.close()
    again = make_paged(tmp_path, 64, keep=True)
    moved = attrs.evolve(extents[1], location=attrs.evolve(extents[1].location, segment=0))
    with pytest.raises(CorruptDataError, match="is not in a slot of segment 0"):
        again.adopt([extents[0], moved])
    again.close()


def test_large_segments_go_on_where_an_earlier_store_ended(tmp_path):
    store = make_segmented(tmp_path, 2 * 8192, keep=True)
    extents = [write(store, 2, seed=number, layer=number % 2, start=2 * (number // 2)) for number in range(5)]
    assert segments(extents) == [0, 0, 1, 1, 2]
    store.storage.flush()
    store.close()
    again = make_segmented(tmp_path, 2 * 8192, keep=True)
    again.adopt([extents[number] for number in (4, 1, 0)])
    assert segments([write(again, 2, start=10 + number) for number in range(4)]) == [2, 1, 1, 3]
    again.close()


def fill(store):
    """Two layers in turns, then space that is used again."""
    tables = {0: [], 1: []}
    for number in range(3):
        for layer in range(2):
            one = KVBlock(*small_block(3, 100 * layer + 10 * number))
            tables[layer] += write_blocks(store, [one], layer=layer, start=3 * number)
    store.storage.flush()  # else what is freed may never be written
    free(store, *(tables[0][1:2] if store.window else tables[0][1:]))
    write_blocks(store, [KVBlock(*small_block(2, 500))], layer=1, start=9)
    write_blocks(store, [KVBlock(*small_block(1, 600))], layer=0, start=9 if store.window else 3)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("paged", lambda folder: make_paged(folder, 3)),
        ("streamed-segmented", lambda folder: make_segmented(folder, 4 * 8192)),
        ("sliding-window-ring-buffer", lambda folder: make_ring(folder, 3)),
    ],
)
def test_the_files_have_the_bytes_that_were_written_down(tmp_path, monkeypatch, name, make):
    fix_store_id(monkeypatch)
    store = make(tmp_path)
    fill(store)
    check_golden(store, GOLDEN / f"{name}.txt")


@pytest.mark.parametrize("make", [make_paged, make_segmented, make_ring], ids=["paged", "segmented", "ring"])
def test_what_an_interrupted_step_took_is_given_back(make, tmp_path):
    """A slot that only the store, or only the storage, thought of as taken would be refused for ever."""
    check_given_back(lambda folder: make(folder, 4) if make is not make_segmented else make(folder), tmp_path)
