"""The KV contract, for the two stores of core alike: every rule of `KVStore` against a list of tensors."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.storage_fixtures import open_storage, read_raw
from ollm.builtin.chunked import ChunkedStore
from ollm.builtin.resident import ResidentStore
from ollm.contracts.kv import KVStore
from ollm.errors import StorageError, StoreContractError

STORES = ("chunked", "resident")


def make(kind, folder) -> KVStore:
    return ChunkedStore(open_storage(folder)) if kind == "chunked" else ResidentStore()


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    store = make(request.param, tmp_path)
    yield store
    store.close()
    assert not any(tmp_path.iterdir())


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
    decoded = store.decode(extent, raw_of(store, extent), None)
    return decoded.keys, decoded.values


def assert_holds(store, layer, blocks):
    """The store lists and gives back exactly these blocks, in order."""
    extents = store.extents(layer)
    assert [extent.tokens for extent in extents] == [keys.shape[2] for keys, _ in blocks]
    position = 0
    for extent, (keys, values) in zip(extents, blocks, strict=True):
        assert (extent.layer, extent.start, extent.rows) == (layer, position, keys.shape[0])
        assert extent.nbytes == raw_of(store, extent).numel() == keys.nbytes + values.nbytes
        position = extent.stop
        for ours, theirs in zip(read(store, extent), (keys, values), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "heads", "key_size", "value_size"), [(1, 1, 1, 1), (3, 2, 8, 5), (1, 4, 512, 64)])
def test_round_trip(store, dtype, rows, heads, key_size, value_size):
    geometry = {"rows": rows, "heads": heads, "key_size": key_size, "value_size": value_size, "dtype": dtype}
    blocks = [block(tokens, seed=tokens, **geometry) for tokens in (1, 7, 64)]
    for keys, values in blocks:
        store.append(0, keys, values)
    assert_holds(store, 0, blocks)


def test_every_bit_pattern_survives(store):
    """Infinities, NaNs and negative zeros included: nothing is computed on the way."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).reshape(1, 1, -1, 64)
    store.append(0, bits, bits.flip(2))
    keys, values = read(store, store.extents(0)[0])
    assert torch.equal(keys.contiguous().view(torch.int16), bits.view(torch.int16))
    assert torch.equal(values.contiguous().view(torch.int16), bits.flip(2).contiguous().view(torch.int16))


def test_layers_are_apart_and_may_differ(store):
    blocks = {layer: block(5, heads=layer + 1, key_size=4 * (layer + 1), seed=layer) for layer in range(3)}
    for layer, (keys, values) in blocks.items():
        store.append(layer, keys, values)
    for layer in blocks:
        assert_holds(store, layer, [blocks[layer]])
    store.truncate(1, 0)
    assert store.extents(1) == ()
    assert_holds(store, 2, [blocks[2]])
    assert store.extents(7) == ()


def test_the_callers_tensors_are_copied(store):
    keys, values = block(4)
    before = keys.clone(), values.clone()
    store.append(0, keys, values)
    keys.zero_()
    values.zero_()
    assert_holds(store, 0, [before])


def test_extents_are_snapshots(store):
    store.append(0, *block(4))
    before = store.extents(0)
    listed = list(before)
    store.append(0, *block(4))
    store.truncate(0, 0)
    assert list(before) == listed


def test_bytes_of_dropped_extents_stay_until_they_are_released(store):
    first, second = block(4, seed=1), block(4, seed=2)
    store.append(0, *first)
    dropped = store.extents(0)
    store.truncate(0, 0)
    store.append(0, *second)
    assert store.extents(0)[0] != dropped[0], "a reader of the old one would be given the new one"
    assert torch.equal(read(store, dropped[0])[0], first[0])
    store.release(dropped)
    assert_holds(store, 0, [second])


def test_space_comes_back(store):
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


def test_keys_and_values_that_do_not_belong_together_are_refused(store):
    keys, values = block(4)
    for wrong in ((keys, values[:, :, :3]), (keys, values.half()), (keys[0], values[0])):
        with pytest.raises(StoreContractError, match="do not belong together"):
            store.append(0, *wrong)
    assert store.extents(0) == ()


def test_close_twice(store):
    store.append(0, *block(4))
    store.close()
    store.close()


def test_a_dtype_that_the_format_does_not_have_is_refused(tmp_path):
    store = make("chunked", tmp_path)
    keys = torch.zeros(1, 1, 1, 1, dtype=torch.complex64)
    with pytest.raises(StorageError, match=r"complex64 cannot be stored.*bfloat16"):
        store.append(0, keys, keys)
    assert store.extents(0) == ()
    store.close()


class StoreMachine(RuleBasedStateMachine):
    """Random appends, truncations and releases, against a dumb model: a list of tensors per layer."""

    kind: str

    @initialize()
    def start(self):
        import tempfile
        from pathlib import Path

        self.folder = tempfile.TemporaryDirectory()
        self.store = make(self.kind, Path(self.folder.name))
        self.model = {layer: [] for layer in range(2)}
        self.pinned = []
        self.seed = 0

    @rule(layer=st.integers(0, 1), tokens=st.integers(1, 9))
    def append(self, layer, tokens):
        self.seed += 1
        keys, values = block(tokens, rows=2, value_size=5, seed=self.seed)
        self.store.append(layer, keys, values)
        self.model[layer].append((keys, values))

    @rule(layer=st.integers(0, 1), keep=st.integers(0, 5))
    def truncate(self, layer, keep):
        """Drop all but the first extents; a reader still holds those that are dropped."""
        dropped = list(zip(self.store.extents(layer), self.model[layer], strict=True))[keep:]
        del self.model[layer][keep:]
        self.store.truncate(layer, sum(keys.shape[2] for keys, _ in self.model[layer]))
        self.pinned += dropped

    @precondition(lambda self: self.pinned)
    @rule()
    def release(self):
        self.store.release([extent for extent, _ in self.pinned])
        self.pinned = []

    @invariant()
    def same_as_the_model(self):
        for layer, blocks in self.model.items():
            assert_holds(self.store, layer, blocks)
        for extent, (keys, values) in self.pinned:
            assert all(map(torch.equal, read(self.store, extent), (keys, values)))

    def teardown(self):
        self.store.close()
        self.folder.cleanup()


class ChunkedMachine(StoreMachine):
    kind = "chunked"


class ResidentMachine(StoreMachine):
    kind = "resident"


TestChunkedMachine = ChunkedMachine.TestCase
TestResidentMachine = ResidentMachine.TestCase
