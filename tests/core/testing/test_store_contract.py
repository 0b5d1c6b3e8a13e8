"""Stores that break their contract: the engine notices before a wrong token can follow."""

from __future__ import annotations

import pytest
import torch

from core.storage.storage_fixtures import open_storage
from ollm.builtin.chunked import ChunkedStore
from ollm.builtin.resident import ResidentStore
from ollm.contracts.kv import KVBlock
from ollm.contracts.spill import SpillPlan
from ollm.errors import StoreContractError
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession


class Forgetful(ChunkedStore):
    def append(self, layer, keys, values):
        """Keeps nothing."""


class Halving(ChunkedStore):
    def append(self, layer, keys, values):
        super().append(layer, keys[:, :, ::2], values[:, :, ::2])


class Stubborn(ChunkedStore):
    def truncate(self, layer, length):
        """Drops nothing."""


class ShortReading(ResidentStore):
    def read(self, extent):
        return super().read(extent)[:-4]


class ShortReadingElsewhere(ShortReading):
    in_memory = False


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
        (Forgetful, r"after append\(\) of 10 tokens at 0 to layer 0, extents\(\) lists nothing"),
        (Halving, r"after append\(\) of 10 tokens at 0 to layer 0, extents\(\) lists Extent\(.*tokens=5"),
        (Stubborn, r"after truncate\(0, 0\), extents\(\) lists 1 extents instead of 0"),
        (ShortReading, r"read\(\) of Extent\(.*gave \d+ elements"),
        (ShortReadingElsewhere, r"read\(\) of Extent\(.*gave \d+ elements"),
        (WrongDtype, r"decode\(\) of Extent\(.*gave keys .*float64, expected .*float32"),
        (Swapping, r"decode\(\) of Extent\(.*gave keys \(2, 2, 10, 3\).*expected \(2, 2, 10, 4\)"),
    ],
)
def test_a_store_that_breaks_the_contract_is_caught(tmp_path, store_type, message):
    plan = SpillPlan(flush_tokens=5, flush_bytes=2**30)
    store = store_type(open_storage(tmp_path)) if issubclass(store_type, ChunkedStore) else store_type()
    session = KVSession(store, plan, strategy="test", layers=[0])
    layer = LayerHistory(0, session)
    keys, values = torch.ones(2, 2, 10, 4), torch.ones(2, 2, 10, 3)
    with pytest.raises(StoreContractError, match=f"KV store 'test': {message}"):
        layer.append(keys, values)
        layer.gather(keys, values)
        layer.crop(0)
    session.close()
