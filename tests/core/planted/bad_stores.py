"""Stores in memory with one bug each, and the test of the kit that is named for it. `test_kit.py` runs them."""

from __future__ import annotations

import attrs

from core.planted.catching import Table
from core.planted.sound import MemoryStore, RoundingStore
from ollm.plugin import KVBlock, unpack
from ollm.testing import KVStoreTests

CAUGHT = Table()
caught_by = CAUGHT.caught_by


class MemoryCase(KVStoreTests):
    store_type = MemoryStore

    def open(self, context):
        return self.store_type(context.window_tokens)


class TestSoundMemory(MemoryCase):
    """Passes everything."""


class TestSoundWindow(MemoryCase):
    """Passes everything."""

    window_tokens = 16


class TestSoundRounding(MemoryCase):
    """Passes everything."""

    store_type = RoundingStore
    tolerance = 2**-8


@caught_by("test_truncate_at_every_border", "tokens of the extents")
class TestTruncateOffByOne(MemoryCase):
    class store_type(MemoryStore):
        def truncate(self, layer, length):
            self.listed[layer] = tuple(extent for extent in self.extents(layer) if extent.start <= length)


@caught_by("test_round_trip", "dtype")
class TestWrongDtype(MemoryCase):
    class store_type(MemoryStore):
        def decode(self, extent, raw, out):
            block = super().decode(extent, raw, out)
            return KVBlock(block.keys.float(), block.values.float())


@caught_by("test_the_callers_tensors_are_copied", "bytes differ")
class TestAliasing(MemoryCase):
    class store_type(MemoryStore):
        def append(self, layer, keys, values):
            super().append(layer, keys, values)
            self.given = {**getattr(self, "given", {}), self.listed[layer][-1]: (keys, values)}

        def decode(self, extent, raw, out):
            return KVBlock(*self.given[extent])


@caught_by("test_round_trip", "keys of .*(bytes differ|shape)")
class TestSwappedKeysAndValues(MemoryCase):
    class store_type(MemoryStore):
        def decode(self, extent, raw, out):
            block = super().decode(extent, raw, out)
            return KVBlock(block.values, block.keys)


@caught_by("test_random_operations", "starts and tokens of the extents")
class TestRingOffByOne(MemoryCase):
    window_tokens = 16

    class store_type(MemoryStore):
        def evict(self, layer, extents):
            super().evict(layer, extents)
            self.listed[layer] = self.listed[layer][1:] if len(self.listed[layer]) > 1 else self.listed[layer]


@caught_by("test_the_window_is_what_was_asked_for", "assert 17 == 16")
class TestWindowOffByOne(MemoryCase):
    window_tokens = 16

    def open(self, context):
        return MemoryStore(context.window_tokens + 1)


@caught_by("test_round_trip", "the tolerance is")
class TestWrongScale(MemoryCase):
    tolerance = 2**-8

    class store_type(RoundingStore):
        def decode(self, extent, raw, out):
            block = super().decode(extent, raw, out)
            return attrs.evolve(block, value_scale=block.key_scale)


@caught_by("test_extents_are_snapshots", "assert")
class TestListHandedOut(MemoryCase):
    class store_type(MemoryStore):
        def append(self, layer, keys, values):
            kept = self.listed.get(layer)
            super().append(layer, keys, values)
            if kept is not None:
                kept.append(self.listed[layer][-1])
            self.listed[layer] = kept if kept is not None else list(self.listed[layer])


@caught_by("test_layers_are_apart_and_may_differ", "layer 0|layer 99|extents of a layer")
class TestLayersMixedUp(MemoryCase):
    class store_type(MemoryStore):
        def extents(self, layer):
            return self.listed.get(layer % 11, ())

        def append(self, layer, keys, values):
            super().append(layer, keys, values)
            self.listed[layer % 11] = self.listed[layer]


@caught_by("test_a_layer_that_was_emptied_takes_other_shapes", "invalid|shape|dtype|size")
class TestFirstShapesForEver(MemoryCase):
    class store_type(MemoryStore):
        def append(self, layer, keys, values):
            layout = self.layouts.get(layer)
            super().append(layer, keys, values)
            self.layouts[layer] = layout or self.layouts[layer]


@caught_by("test_every_bit_pattern", "neither refused nor kept|bytes differ|off by")
class TestNaNsBecomeNumbers(MemoryCase):
    tolerance = 2**-8

    class store_type(RoundingStore):
        def append(self, layer, keys, values):
            super().append(layer, keys.nan_to_num(0, 0, 0), values.nan_to_num(0, 0, 0))


@caught_by("test_round_trip", "bytes differ")
class TestLossyAndSaidToBeLossless(MemoryCase):
    store_type = RoundingStore


@caught_by("test_decode_writes_where_it_is_told_or_gives_a_view", "with and without")
class TestAddsToWhatIsInOut(MemoryCase):
    class store_type(MemoryStore):
        def decode(self, extent, raw, out):
            block = unpack(self.layouts[extent.layer], extent, raw)
            return block if out is None else KVBlock(out.keys.add_(block.keys), out.values.add_(block.values))


@caught_by("test_reading_twice_gives_the_same", "bytes differ")
class TestHandsOutItsOwnMemory(MemoryCase):
    class store_type(MemoryStore):
        in_memory = False


@caught_by("test_random_operations", "starts and tokens of the extents|tokens of the extents")
class TestTrimsAndDropsTheRest(MemoryCase):
    class store_type(MemoryStore):
        trims = True


@caught_by("test_forks|test_beams|test_greedy_generation", ".")
class TestRowsLost(MemoryCase):
    class store_type(MemoryStore):
        def append(self, layer, keys, values):
            super().append(layer, keys[:1].expand_as(keys), values[:1].expand_as(values))
