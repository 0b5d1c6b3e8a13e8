"""Stores with files of their own, with one bug each, and the test of the kit that is named for it."""

from __future__ import annotations

import os
import shutil
import time

import attrs

from core.planted.catching import Table
from core.planted.sound import HEADER, FileStore
from ollm.plugin import CorruptDataError, Extent
from ollm.testing import KVStoreTests

CAUGHT = Table()
caught_by = CAUGHT.caught_by


class FileCase(KVStoreTests):
    store_type = FileStore

    def open(self, context):
        return self.store_type(context.folder())


class TestSoundFile(FileCase):
    """Passes everything."""


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


@caught_by("test_several_threads_read_at_once", "bytes differ|was damaged|cut off")
class TestOnePositionForAllReaders(FileCase):
    class store_type(FileStore):
        def pread(self, fd, size, offset):
            os.lseek(fd, offset, os.SEEK_SET)
            time.sleep(0)  # others' turn
            content = os.read(fd, size)
            if len(content) < size:
                raise CorruptDataError("cut off")
            return content


@caught_by("test_a_store_that_cannot_be_made_leaves_nothing", "raise StorageError")
class TestUntypedErrorWhileItIsMade(FileCase):
    class store_type(FileStore):
        def __init__(self, folder):
            super().__init__(folder)
            self.file()
