"""Reading ahead from stores that have no files."""

from __future__ import annotations

import threading

import torch

from core.kv.engine_fixtures import TOKENS, expected, joined, tokens, walk
from ollm.builtin.resident import ResidentStore
from ollm.contracts.kv import KVStore
from ollm.contracts.spill import SpillPlan
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession

EXTENTS = 6


def test_a_store_without_files_is_read_ahead_too_on_the_workers():
    class Far(KVStore):
        """Somewhere on a network."""

        def __init__(self):
            self.near, self.threads = ResidentStore(), set()

        def write(self, block, key):
            return self.near.write(block, key)

        def read(self, extent):
            self.threads.add(threading.current_thread().name)
            return self.near.read(extent)

        def decode(self, extent, raw, out):
            return self.near.decode(extent, raw, out)

        def free(self, locations):
            self.near.free(locations)

    store = Far()
    plan = SpillPlan(flush_tokens=TOKENS, flush_bytes=2**30, read_buffers=4)
    session = KVSession(store, plan, strategy="far", layers=range(2))
    layers = [LayerHistory(layer, session) for layer in range(2)]
    for number in range(EXTENTS):
        for index, layer in enumerate(layers):
            layer.append(*tokens(TOKENS, seed=100 * index + number))
    for _ in range(3):
        for index, layer in enumerate(layers):
            assert torch.equal(joined(walk(layer), EXTENTS * TOKENS), expected(index, EXTENTS))
    assert store.threads and all(name.startswith("ollm-io") for name in store.threads)
    assert len(session.source._reader._ahead) == 3
    session.close()
