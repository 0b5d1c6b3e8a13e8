"""Every rule of `KVStore`, against lists of tensors, for any store: subclass `StoreContract`, and call `machine`."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.storage_fixtures import read_raw
from ollm.errors import StoreContractError


def block(tokens, *, rows=2, heads=3, key_size=8, value_size=8, dtype=torch.float32, seed=0):
    """Random keys and values as attention makes them: not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(rows, tokens, heads, size, generator=generator).to(dtype).transpose(1, 2)
        for size in (key_size, value_size)
    )


def raw_of(store, extent):
    """The raw bytes, as core reads them."""
    return store.read(extent) if store.storage is None else read_raw(store.storage, extent)[0]


def read(store, extent):
    """Keys and values of an extent, scales applied."""
    decoded = store.decode(extent, raw_of(store, extent), None)
    keys, values = (
        tensor if scale == 1.0 else tensor * scale
        for tensor, scale in ((decoded.keys, decoded.key_scale), (decoded.values, decoded.value_scale))
    )
    return keys, values


def exactly(ours, theirs):
    """Equal, bit for bit but for NaNs."""
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


def assert_holds(store, layer, blocks, same=exactly):
    """The store lists and gives back exactly these blocks, in order."""
    extents = store.extents(layer)
    assert [extent.tokens for extent in extents] == [keys.shape[2] for keys, _ in blocks]
    position = 0
    for extent, (keys, values) in zip(extents, blocks, strict=True):
        assert (extent.layer, extent.start, extent.rows) == (layer, position, keys.shape[0])
        assert extent.nbytes == raw_of(store, extent).numel()
        position = extent.stop
        for ours, theirs in zip(read(store, extent), (keys, values), strict=True):
            same(ours, theirs)


class StoreContract(ABC):
    """Tests for one store."""

    same = staticmethod(exactly)
    """How what is read must equal what was appended."""

    @abstractmethod
    def make(self, folder):
        """The store, empty, with its files below a folder."""

    @pytest.fixture
    def store(self, tmp_path):
        store = self.make(tmp_path)
        yield store
        store.close()
        assert not any(tmp_path.iterdir())

    def holds(self, store, layer, blocks):
        assert_holds(store, layer, blocks, self.same)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize(("rows", "heads", "key_size", "value_size"), [(1, 1, 2, 2), (3, 2, 8, 6), (1, 4, 512, 64)])
    def test_round_trip(self, store, dtype, rows, heads, key_size, value_size):
        geometry = {"rows": rows, "heads": heads, "key_size": key_size, "value_size": value_size, "dtype": dtype}
        blocks = [block(tokens, seed=tokens, **geometry) for tokens in (1, 7, 64)]
        for keys, values in blocks:
            store.append(0, keys, values)
        self.holds(store, 0, blocks)

    def test_layers_are_apart_and_may_differ(self, store):
        """Numbers of forks are far above those of the model's layers."""
        blocks = {
            layer: block(5, heads=layer % 5 + 1, key_size=4 * (layer % 7 + 1), seed=layer) for layer in (0, 1, 99)
        }
        for layer, (keys, values) in blocks.items():
            store.append(layer, keys, values)
        for layer in blocks:
            self.holds(store, layer, [blocks[layer]])
        store.truncate(1, 0)
        assert tuple(store.extents(1)) == ()
        self.holds(store, 99, [blocks[99]])
        assert tuple(store.extents(7)) == ()

    def test_a_layer_that_was_emptied_takes_other_shapes(self, store):
        store.append(0, *block(5))
        store.truncate(0, 0)
        other = block(3, rows=1, heads=2, key_size=16, value_size=4, dtype=torch.float16)
        store.append(0, *other)
        self.holds(store, 0, [other])

    def test_the_callers_tensors_are_copied(self, store):
        keys, values = block(4)
        before = keys.clone(), values.clone()
        store.append(0, keys, values)
        keys.zero_()
        values.zero_()
        self.holds(store, 0, [before])

    def test_extents_are_snapshots(self, store):
        store.append(0, *block(4))
        before = store.extents(0)
        listed = list(before)
        store.append(0, *block(4))
        store.truncate(0, 0)
        assert list(before) == listed

    def test_bytes_of_dropped_extents_stay_until_they_are_released(self, store):
        first, second = block(4, seed=1), block(4, seed=2)
        store.append(0, *first)
        dropped = store.extents(0)
        store.truncate(0, 0)
        store.append(0, *second)
        assert store.extents(0)[0] != dropped[0], "a reader of the old one would be given the new one"
        self.same(read(store, dropped[0])[0], first[0])
        store.release(dropped)
        self.holds(store, 0, [second])

    def test_space_comes_back(self, store):
        def size():
            stats = store.stats()
            return stats.disk_bytes + stats.memory_bytes

        store.append(0, *block(4))
        one = size()
        assert one > 0
        for _ in range(20):
            store.append(0, *block(64))
            dropped = store.extents(0)[1:]
            store.truncate(0, 4)
            store.release(dropped)
        assert size() == one

    def test_keys_and_values_that_do_not_belong_together_are_refused(self, store):
        keys, values = block(4)
        for wrong in ((keys, values[:, :, :3]), (keys, values.half()), (keys[0], values[0])):
            with pytest.raises(StoreContractError, match="do not belong together"):
                store.append(0, *wrong)
        assert tuple(store.extents(0)) == ()

    def test_close_twice(self, store):
        store.append(0, *block(4))
        store.close()
        store.close()


