"""The two stores of core: the kit, every bit pattern, and the bytes of `chunked`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.storage.golden_files import check_golden, fix_store_id, small_block
from ollm.builtin.chunked import ChunkedStore
from ollm.builtin.resident import ResidentStore
from ollm.contracts.spill import SpillPlan
from ollm.errors import StorageError
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession
from ollm.plugin import BlockKey, KVBlock, SegmentedStore, pack, unpack
from ollm.storage.options import BUFFER_BYTES
from ollm.testing import KVStoreTests, PluginTests, assert_holds, random_block, store_context, write_blocks

GOLDEN = Path(__file__).parents[1] / "storage" / "golden"


class TestChunked(KVStoreTests):
    def open(self, context):
        return ChunkedStore(context.storage())


class TestResident(KVStoreTests):
    def open(self, context):
        return ResidentStore()


class TestPlugin(PluginTests):
    distribution = "ollm-core"


class TwiceOver(SegmentedStore):
    """An encoding that is longer than what it stands for."""

    def encode(self, block):
        return [pack(block), pack(block)]

    def decode(self, extent, raw, out):
        first, second = raw.chunk(2)
        assert first.equal(second)
        return unpack(extent, first)


def test_an_encoding_may_be_longer_than_its_block(tmp_path):
    """And than the buffers in which it is written and read."""
    store = TwiceOver(store_context(tmp_path).storage())
    session = KVSession(store, SpillPlan(flush_tokens=4, flush_bytes=2**30), strategy="test", layers=[0])
    layer = LayerHistory(0, session)
    keys = torch.arange(3 * 2**20, dtype=torch.float32).view(1, 1, 4, -1)
    layer.append(keys, -keys)
    stored = [entry.extent.location.nbytes for entry in layer.table.entries]
    assert sum(stored) == 2 * 2 * keys.nbytes
    assert max(stored) > BUFFER_BYTES
    new = torch.zeros(1, 1, 1, keys.shape[3])
    ours = layer.gather(new, new)
    assert torch.equal(ours[0], torch.cat([keys, new], 2))
    assert torch.equal(ours[1], torch.cat([-keys, new], 2))
    session.close()


def make_chunked(folder):
    return ChunkedStore(store_context(folder).storage())


def test_a_dtype_that_the_format_does_not_have_is_refused(tmp_path):
    store = make_chunked(tmp_path)
    keys = torch.zeros(1, 1, 1, 1, dtype=torch.complex64)
    with pytest.raises(StorageError, match=r"complex64 cannot be stored.*bfloat16"):
        store.write(KVBlock(keys, keys), BlockKey(0, 0, 0, 1, 1))
    assert not store.storage.holds(0)
    store.close()


def test_what_nobody_adopts_takes_no_room(tmp_path):
    """Not even in files that hold nothing else, and that no later record may ever go to."""
    store = ChunkedStore(store_context(tmp_path, keep=True).storage())
    kept = write_blocks(store, [random_block(5)], layer=0)
    for layer in range(1, 4):
        write_blocks(store, [random_block(5)], layer=layer)
    store.storage.flush()
    store.close()
    store = ChunkedStore(store_context(tmp_path, keep=True).storage())
    store.adopt(kept)
    assert [path.name for path in store.storage.path.glob("segment-*")] == ["segment-000000.kv"]
    assert_holds(store, kept, [random_block(5)])
    store.close()


def test_the_files_of_chunked_have_the_bytes_that_were_written_down(tmp_path, monkeypatch):
    fix_store_id(monkeypatch)
    store = make_chunked(tmp_path)
    for layer in range(2):
        blocks = [KVBlock(*small_block(2 + n, 100 * layer + 10 * n, rows=1 + layer)) for n in range(2)]
        write_blocks(store, blocks, layer=layer)
    check_golden(store, GOLDEN / "chunked.txt")
