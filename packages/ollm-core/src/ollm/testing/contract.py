"""Every clause of `KVStore`'s contract, one test each, against the tensors that were written."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import pytest
import torch

from ollm.contracts.blocks import BlockKey, KVBlock
from ollm.contracts.kv import KVStore
from ollm.errors import OllmError, StoreContractError
from ollm.testing.blocks import assert_equal, assert_reads, read_extent, read_raw, scaled, write_blocks
from ollm.testing.case import StoreCase, flush_writes

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
        self.holds(store, write_blocks(store, blocks), blocks)

    def test_every_bit_pattern(self, store: KVStore) -> None:
        """Infinities, NaNs and negative zeros included: all come back, or are refused and change nothing."""
        pieces = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).reshape(1, 1, -1, 1024)
        kept = self.blocks(store, 1, 2, rows=1, heads=1, key_size=1024, value_size=1024, dtype=torch.bfloat16)
        extents = write_blocks(store, kept)
        for index in range(pieces.shape[2]):
            piece = pieces[:, :, index : index + 1]
            block = KVBlock(piece, piece.flip(3))
            try:
                extents += write_blocks(store, [block], start=extents[-1].stop)
            except OllmError:
                assert self.tolerance, "a lossless store takes every number"
                continue
            kept.append(block)
            if self.tolerance:
                assert piece.isfinite().all(), "what is not finite was neither refused nor kept"
        self.holds(store, extents, kept)

    def test_layers_and_branches_are_apart_and_may_differ(self, store: KVStore) -> None:
        """Forks write other tokens to the same positions of the same layer; layers have shapes of their own."""
        blocks = {
            (layer, branch): self.block(
                store, 5, heads=layer % 5 + 1, key_size=4 * (layer % 7 + 1), seed=layer + branch
            )
            for layer in (0, 1, 99)
            for branch in (0, 1, 2)
        }
        extents = {
            place: write_blocks(store, [block], layer=place[0], branch=place[1])[0] for place, block in blocks.items()
        }
        self.holds(store, [*extents.values()], [*blocks.values()])
        store.free([extents.pop((1, 0)).location, extents.pop((0, 1)).location, extents.pop((99, 2)).location])
        self.holds(store, [*extents.values()], [blocks[place] for place in extents])

    def test_a_layer_that_was_emptied_takes_other_shapes(self, store: KVStore) -> None:
        store.free([extent.location for extent in write_blocks(store, self.blocks(store, 2, 5))])
        other = self.block(store, 3, rows=1, heads=2, key_size=16, value_size=4, dtype=torch.float16)
        self.holds(store, write_blocks(store, [other]), [other])

    def test_the_callers_tensors_are_copied(self, store: KVStore) -> None:
        """Contiguous ones too, which are the easiest to keep by mistake."""
        block = self.block(store, 4)
        given = KVBlock(block.keys.contiguous(), block.values.contiguous())
        before = KVBlock(block.keys.clone(), block.values.clone())
        extents = write_blocks(store, [given])
        given.keys.zero_()
        given.values.zero_()
        self.holds(store, extents, [before])

    def test_positions_are_written_again_after_others_were_dropped(self, store: KVStore) -> None:
        """At every border: the last blocks are freed, and others come in their place."""
        extents, blocks = write_blocks(store, self.blocks(store, 5, 3)), self.blocks(store, 5, 3)
        for keep in range(len(blocks) - 1, -1, -1):
            store.free([extent.location for extent in extents[keep:]])
            new = self.blocks(store, len(blocks) - keep, 3, seed=10 + keep)
            extents[keep:] = write_blocks(store, new, start=extents[keep].start)
            blocks[keep:] = new
            self.holds(store, extents, blocks)

    def test_a_text_that_was_dropped_whole_is_followed_by_another(self, store: KVStore) -> None:
        """As after a crop to nothing, or a reset: all is freed, at once or bit by bit, and others begin at the first
        position again. A store that tidies up when it is empty goes on all the same."""
        for seed, at_once in enumerate((True, False, True)):
            blocks = {layer: self.blocks(store, 3, 4 + seed, seed=10 * seed + layer) for layer in (0, 1)}
            extents = {layer: write_blocks(store, blocks[layer], layer=layer) for layer in (0, 1)}
            flush_writes(store)
            self.holds(store, [*extents[0], *extents[1]], [*blocks[0], *blocks[1]])
            locations = [extent.location for extent in [*extents[0], *extents[1]]]
            for freed in [locations] if at_once else [[location] for location in reversed(locations)]:
                store.free(freed)
        last = self.blocks(store, 2, 5, seed=99)
        self.holds(store, write_blocks(store, last), last)

    def test_dropped_bytes_stay_until_they_are_freed(self, store: KVStore) -> None:
        """A reader may still hold what was dropped, while other tokens are written under the same key."""
        first, second = self.blocks(store, 2, 4)
        (old,), (new,) = write_blocks(store, [first]), write_blocks(store, [second])
        assert old.location != new.location, "a reader of the old one would be given the new one"
        self.holds(store, [old, new], [first, second])
        store.free([old.location])
        self.holds(store, [new], [second])

    def test_what_is_kept_stays_while_others_come_and_go(self, store: KVStore) -> None:
        """Whatever is freed, of whatever size, what takes its place leaves the neighbours alone."""
        blocks = [self.block(store, tokens, seed=tokens) for tokens in range(1, 10)]
        extents = write_blocks(store, blocks)
        for freed in (slice(1, None, 2), slice(0, None, 3), slice(2, 5)):
            store.free([extent.location for extent in extents[freed]])
            places = [(extent.start, extent.key.tokens) for extent in extents[freed]]
            del extents[freed], blocks[freed]
            for start, tokens in places:
                new = self.block(store, tokens, seed=start + tokens)
                extents += write_blocks(store, [new], start=start)
                blocks.append(new)
                self.holds(store, extents, blocks)

    def test_all_tokens_are_decoded_though_fewer_are_visible(self, store: KVStore) -> None:
        """A crop inside an extent changes `visible` and no byte; core shows what is left."""
        block = self.block(store, 7)
        (extent,) = write_blocks(store, [block])
        for visible in range(extent.key.tokens + 1):
            assert_reads(store, attrs.evolve(extent, visible=visible), block, self.tolerance, f", {visible} visible")

    def test_space_comes_back(self, store: KVStore) -> None:
        """What was freed is used again: twenty times as much takes no more than twice the room."""

        def size() -> int:
            stats = store.stats()
            return stats.disk_bytes + stats.memory_bytes

        first, large = self.block(store, 4), self.block(store, 64)
        (kept,) = write_blocks(store, [first])
        assert size() > 0, "stats() must tell of bytes on disk or in memory"
        most = 0
        for _ in range(21):
            (extent,) = write_blocks(store, [large], start=kept.stop)
            most = most or size()
            store.free([extent.location])
        assert size() <= 2 * most
        self.holds(store, [kept], [first])

    def test_keys_and_values_that_do_not_belong_together_are_refused(self, store: KVStore) -> None:
        """`KVBlock.layout` checks it; all or nothing."""
        block = self.block(store, 4)
        keys, values, key = block.keys, block.values, BlockKey(0, 0, 0, block.keys.shape[2], 2)
        for wrong in ((keys, values[:, :, :1]), (keys, values.half()), (keys[0], values[0])):
            with pytest.raises(StoreContractError, match="do not belong together"):
                store.write(KVBlock(*wrong), key)
        self.holds(store, write_blocks(store, [block]), [block])

    def test_decode_writes_where_it_is_told_or_gives_a_view(self, store: KVStore) -> None:
        """With `out` the result is the same as without, whatever was in it; the block that holds it is returned."""
        block = self.block(store, 7, dtype=torch.bfloat16)
        (extent,) = write_blocks(store, [block])
        plain = read_extent(store, extent)
        out = KVBlock(torch.full_like(block.keys, float("nan")), torch.full_like(block.values, float("nan")))
        decoded = scaled(store.decode(extent, read_raw(store, extent), out))
        assert_equal(decoded, plain, 0.0, "decode() with and without `out`: {}")

    def test_reading_twice_gives_the_same(self, store: KVStore) -> None:
        """And does not change what is kept, whatever a reader does to its bytes."""
        block = self.block(store, 6)
        (extent,) = write_blocks(store, [block])
        if store.storage is None and not store.in_memory:
            read_raw(store, extent).zero_()
        self.holds(store, [extent], [block])
        self.holds(store, [extent], [block])

    def test_several_threads_read_at_once(self, store: KVStore) -> None:
        """As ollm's I/O workers do, while another layer grows."""
        blocks = self.blocks(store, 4, 4, heads=4, key_size=128, value_size=128)
        extents = write_blocks(store, blocks) * 40
        with ThreadPoolExecutor(8) as threads:
            reads = [threads.submit(read_raw, store, extent) for extent in extents]
            write_blocks(store, self.blocks(store, 4, 4), layer=1)
        for read, extent, block in zip(reads, extents, blocks * 40, strict=True):
            decoded = scaled(store.decode(extent, read.result(), None))
            assert_equal(decoded, block, self.tolerance, f"{{}} of {extent}")

    def test_several_threads_decode_at_once(self, store: KVStore) -> None:
        """As ollm's I/O workers do where the store `decodes_ahead`, each into a place of its own, while others are
        written and freed."""
        if not store.decodes_ahead:
            pytest.skip("this store is decoded by one thread, and says so")
        blocks = self.blocks(store, 4, 16, heads=4, key_size=64, value_size=64)
        extents = write_blocks(store, blocks)
        raws = [read_raw(store, extent).clone() for extent in extents]

        def decode(number: int) -> KVBlock:
            extent = extents[number % 4]
            out = KVBlock.empty(extent.layout, extent.key.rows, extent.key.tokens)
            return scaled(store.decode(extent, raws[number % 4], out))

        with ThreadPoolExecutor(8) as threads:
            decoded = [threads.submit(decode, number) for number in range(80)]
            for seed in range(5):
                more = write_blocks(store, self.blocks(store, 2, 4, seed=seed), layer=1)
                store.free([extent.location for extent in more])
        for number, found in enumerate(decoded):
            assert_equal(found.result(), blocks[number % 4], self.tolerance, f"{{}} of {extents[number % 4]}")

    def test_counters(self, store: KVStore) -> None:
        assert store.stats().representation
        write_blocks(store, self.blocks(store, 1, 5))
        stats = store.stats()
        for name in ("disk_bytes", "memory_bytes", "bytes_written", "bytes_read", "compactions"):
            value = getattr(stats, name)
            assert isinstance(value, int), f"stats().{name}"
            assert value >= 0, f"stats().{name}"

    def test_the_window_is_what_was_asked_for(self, store: KVStore) -> None:
        assert store.window == self.window_tokens
        assert store.sinks >= 0

    def test_close_twice(self, store: KVStore) -> None:
        """And look at the counters then, as `cache.state()` does."""
        write_blocks(store, self.blocks(store, 1, 4))
        written = store.stats().bytes_written
        store.close()
        store.close()
        assert store.stats().bytes_written >= written
