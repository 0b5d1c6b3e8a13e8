"""Every clause of `KVStore`'s contract, one test each, against the tensors that were appended."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from ollm.contracts.kv import KVBlock, KVStore
from ollm.errors import OllmError, StoreContractError
from ollm.storage.tensors import LayerLayout
from ollm.testing.blocks import assert_reads, assert_same, read_extent, read_raw
from ollm.testing.case import StoreCase

_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
_GEOMETRIES: list[tuple[int, int, int, int]] = [(1, 1, 2, 2), (3, 2, 8, 6), (2, 3, 4, 8), (1, 4, 512, 64)]


class ContractTests(StoreCase):
    """One store, used as core uses it."""

    @pytest.mark.parametrize("dtype", _DTYPES, ids=str)
    @pytest.mark.parametrize(("rows", "heads", "key_size", "value_size"), _GEOMETRIES)
    def test_round_trip(
        self, store: KVStore, dtype: torch.dtype, rows: int, heads: int, key_size: int, value_size: int
    ) -> None:
        """Every dtype, different sizes of keys and values, one row and several."""
        geometry: dict[str, Any] = {"rows": rows, "heads": heads, "key_size": key_size, "value_size": value_size}
        blocks = [self.block(store, tokens, seed=tokens, dtype=dtype, **geometry) for tokens in (1, 7, 64)]
        for keys, values in blocks:
            store.append(0, keys, values)
        self.holds(store, 0, blocks)

    def test_every_bit_pattern(self, store: KVStore) -> None:
        """Infinities, NaNs and negative zeros included: all come back, or are refused and change nothing."""
        pieces = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).reshape(1, 1, -1, 1024)
        before = self.block(store, 2, rows=1, heads=1, key_size=1024, value_size=1024, dtype=torch.bfloat16)
        store.append(0, *before)
        kept = [before]
        for index in range(pieces.shape[2]):
            keys = pieces[:, :, index : index + 1]
            try:
                store.append(0, keys, keys.flip(3))
            except OllmError:
                assert self.tolerance, "a lossless store takes every number"
                continue
            kept.append((keys, keys.flip(3)))
        if self.tolerance:
            kept = kept[: 1 + next((i for i, (keys, _) in enumerate(kept[1:]) if not keys.isfinite().all()), len(kept))]
            assert len(store.extents(0)) == len(kept), "what is not finite was neither refused nor kept"
        self.holds(store, 0, kept)

    def test_layers_are_apart_and_may_differ(self, store: KVStore) -> None:
        """Numbers of forks are far above those of the model's layers."""
        blocks = {
            layer: self.block(store, 5, heads=layer % 5 + 1, key_size=4 * (layer % 7 + 1), seed=layer)
            for layer in (0, 1, 99)
        }
        for layer, (keys, values) in blocks.items():
            store.append(layer, keys, values)
        for layer, block in blocks.items():
            self.holds(store, layer, [block])
        store.truncate(1, 0)
        assert tuple(store.extents(1)) == ()
        self.holds(store, 99, [blocks[99]])
        assert tuple(store.extents(7)) == (), "extents of a layer that was never appended to"

    def test_a_layer_that_was_emptied_takes_other_shapes(self, store: KVStore) -> None:
        store.append(0, *self.block(store, 5))
        store.truncate(0, 0)
        other = self.block(store, 3, rows=1, heads=2, key_size=16, value_size=4, dtype=torch.float16)
        store.append(0, *other)
        self.holds(store, 0, [other])

    def test_the_callers_tensors_are_copied(self, store: KVStore) -> None:
        """Contiguous ones too, which are the easiest to keep by mistake."""
        keys, values = (tensor.contiguous() for tensor in self.block(store, 4))
        before = keys.clone(), values.clone()
        store.append(0, keys, values)
        keys.zero_()
        values.zero_()
        self.holds(store, 0, [before])

    def test_truncate_at_every_border(self, store: KVStore) -> None:
        blocks = [self.block(store, 3, seed=seed) for seed in range(5)]
        for keep in range(len(blocks), -1, -1):
            for block in blocks[len(store.extents(0)) :]:
                store.append(0, *block)
            store.truncate(0, sum(keys.shape[2] for keys, _ in blocks[:keep]))
            self.holds(store, 0, blocks[:keep])

    def test_extents_are_snapshots(self, store: KVStore) -> None:
        """A sequence that was handed out stays as it is."""
        store.append(0, *self.block(store, 4))
        before = store.extents(0)
        listed = list(before)
        store.append(0, *self.block(store, 4))
        store.truncate(0, 0)
        assert list(before) == listed

    def test_dropped_bytes_stay_until_they_are_released(self, store: KVStore) -> None:
        """A reader may still hold what was dropped, while others take its place."""
        first, second = self.block(store, 4, seed=1), self.block(store, 4, seed=2)
        store.append(0, *first)
        dropped = store.extents(0)
        store.truncate(0, 0)
        store.append(0, *second)
        assert store.extents(0)[0] != dropped[0], "a reader of the old one would be given the new one"
        assert_reads(store, dropped[0], first, self.tolerance)
        store.release(dropped)
        self.holds(store, 0, [second])

    def test_space_comes_back(self, store: KVStore) -> None:
        """What was released is used again: twenty times as much takes no more than twice the room."""

        def size() -> int:
            stats = store.stats()
            return stats.disk_bytes + stats.memory_bytes

        def add_and_drop() -> None:
            store.append(0, *self.block(store, 64))
            dropped = store.extents(0)[1:]
            store.truncate(0, first.shape[2])
            store.release(dropped)

        first, values = self.block(store, 4)
        store.append(0, first, values)
        assert size() > 0, "stats() must tell of bytes on disk or in memory"
        store.append(0, *self.block(store, 64))
        dropped, most = store.extents(0)[1:], size()
        store.truncate(0, first.shape[2])
        store.release(dropped)
        for _ in range(20):
            add_and_drop()
        assert size() <= 2 * most

    def test_keys_and_values_that_do_not_belong_together_are_refused(self, store: KVStore) -> None:
        """`LayerLayout.of` checks it; all or nothing."""
        keys, values = self.block(store, 4)
        for wrong in ((keys, values[:, :, :1]), (keys, values.half()), (keys[0], values[0])):
            with pytest.raises(StoreContractError, match="do not belong together"):
                store.append(0, *wrong)
        assert tuple(store.extents(0)) == ()

    def test_decode_writes_where_it_is_told_or_gives_a_view(self, store: KVStore) -> None:
        """With `out` the result is the same as without, whatever was in it; the block that holds it is returned."""
        keys, values = self.block(store, 7, dtype=torch.bfloat16)
        store.append(0, keys, values)
        extent = store.extents(0)[0]
        plain = read_extent(store, extent)
        layout = LayerLayout.of(keys, values)
        out = KVBlock(
            torch.full(keys.shape, float("nan"), dtype=layout.dtype),
            torch.full(values.shape, float("nan"), dtype=layout.dtype),
        )
        block = store.decode(extent, read_raw(store, extent), out)
        for ours, scale, theirs in zip(
            (block.keys, block.values), (block.key_scale, block.value_scale), plain, strict=True
        ):
            assert_same(ours if scale == 1.0 else ours * scale, theirs, 0.0, "decode() with and without `out`")

    def test_reading_twice_gives_the_same(self, store: KVStore) -> None:
        """And does not change what is kept, whatever a reader does to its bytes."""
        block = self.block(store, 6)
        store.append(0, *block)
        if store.storage is None and not store.in_memory:
            read_raw(store, store.extents(0)[0]).zero_()
        self.holds(store, 0, [block])
        self.holds(store, 0, [block])

    def test_several_threads_read_at_once(self, store: KVStore) -> None:
        """As ollm's I/O workers do, while another layer grows."""
        blocks = [self.block(store, 4, seed=seed, heads=4, key_size=128, value_size=128) for seed in range(4)]
        for block in blocks:
            store.append(0, *block)
        extents = [*store.extents(0)] * 40
        with ThreadPoolExecutor(8) as threads:
            reads = [threads.submit(read_raw, store, extent) for extent in extents]
            for seed in range(4):
                store.append(1, *self.block(store, 4, seed=seed))
        for read, extent, block in zip(reads, extents, blocks * 40, strict=True):
            decoded = store.decode(extent, read.result(), None)
            for name, mine, scale, theirs in zip(
                ("keys", "values"), (decoded.keys, decoded.values), (decoded.key_scale, decoded.value_scale), block,
                strict=True,
            ):  # fmt: skip
                assert_same(mine if scale == 1.0 else mine * scale, theirs, self.tolerance, f"{name} of {extent}")

    def test_counters(self, store: KVStore) -> None:
        assert store.stats().representation
        store.append(0, *self.block(store, 5))
        stats = store.stats()
        for name in ("disk_bytes", "memory_bytes", "bytes_written", "bytes_read", "compactions"):
            value = getattr(stats, name)
            assert isinstance(value, int), f"stats().{name}"
            assert value >= 0, f"stats().{name}"

    def test_the_window_is_what_was_asked_for(self, store: KVStore) -> None:
        assert store.window == self.window_tokens
        assert store.sinks >= 0

    def test_close_twice(self, store: KVStore) -> None:
        store.append(0, *self.block(store, 4))
        store.close()
        store.close()
