"""Stores in memory with one bug each, and the test of the kit that is named for it. `test_kit.py` runs them."""

from __future__ import annotations

import time

import attrs
import torch

from core.testing.planted.catching import Table
from core.testing.planted.sound import MemoryStore, RoundingStore
from ollm.plugin import KVBlock, Location, pack, unpack
from ollm.testing import KVStoreTests

CAUGHT = Table()
caught_by = CAUGHT.caught_by


class MemoryCase(KVStoreTests):
    store_type = MemoryStore

    def open(self, context):
        return self.store_type(context.window_tokens)


class KeyedStore(MemoryStore):
    """Finds bytes by something of their key; a subclass says by what."""

    def write(self, block, key):
        location = super().write(block, key)
        self.raw[self.by(key)] = self.raw[location]
        return location

    def read(self, extent):
        return self.raw[self.by(extent.key)]


class TestSoundMemory(MemoryCase):
    """Passes everything."""


class TestSoundWindow(MemoryCase):
    """Passes everything."""

    window_tokens = 16


class TestSoundRounding(MemoryCase):
    """Passes everything."""

    store_type = RoundingStore
    tolerance = 2**-8


@caught_by("test_round_trip", "dtype")
class TestWrongDtype(MemoryCase):
    class store_type(MemoryStore):
        def decode(self, extent, raw, out):
            block = super().decode(extent, raw, out)
            return KVBlock(block.keys.float(), block.values.float())


@caught_by("test_the_callers_tensors_are_copied", "bytes differ")
class TestAliasing(MemoryCase):
    class store_type(MemoryStore):
        def write(self, block, key):
            location = super().write(block, key)
            self.given = {**getattr(self, "given", {}), location: block}
            return location

        def decode(self, extent, raw, out):
            return self.given[extent.location]


@caught_by("test_round_trip", "keys of .* are what its values should be, and the values its keys: swapped")
class TestSwappedKeysAndValues(MemoryCase):
    class store_type(MemoryStore):
        def decode(self, extent, raw, out):
            block = super().decode(extent, raw, out)
            return KVBlock(block.values, block.keys)


@caught_by("test_dropped_bytes_stay_until_they_are_freed", "keys of .* are what its values should be, .*: swapped")
class TestSwappedWhereTheyAreAlike(MemoryCase):
    class store_type(MemoryStore):
        def decode(self, extent, raw, out):
            block = super().decode(extent, raw, out)
            alike = block.keys.shape == block.values.shape
            return KVBlock(block.values, block.keys) if alike else block


@caught_by("test_round_trip", "keys of .* are what its values should be, and the values its keys: swapped")
class TestSwappedAndLossy(MemoryCase):
    tolerance = 2**-8

    class store_type(RoundingStore):
        def decode(self, extent, raw, out):
            block = super().decode(extent, raw, out)
            return KVBlock(block.values, block.keys, block.value_scale, block.key_scale)


@caught_by("test_what_is_kept_stays_while_others_come_and_go", "KeyError")
class TestFreesItsNeighbour(MemoryCase):
    class store_type(MemoryStore):
        def free(self, locations):
            last = max(location.offset for location in locations)
            self.raw = {
                location: raw
                for location, raw in self.raw.items()
                if location not in locations and location.offset != last + 1
            }


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


@caught_by("test_layers_and_branches_are_apart_and_may_differ", "bytes differ|raw bytes of")
class TestLayersMixedUp(MemoryCase):
    class store_type(KeyedStore):
        def by(self, key):
            return key.layer % 7, key.branch, key.start, key.tokens


@caught_by("test_layers_and_branches_are_apart_and_may_differ", "bytes differ|raw bytes of")
class TestBranchesMixedUp(MemoryCase):
    class store_type(KeyedStore):
        def by(self, key):
            return key.layer, key.start, key.tokens, key.rows


@caught_by("test_dropped_bytes_stay_until_they_are_freed", "bytes differ")
class TestFoundByTheirKey(MemoryCase):
    class store_type(KeyedStore):
        def by(self, key):
            return key


