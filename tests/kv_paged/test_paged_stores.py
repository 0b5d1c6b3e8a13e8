"""The three stores of ollm-kv-paged: the contract, and what each is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.storage.golden_files import check_golden, fix_store_id, small_block
from ollm.errors import StoreContractError
from ollm.plugin import KVGeometry, LayerGeometry
from ollm.testing import KVStoreTests, PluginTests, assert_holds, store_context
from ollm.testing import random_block as block
from ollm_kv_paged.paged import Page, PagedStore, default_page_tokens
from ollm_kv_paged.ring import RingStore
from ollm_kv_paged.segmented import SegmentedFilesStore

GOLDEN = Path(__file__).parent / "golden"


def open_storage(folder):
    return store_context(folder).storage()


def make_paged(folder, page_tokens=64):
    return PagedStore(open_storage(folder), page_tokens=page_tokens)


def make_segmented(folder, segment_bytes=60_000):
    return SegmentedFilesStore(open_storage(folder), segment_bytes=segment_bytes)


def make_ring(folder, slot_tokens=64):
    return RingStore(open_storage(folder), window=100, sinks=0, slot_tokens=slot_tokens)


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
    for number in range(3):
        for layer in range(2):
            store.append(layer, *blocks[layer][number])
    assert [page.slot for page in store.page_table(0)] == [0, 2, 4]
    assert [page.slot for page in store.page_table(1)] == [1, 3, 5]
    size = store.stats().disk_bytes
    dropped = store.extents(0)
    store.truncate(0, 0)
    store.release(dropped)
    for number in range(3):
        store.append(1, *blocks[0][number])
    assert [page.slot for page in store.page_table(1)] == [1, 3, 5, 0, 2, 4]
    assert store.stats().disk_bytes == size, "no byte more than before"
    assert_holds(store, 1, blocks[1] + blocks[0])
    assert len(list(store.storage.path.glob("segment-*"))) == 1
    store.close()


def test_a_short_page_takes_a_slot_of_its_own(tmp_path):
    store = make_paged(tmp_path, page_tokens=4)
    store.append(0, *block(4))
    store.append(0, *block(2))
    assert store.page_table(0) == (Page(0, 4, 0, 0), Page(4, 6, 0, 1))
    store.close()


def test_pages_of_other_sizes_have_a_pool_of_their_own(tmp_path):
    store = make_paged(tmp_path, page_tokens=64)
    store.append(0, *block(64))
    store.append(1, *block(64, rows=3))
    store.append(2, *block(64))
    assert [(page.pool, page.slot) for layer in range(3) for page in store.page_table(layer)] == [
        (0, 0),
        (1, 0),
        (0, 1),
    ]
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
    blocks = [block(2, seed=number) for number in range(7)]
    for number, (keys, values) in enumerate(blocks):
        store.append(number % 2, keys, values)
    assert [extent.segment for extent in store.extents(0)] == [0, 0, 1, 2]
    assert [extent.segment for extent in store.extents(1)] == [0, 1, 1]
    dropped = [store.extents(0)[0:2], store.extents(1)[0:1]]
    rest = store.extents(0)[2:]
    store.truncate(0, 0)
    store.truncate(1, 0)
    for extents in dropped:
        store.release(extents)
    for number in range(4):
        store.append(5, *block(2, seed=number))
    assert [extent.segment for extent in store.extents(5)] == [2, 2, 0, 0]
    assert all(extent.segment != 0 for extent in rest)
    store.close()


def test_a_ring_takes_the_slot_that_left_first(tmp_path):
    store = make_ring(tmp_path, slot_tokens=4)
    for number in range(3):
        store.append(0, *block(4, seed=number))
    size = store.stats().disk_bytes
    for number in range(3, 20):
        oldest = store.extents(0)[:1]
        store.evict(0, oldest)
        store.release(oldest)
        store.append(0, *block(4, seed=number))
        assert store.slot(store.extents(0)[-1]) == number % 3
    assert store.stats().disk_bytes == size
    store.close()


def test_a_slot_that_is_still_read_is_not_taken(tmp_path):
    store = make_ring(tmp_path, slot_tokens=4)
    store.append(0, *block(4, seed=0))
    store.append(0, *block(4, seed=1))
    read_by_somebody = store.extents(0)[:1]
    store.evict(0, read_by_somebody)
    store.append(0, *block(4, seed=2))
    assert [store.slot(extent) for extent in store.extents(0)] == [1, 2]
    store.close()


def test_the_storage_refuses_a_place_that_is_held(tmp_path):
    storage = open_storage(tmp_path)
    record = {"segment": 0, "layer": 0, "start": 0, "tokens": 1, "rows": 1, "dtype": "opaque"}
    payload = [torch.zeros(5000, dtype=torch.uint8)]
    first = storage.write(payload, **record, at=8192)
    assert first.offset == 8192 + 4096
    for at in (0, 4096, 8192, 12288, 16384, 5, -4096):
        with pytest.raises(StoreContractError, match="are not free in segment 0"):
            storage.write(payload, **record, at=at)
    assert storage.write(payload, **record, at=20480).offset == 20480 + 4096
    storage.release([first])
    assert storage.write(payload, **record, at=0).offset == 4096
    storage.close()


def fill(store):
    """Two layers in turns, then space that is used again."""
    for number in range(3):
        for layer in range(2):
            store.append(layer, *small_block(3, 100 * layer + 10 * number))
    dropped = store.extents(0)[1:2] if store.window else store.extents(0)[1:]
    if store.window:
        store.evict(0, dropped)
    else:
        store.truncate(0, 3)
    store.storage.flush()  # else what is released may never be written
    store.release(dropped)
    store.append(1, *small_block(2, 500))
    store.append(0, *small_block(1, 600))


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
