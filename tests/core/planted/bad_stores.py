"""Stores with one bug each, and the test of the kit that is named for it. `test_kit.py` runs them."""

from __future__ import annotations

import os
import shutil

import attrs

from core.planted.sound import HEADER, FileStore, MemoryStore, RoundingStore
from ollm.plugin import Extent, KVBlock, unpack
from ollm.testing import KVStoreTests

CAUGHT = {}
"""Class, test, and what the failure says."""


def caught_by(test, says):
    """Marks a test class as broken."""

    def mark(case):
        CAUGHT[case.__name__] = (test, says)
        return case

    return mark


class FileCase(KVStoreTests):
    store_type = FileStore

    def open(self, context):
        return self.store_type(context.folder())


class MemoryCase(KVStoreTests):
    store_type = MemoryStore

    def open(self, context):
        return self.store_type(context.window_tokens)


class TestSoundFile(FileCase):
    """Passes everything."""


class TestSoundMemory(MemoryCase):
    """Passes everything."""


class TestSoundWindow(MemoryCase):
    """Passes everything."""

    window_tokens = 16


class TestSoundRounding(MemoryCase):
    """Passes everything."""

    store_type = RoundingStore
    tolerance = 2**-8


@caught_by("test_a_damaged_byte_gives_right_data_or_a_typed_error", "other keys of .* and no error")
class TestNoChecksum(FileCase):
    class store_type(FileStore):
        def check(self, extent, header, payload):
            if header[:-8] != self.header(extent, payload)[:-8]:
                super().check(extent, header, payload)


@caught_by("test_blocks_in_the_wrong_place_give_right_data_or_a_typed_error", "other keys of .* and no error")
class TestHeaderNotComparedWithWhatWasAsked(FileCase):
    class store_type(FileStore):
        def check(self, extent, header, payload):
            layer, start, tokens, rows, nbytes, _ = HEADER.unpack(header)
            super().check(Extent(layer, start, tokens, rows, nbytes), header, payload)


@caught_by("test_truncate_at_every_border", "tokens of the extents")
class TestTruncateOffByOne(MemoryCase):
    class store_type(MemoryStore):
        def truncate(self, layer, length):
            self.listed[layer] = tuple(extent for extent in self.extents(layer) if extent.start <= length)


@caught_by("test_what_is_appended_is_on_the_disk", "the files grew by")
class TestFlushThatDoesNothing(FileCase):
    class store_type(FileStore):
        def keep(self, extent, raw):
            self.pending = {**getattr(self, "pending", {}), extent: raw.clone()}
            if len(self.pending) == 1:
                super().keep(extent, raw)
            self.end += self.size(extent.nbytes)

        def read(self, extent):
            return self.pending[extent]


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


@caught_by("test_a_file_that_is_cut_gives_right_data_or_a_typed_error", "other keys of .* and no error")
class TestIgnoredShortRead(FileCase):
    class store_type(FileStore):
        def pread(self, fd, size, offset):
            content = os.pread(fd, size, offset)
            self.short = len(content) < size
            return content + bytes(size - len(content))

        def check(self, extent, header, payload):
            if not self.short:
                super().check(extent, header, payload)


@caught_by("test_dropped_bytes_stay_until_they_are_released", "a reader of the old one|bytes differ|was damaged")
class TestStaleSlotUnderAPinnedSnapshot(FileCase):
    class store_type(FileStore):
        def truncate(self, layer, length):
            dropped = [extent for extent in self.extents(layer) if extent.stop > length]
            super().truncate(layer, length)
            super().release(dropped)

        def release(self, extents):
            pass


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


@caught_by("test_no_file_holds_a_path", "store-all.bin")
class TestPathFromAFile(FileCase):
    class store_type(FileStore):
        def __init__(self, folder):
            super().__init__(folder)
            index = folder.new_file("store-index.txt")
            os.write(index, b"store-all.bin")
            os.close(index)

        def file(self):
            if "all" not in self.files:
                super().file()
                name = (self.folder.path / "store-index.txt").read_text()
                self.files["all"] = os.open(self.folder.path / name, os.O_RDWR)
            return self.files["all"]


@caught_by("test_files_are_private", "store-all.bin")
class TestWorldReadableFiles(FileCase):
    class store_type(FileStore):
        def file(self):
            if "all" not in self.files:
                self.files["all"] = os.open(self.folder.path / "store-all.bin", os.O_RDWR | os.O_CREAT, 0o666)
            return self.files["all"]


@caught_by("test_two_sessions_do_not_disturb_each_other", ".")
class TestAnotherSessionsFolderRemoved(FileCase):
    class store_type(FileStore):
        def __init__(self, folder):
            super().__init__(folder)
            for other in folder.path.parent.glob("run-*"):
                if other != folder.path:
                    shutil.rmtree(other)

        def file(self):
            if "all" in self.files:
                os.close(self.files.pop("all"))
            path = self.folder.path / "store-all.bin"
            self.files["all"] = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            return self.files["all"]


@caught_by("test_files_that_may_not_grow_are_survived", "was damaged|left its trace")
class TestNotAllOrNothing(FileCase):
    class store_type(FileStore):
        def append(self, layer, keys, values):
            before = self.extents(layer)
            try:
                super().append(layer, keys, values)
            except Exception:
                if before:
                    self.listed[layer] = (*before, attrs.evolve(before[-1], start=before[-1].stop))
                raise


@caught_by("test_a_file_that_is_cut_gives_right_data_or_a_typed_error", "raise CorruptDataError or StorageError")
class TestUntypedError(FileCase):
    class store_type(FileStore):
        def pread(self, fd, size, offset):
            content = os.pread(fd, size, offset)
            assert len(content) == size
            return content


@caught_by("test_close_twice", "left behind after close")
class TestLeavesItsFolder(FileCase):
    class store_type(FileStore):
        def close(self):
            (self.folder.path / "notes.txt").touch()
            super().close()


@caught_by("test_space_comes_back", "assert [0-9]+ <=")
class TestSpaceNeverComesBack(FileCase):
    class store_type(FileStore):
        def release(self, extents):
            pass


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


@caught_by("test_kill_9_leaves_nothing_that_stays", "killed at step")
class TestFilesOutsideItsFolder(FileCase):
    class store_type(FileStore):
        def file(self):
            if "all" not in self.files:
                super().file()
                self.beside = self.folder.path.parent / f"store-{self.folder.path.name}.txt"
                self.beside.touch(0o600)
            return self.files["all"]

        def close(self):
            if "all" in self.files:
                self.beside.unlink(missing_ok=True)
            super().close()


@caught_by("test_random_operations", "starts and tokens of the extents|tokens of the extents")
class TestTrimsAndDropsTheRest(MemoryCase):
    class store_type(MemoryStore):
        trims = True


@caught_by("test_forks|test_beams|test_greedy_generation", ".")
class TestRowsLost(MemoryCase):
    class store_type(MemoryStore):
        def append(self, layer, keys, values):
            super().append(layer, keys[:1].expand_as(keys), values[:1].expand_as(values))