@caught_by("test_positions_are_written_again_after_others_were_dropped", "two blocks are said to be in one place")
class TestLiesAboutTheLocation(MemoryCase):
    class store_type(MemoryStore):
        def write(self, block, key):
            raw = pack(block)
            self.raw[key] = raw
            return Location(raw.numel())

        def read(self, extent):
            return self.raw[extent.key]

        def free(self, locations):
            pass


@caught_by("test_round_trip", "raw bytes of")
class TestLiesAboutTheLength(MemoryCase):
    class store_type(MemoryStore):
        def write(self, block, key):
            location = super().write(block, key)
            short = attrs.evolve(location, nbytes=location.nbytes - 8)
            self.raw[short] = self.raw[location]
            return short


@caught_by("test_a_layer_that_was_emptied_takes_other_shapes", "invalid|shape|dtype|size")
class TestFirstShapesForEver(MemoryCase):
    class store_type(MemoryStore):
        def decode(self, extent, raw, out):
            return super().decode(attrs.evolve(extent, layout=self.layouts[extent.key.layer]), raw, out)

        def write(self, block, key):
            self.layouts = {key.layer: block.layout, **getattr(self, "layouts", {})}
            return super().write(block, key)


@caught_by("test_every_bit_pattern", "neither refused nor kept|bytes differ|off by")
class TestNaNsBecomeNumbers(MemoryCase):
    tolerance = 2**-8

    class store_type(RoundingStore):
        def write(self, block, key):
            return super().write(KVBlock(block.keys.nan_to_num(0, 0, 0), block.values.nan_to_num(0, 0, 0)), key)


@caught_by("test_round_trip", "bytes differ")
class TestLossyAndSaidToBeLossless(MemoryCase):
    store_type = RoundingStore


@caught_by("test_decode_writes_where_it_is_told_or_gives_a_view", "with and without")
class TestAddsToWhatIsInOut(MemoryCase):
    class store_type(MemoryStore):
        def decode(self, extent, raw, out):
            block = unpack(extent, raw)
            return block if out is None else KVBlock(out.keys.add_(block.keys), out.values.add_(block.values))


@caught_by("test_reading_twice_gives_the_same", "bytes differ")
class TestHandsOutItsOwnMemory(MemoryCase):
    class store_type(MemoryStore):
        in_memory = False


@caught_by("test_all_tokens_are_decoded_though_fewer_are_visible", "keys of .*, 0 visible: shape")
class TestDecodesOnlyWhatIsVisible(MemoryCase):
    class store_type(MemoryStore):
        def decode(self, extent, raw, out):
            block = super().decode(extent, raw, out)
            return KVBlock(block.keys[:, :, : extent.visible], block.values[:, :, : extent.visible])


@caught_by("test_random_operations", "shape|bytes differ")
class TestCutExtentsAreWholeOnes(MemoryCase):
    class store_type(MemoryStore):
        def decode(self, extent, raw, out):
            cut = attrs.evolve(extent, key=attrs.evolve(extent.key, tokens=extent.visible))
            return super().decode(cut, raw[: extent.layout.nbytes(extent.key.rows, extent.visible)], out)


@caught_by("test_keys_and_values_that_do_not_belong_together_are_refused", "DID NOT RAISE|Error")
class TestTakesWhatDoesNotBelongTogether(MemoryCase):
    class store_type(MemoryStore):
        def write(self, block, key):
            block = attrs.evolve(block, values=block.values.to(block.keys.dtype))
            return super().write(block, key)


@caught_by("test_several_threads_decode_at_once", "bytes differ")
class TestOnePlaceForAllDecoders(MemoryCase):
    class store_type(MemoryStore):
        decodes_ahead = True
        place = torch.empty(2**16, dtype=torch.uint8)

        def decode(self, extent, raw, out):
            place = self.place[: raw.numel()]
            place.copy_(raw)
            time.sleep(0.001)  # gives others their turn, so that the planted fault shows; no test waits for it
            block = unpack(extent, place)
            return KVBlock(out.keys.copy_(block.keys), out.values.copy_(block.values)) if out else unpack(extent, raw)


@caught_by("test_forks|test_beams|test_greedy_generation", ".")
class TestRowsLost(MemoryCase):
    class store_type(MemoryStore):
        def write(self, block, key):
            return super().write(
                KVBlock(block.keys[:1].expand_as(block.keys), block.values[:1].expand_as(block.values)), key
            )
