"""Stores that break their contract: the engine notices before a wrong token can follow."""

from __future__ import annotations

import pytest
import torch

from ollm.builtin.chunked import ChunkedStore
from ollm.builtin.resident import ResidentStore
from ollm.contracts.blocks import KVBlock, Location
from ollm.contracts.spill import SpillPlan
from ollm.errors import StoreContractError
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession
from ollm.testing import store_context


class Silent(ChunkedStore):
    def write(self, block, key):
        """Says nothing."""


class SaysWhereItBegins(ChunkedStore):
    def write(self, block, key):
        return super().write(block, key).offset


class LessThanNothing(ChunkedStore):
    def write(self, block, key):
        super().write(block, key)
        return Location(-1)


class ShortReading(ResidentStore):
    def read(self, extent):
        return super().read(extent)[:-4]


class ShortReadingElsewhere(ShortReading):
    in_memory = False


class Halving(ChunkedStore):
    def decode(self, extent, raw, out):
        block = super().decode(extent, raw, out)
        return KVBlock(block.keys[:, :, ::2], block.values[:, :, ::2])


class WrongDtype(ChunkedStore):
    def decode(self, extent, raw, out):
        block = super().decode(extent, raw, out)
        return KVBlock(block.keys.double(), block.values)


class Swapping(ChunkedStore):
    def decode(self, extent, raw, out):
        block = super().decode(extent, raw, out)
        return KVBlock(block.values, block.keys)


@pytest.mark.parametrize(
    ("store_type", "message"),
    [
        (Silent, r"write\(\) of 10 tokens at 0 of layer 0 gave None; it must give the Location"),
        (SaysWhereItBegins, r"write\(\) of 10 tokens at 0 of layer 0 gave 4096; it must give the Location"),
        (LessThanNothing, r"write\(\) of 10 tokens at 0 of layer 0 gave Location\(nbytes=-1"),
        (ShortReading, r"read\(\) of layer 0, tokens 0..10 gave \d+ elements"),
        (ShortReadingElsewhere, r"read\(\) of layer 0, tokens 0..10 gave \d+ elements"),
        (Halving, r"decode\(\) of layer 0, tokens 0..10 gave keys \(2, 2, 5, 4\).*expected \(2, 2, 10, 4\)"),
        (WrongDtype, r"decode\(\) of layer 0, tokens 0..10 gave keys .*float64, expected .*float32"),
        (Swapping, r"decode\(\) of layer 0, tokens 0..10 gave keys \(2, 2, 10, 3\).*expected \(2, 2, 10, 4\)"),
    ],
)
def test_a_store_that_breaks_the_contract_is_caught(tmp_path, store_type, message):
    plan = SpillPlan(flush_tokens=5, flush_bytes=2**30)
    store = store_type(store_context(tmp_path).storage()) if issubclass(store_type, ChunkedStore) else store_type()
    session = KVSession(store, plan, strategy="test", layers=[0])
    layer = LayerHistory(0, session)
    keys, values = torch.ones(2, 2, 10, 4), torch.ones(2, 2, 10, 3)
    with pytest.raises(StoreContractError, match=f"KV store 'test': {message}"):
        layer.append(keys, values)
        layer.gather(keys, values)
    session.close()