def machine(make, same=exactly, most_tokens=9):
    """A Hypothesis test case: random appends, truncations and releases, against a list of tensors per layer."""

    class StoreMachine(RuleBasedStateMachine):
        @initialize()
        def start(self):
            self.folder = tempfile.TemporaryDirectory()
            self.store = make(Path(self.folder.name))
            self.model = {layer: [] for layer in range(2)}
            self.pinned = []
            self.seed = 0

        @rule(layer=st.integers(0, 1), tokens=st.integers(1, most_tokens))
        def append(self, layer, tokens):
            self.seed += 1
            keys, values = block(tokens, rows=2, value_size=6, seed=self.seed)
            self.store.append(layer, keys, values)
            self.model[layer].append((keys, values))

        @rule(layer=st.integers(0, 1), keep=st.integers(0, 5))
        def truncate(self, layer, keep):
            """Drop all but the first extents; a reader still holds those that are dropped."""
            dropped = list(zip(self.store.extents(layer), self.model[layer], strict=True))[keep:]
            del self.model[layer][keep:]
            self.store.truncate(layer, sum(keys.shape[2] for keys, _ in self.model[layer]))
            self.pinned += dropped

        @precondition(lambda self: self.store.trims)
        @rule(layer=st.integers(0, 1), tokens=st.integers(0, 20))
        def trim(self, layer, tokens):
            """Keep some tokens, wherever that cuts."""
            extents, blocks = self.store.extents(layer), self.model[layer]
            kept = [pair for extent, pair in zip(extents, blocks, strict=True) if extent.stop <= tokens]
            self.pinned += list(zip(extents, blocks, strict=True))[len(kept) :]
            if len(kept) < len(extents) and extents[len(kept)].start < tokens:
                inside = tokens - extents[len(kept)].start
                kept.append(tuple(tensor[:, :, :inside] for tensor in blocks[len(kept)]))
            if sum(keys.shape[2] for keys, _ in blocks) > tokens:
                self.store.truncate(layer, tokens)
                self.model[layer] = kept

        @precondition(lambda self: self.pinned)
        @rule()
        def release(self):
            self.store.release([extent for extent, _ in self.pinned])
            self.pinned = []

        @invariant()
        def same_as_the_model(self):
            for layer, blocks in self.model.items():
                assert_holds(self.store, layer, blocks, same)
            for extent, (keys, values) in self.pinned:
                for ours, theirs in zip(read(self.store, extent), (keys, values), strict=True):
                    same(ours, theirs)

        def teardown(self):
            self.store.close()
            self.folder.cleanup()

    return StoreMachine.TestCase
