"""A store that says so is decoded by the threads that read, ahead of attention; what comes out is the same."""

from __future__ import annotations

import threading
import zlib

import pytest
import torch

from core.kv.engine_fixtures import EXTENT_BYTES, TOKENS, expected, joined, make_session, tokens, walk
from ollm.errors import CorruptDataError, StoreContractError
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession
from ollm.plugin import KVBlock, KVStore, Location, SegmentedStore, SpillPlan, pack, unpack


class Packing(SegmentedStore):
    """Compresses, and notes where it decodes."""

    decodes_ahead = True

    def __init__(self, storage):
        super().__init__(storage)
        self.threads, self.fails = [], None

    def encode(self, block):
        return [torch.frombuffer(bytearray(zlib.compress(pack(block).numpy().tobytes(), 1)), dtype=torch.uint8)]

    def decode(self, extent, raw, out):
        self.threads.append(threading.current_thread().name.split("_")[0])
        if self.fails is not None:
            raise self.fails
        found = unpack(extent, torch.frombuffer(bytearray(zlib.decompress(raw.numpy())), dtype=torch.uint8))
        return KVBlock(out.keys.copy_(found.keys), out.values.copy_(found.values))


class OneByOne(Packing):
    decodes_ahead = False


@pytest.fixture(params=[Packing, OneByOne])
def opened(request, tmp_path):
    """A session with three layers of five extents that are on the disk."""
    session, layers = make_session(tmp_path, extents=5, store_type=request.param)
    yield session, layers
    session.close()


def test_workers_decode_where_the_store_says_so(opened):
    session, layers = opened
    for _ in range(3):
        for number, layer in enumerate(layers):
            assert torch.equal(joined(walk(layer), 5 * TOKENS), expected(number, 5))
    ahead = session.store.decodes_ahead
    assert set(session.store.threads) == {"ollm-io" if ahead else "MainThread"}
    assert session.source.buffer_bytes >= (4 if ahead else 1) * EXTENT_BYTES


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_whatever_mode_it_is_made_and_used_in(tmp_path, mode):
    with torch.inference_mode():
        session, layers = make_session(tmp_path, layers=1, extents=5, store_type=Packing)
    for _ in range(3):
        with mode():
            assert torch.equal(joined(walk(layers[0]), 5 * TOKENS), expected(0, 5))
    session.close()


def test_what_is_cut_and_gathered_is_right_too(opened):
    _, layers = opened
    layers[0].crop(3 * TOKENS + 5)
    keys, values = tokens(1, seed=9)
    gathered = layers[0].gather(keys, values)[0]
    assert torch.equal(gathered[:, :, : 3 * TOKENS + 5], expected(0, 5)[:, :, : 3 * TOKENS + 5])
    assert torch.equal(joined(walk(layers[0]), 3 * TOKENS + 5), expected(0, 5)[:, :, : 3 * TOKENS + 5])


def test_an_error_of_a_decoder_comes_to_whoever_wants_the_block_and_the_next_attempt_works(opened):
    session, layers = opened
    session.store.fails = CorruptDataError("damaged")
    for _ in range(2):
        with pytest.raises(CorruptDataError, match="damaged"):
            walk(layers[0])
    session.store.fails = None
    assert torch.equal(joined(walk(layers[0]), 5 * TOKENS), expected(0, 5))


def test_what_a_worker_decoded_is_checked(tmp_path):
    class Halving(Packing):
        def decode(self, extent, raw, out):
            block = super().decode(extent, raw, out)
            return KVBlock(block.keys[:, :, ::2], block.values)

    session, layers = make_session(tmp_path, layers=1, extents=2, store_type=Halving)
    with pytest.raises(StoreContractError, match=r"decode\(\) of layer 0, tokens 0\.\.16 gave keys"):
        walk(layers[0])
    session.close()


def test_a_store_with_files_of_its_own_is_decoded_ahead_as_well(tmp_path):
    class OfItsOwn(KVStore):
        decodes_ahead = True

        def __init__(self):
            self.shelf, self.threads = {}, []

        def write(self, block, key):
            raw = pack(block)
            location = Location(raw.numel(), offset=len(self.shelf))
            self.shelf[location] = raw
            return location

        def read(self, extent):
            return self.shelf[extent.location]

        def decode(self, extent, raw, out):
            self.threads.append(threading.current_thread().name.split("_")[0])
            return unpack(extent, raw)

        def free(self, locations):
            for location in locations:
                del self.shelf[location]

    plan = SpillPlan(flush_tokens=TOKENS, flush_bytes=2**30, read_buffers=4)
    session = KVSession(OfItsOwn(), plan, strategy="test", layers=[0])
    layer = LayerHistory(0, session)
    for number in range(5):
        layer.append(*tokens(TOKENS, seed=number))
    for _ in range(2):
        assert torch.equal(joined(walk(layer), 5 * TOKENS), expected(0, 5))
    assert set(session.store.threads) == {"ollm-io"}
    session.close()
