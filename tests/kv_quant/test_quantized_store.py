"""The store: the contract within the error bound, one encoding for ever, and its bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.storage.golden_files import check_golden, fix_store_id, small_block
from ollm.contracts.spill import SpillPlan
from ollm.errors import NonFiniteError
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession
from ollm.plugin import BlockKey, KVBlock
from ollm.storage.kept import extents_of
from ollm.testing import KVStoreTests, PluginTests, read_extent, store_context, write_blocks
from ollm.testing import random_block as block
from ollm.testing.blocks import read_raw
from ollm.testing.case import commit
from ollm_kv_quant import REPRESENTATIONS
from ollm_kv_quant.codecs import codec
from ollm_kv_quant.store import QuantizedStore

GOLDEN = Path(__file__).parent / "golden"


def make(folder, name=REPRESENTATIONS[0]):
    return QuantizedStore(store_context(folder).storage(), codec(name))


def pair(tokens, seed=0):
    """Keys and values, as a layer takes them."""
    one = block(tokens, seed=seed)
    return one.keys, one.values


def make_session(folder, name=REPRESENTATIONS[0], resident_bytes=0):
    plan = SpillPlan(flush_tokens=8, flush_bytes=2**30, resident_bytes=resident_bytes)
    session = KVSession(make(folder, name), plan, strategy="test", layers=[0], lossless=False)
    return session, LayerHistory(0, session)


class Int8Tests(KVStoreTests):
    tolerance = 1 / 254 + 2**-8
    """Half a step of int8, and one rounding to bfloat16, the coarsest of the dtypes."""
    representation = REPRESENTATIONS[0]

    def open(self, context):
        return QuantizedStore(context.storage(), codec(self.representation))


class TestQuantized(Int8Tests):
    pass


class TestQuantizedPerToken(Int8Tests):
    representation = "int8-per-token"


class TestPlugin(PluginTests):
    distribution = "ollm-kv-quant"
    project = Path(__file__).parents[2] / "packages" / "ollm-kv-quant"


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_the_payload_has_the_bytes_that_were_written_down(tmp_path, name):
    store = make(tmp_path, name)
    keys = (torch.arange(-16, 16, dtype=torch.float32) / 4).reshape(1, 2, 2, 8)
    (extent,) = write_blocks(store, [KVBlock(keys, keys[..., :4] * 3)])
    assert extent.location.encoded
    assert bytes(read_raw(store, extent).numpy()).hex() == (GOLDEN / f"{name}.hex").read_text().strip()
    store.close()


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_decoding_into_a_given_place(tmp_path, name):
    store = make(tmp_path, name)
    (extent,) = write_blocks(store, [block(5)])
    place = KVBlock(torch.full((2, 3, 5, 8), float("nan")), torch.full((2, 3, 5, 8), float("nan")))
    decoded = store.decode(extent, read_raw(store, extent), place)
    assert decoded.keys is place.keys
    assert decoded.values is place.values
    found = read_extent(store, extent)
    assert torch.equal(place.keys * decoded.key_scale, found.keys)
    assert torch.equal(place.values * decoded.value_scale, found.values)
    store.close()


def test_a_refused_extent_adds_nothing(tmp_path):
    store = make(tmp_path)
    (kept,) = write_blocks(store, [block(4)])
    refused, before = block(4), store.stats().disk_bytes
    refused.values[1, 2, 3, 4] = float("nan")
    with pytest.raises(NonFiniteError):
        store.write(refused, BlockKey(1, 0, 4, 4, 2))
    assert store.stats().disk_bytes == before
    assert not store.storage.holds(1)
    read_extent(store, kept)
    store.close()


@pytest.mark.parametrize("name", REPRESENTATIONS)
@pytest.mark.parametrize("resident_bytes", [0, 2**20])
def test_cropping_and_going_on_never_encodes_again(tmp_path, name, resident_bytes):
    """What an extent decodes to when it is first stored is what it decodes to after any crop into it."""
    session, layer = make_session(tmp_path, name, resident_bytes)
    layer.append(*pair(10, seed=1))
    session.store.storage.flush()
    written = session.store.stats().bytes_written
    first = [tensor.clone() for tensor in layer.gather(*pair(0))]
    for length in (9, 7, 3):
        layer.crop(length)
        assert layer.tail.tokens == 0, "nothing comes back to be encoded again"
        for ours, before in zip(layer.gather(*pair(0)), first, strict=True):
            assert torch.equal(ours, before[:, :, :length])
    assert session.store.stats().bytes_written == written, "a crop moves no byte"
    assert [(entry.extent.key.tokens, entry.extent.visible) for entry in layer.table.entries] == [(10, 3)]
    layer.append(*pair(9, seed=2))
    assert layer.tokens == 12
    for ours, before in zip(layer.gather(*pair(0)), first, strict=True):
        assert torch.equal(ours[:, :, :3], before[:, :, :3])
    layer.crop(0)
    assert session.store.stats().disk_bytes == 0
    session.close()


def test_a_fork_keeps_an_extent_that_its_origin_cut(tmp_path):
    session, layer = make_session(tmp_path)
    layer.append(*pair(8))
    fork = layer.fork(1)
    whole = [tensor.clone() for tensor in fork.gather(*pair(0))]
    layer.crop(5)
    assert all(map(torch.equal, layer.gather(*pair(0)), (tensor[:, :, :5] for tensor in whole)))
    layer.crop(0)
    layer.append(*pair(8, seed=3))
    assert all(map(torch.equal, fork.gather(*pair(0)), whole))
    shared = [entry.extent.location for entry in fork.table.entries]
    fork.crop(6)
    assert [entry.extent.location for entry in fork.table.entries] == shared, "the same record, of which less counts"
    assert all(map(torch.equal, fork.gather(*pair(0)), (tensor[:, :, :6] for tensor in whole)))
    fork.close()
    (left,) = layer.table.entries
    assert session.store.storage.holds(left.extent.location.segment)
    layer.crop(0)
    assert session.store.stats().disk_bytes == 0, "with the last of them, its bytes went"
    session.close()


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_what_was_committed_decodes_to_the_same_later(tmp_path, name):
    first = QuantizedStore(store_context(tmp_path, keep=True).storage(), codec(name))
    extents = write_blocks(first, [block(5, seed=1), block(3, seed=2)])
    before = [read_extent(first, extent) for extent in extents]
    commit(first, extents)
    first.close()
    again = QuantizedStore(store_context(tmp_path, keep=True).storage(), codec(name))
    assert extents_of(again.storage.committed) == extents
    again.adopt(extents)
    for extent, expected in zip(extents, before, strict=True):
        found = read_extent(again, extent)
        assert torch.equal(found.keys, expected.keys)
        assert torch.equal(found.values, expected.values)
    again.close()


def test_half_of_what_is_resident_is_not_read(tmp_path):
    """The budget holds records as they are stored, and the same ones for ever."""
    store = make(tmp_path / "other")
    record = write_blocks(store, [block(8)])[0].location.nbytes
    store.close()
    session, layer = make_session(tmp_path, resident_bytes=4 * record)
    for seed in range(8):
        layer.append(*pair(8, seed=seed))
    results, reads = [], []
    for _ in range(4):
        before = session.counters.loaded_bytes
        results.append([tensor.clone() for tensor in layer.gather(*pair(0))])
        reads.append(session.counters.loaded_bytes - before)
    assert reads == [8 * record, 4 * record, 4 * record, 4 * record]
    assert session.source.resident_bytes == 4 * record
    assert all(all(map(torch.equal, result, results[0])) for result in results)
    session.close()


def test_the_file_has_the_bytes_that_were_written_down(tmp_path, monkeypatch):
    fix_store_id(monkeypatch)
    store = make(tmp_path)
    write_blocks(store, [KVBlock(*small_block(2, 10)), KVBlock(*small_block(3, 30))])
    check_golden(store, GOLDEN / "quantized-cold-tier.txt")
