"""Ctrl-C at any line of the engine: what was taken is given back, and after a reset everything works."""

from __future__ import annotations

import pytest
import torch

from core.interrupts import interrupted, lines_of, places
from core.storage.storage_fixtures import open_storage
from ollm.builtin.chunked import ChunkedStore
from ollm.contracts.blocks import BlockKey, Extent, KVBlock, Location
from ollm.contracts.spill import SpillPlan
from ollm.io.ledger import ledger
from ollm.kv import encoded, residency
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession
from ollm.storage.tensors import pack

pytestmark = pytest.mark.timeout(120)


SPACE_ONLY = ("BlockTable.drop", "BlockTable.discard", "_locations", "LayerTable.")
"""Between a list's change and its dropping what it had: nothing is wrong, and the place is free when the cache ends."""


class FourTokens(ChunkedStore):
    extent_tokens = 4


def tokens(count, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 2, count, size, generator=generator) for size in (4, 3))


def check_given_back(make_store, folder):
    """A life of a layer, interrupted at one line after the other, each time in a session of its own."""

    def begin():
        store = make_store(folder)
        plan = SpillPlan(flush_tokens=4, flush_bytes=2**30, hot_tokens=1, resident_bytes=2**20, read_buffers=2)
        session = KVSession(store, plan, strategy="test", layers=[0])
        return session, LayerHistory(0, session)

    def live(layer):
        layer.append(*tokens(9))
        layer.append(*tokens(2, seed=1))
        layer.select_rows(torch.tensor([1, 0]))
        layer.append(*tokens(6, seed=2))
        layer.gather(*tokens(1))
        if layer._session.store.window is None:
            layer.crop(10)
        layer.append(*tokens(5, seed=3))

    before = list(ledger._claims)
    session, layer = begin()
    count = lines_of(lambda: live(layer))
    truth = [tensor.clone() for tensor in layer.gather(*tokens(0))]
    session.close()
    leaks = []
    for at in places(count):
        session, layer = begin()
        where = interrupted(lambda layer=layer: live(layer), at)
        if not where:  # it was quicker this time, as when it need not wait for the disk
            session.close()
            continue
        layer.crop(0)
        layer.rows, layer._layout = 0, None
        store, source = session.store, session.source
        left = store.stats().disk_bytes + store.stats().memory_bytes + source.resident_bytes
        live(layer)
        assert all(map(torch.equal, layer.gather(*tokens(0)), truth)), where
        assert session.table.due().drops == 0
        source.cancel_reads()
        if source._reader is not None:
            assert len(source._reader._buffers._lent) == 0, where
        session.close()
        assert [one for one in ledger._claims if one not in before] == [], where
        if left and not any(name in where for name in SPACE_ONLY):
            leaks.append((where, left))
    assert leaks == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("store_type", [ChunkedStore, FourTokens])
def test_what_an_interrupted_step_took_is_given_back(store_type, tmp_path):
    check_given_back(lambda folder: store_type(open_storage(folder)), tmp_path)


def extents_and_blocks(count):
    blocks = [KVBlock(*tokens(4, seed=number)) for number in range(count)]
    for number, block in enumerate(blocks):
        location = Location(block.layout.nbytes(2, 4), 0, 4096 * number)
        yield Extent.of(BlockKey(0, 0, 4 * number, 4, 2), block.layout, location), block


@pytest.mark.parametrize("kind", ["blocks", "bytes"])
def test_what_was_to_stay_in_memory_gives_its_claims_back_wherever_it_is_interrupted(kind, monkeypatch):
    """Also where a full piece is copied into a larger one."""
    monkeypatch.setattr(residency, "LEAST_PIECE_BYTES", 1)
    offers = list(extents_and_blocks(3))

    def offer_all(tier):
        for extent, block in offers:
            tier.offer(extent, block if kind == "blocks" else pack(block))

    def make():
        if kind == "blocks":
            return residency.Residency(2**20, device=torch.device("cpu"))
        return encoded.EncodedResidency(2**20, pinned=False)

    before = list(ledger._claims)
    for at in places(lines_of(lambda: offer_all(make()))):
        tier = make()
        where = interrupted(lambda tier=tier: offer_all(tier), at)
        for extent, _ in offers:
            tier.drop(extent.location)
        assert [one for one in ledger._claims if one not in before] == [], where
        assert tier.nbytes == 0, where
        offer_all(tier)
        for extent, block in offers:
            if kind == "bytes":
                assert torch.equal(tier.raw(extent), pack(block)), where
            else:
                assert torch.equal(tier.home(extent).view(extent.start, extent.stop).keys, block.keys), where
        tier.clear()
        assert [one for one in ledger._claims if one not in before] == [], where
