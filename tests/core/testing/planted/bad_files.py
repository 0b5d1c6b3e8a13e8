"""Stores with files, their own or a storage's, with one bug each, and the test of the kit that is named for it."""

from __future__ import annotations

import os
import shutil
import time

from core.testing.planted.catching import Table
from core.testing.planted.sound import HEADER, FileStore
from ollm.io import shim
from ollm.plugin import CorruptDataError, KVBlock, SegmentedStore, StorageOptions
from ollm.testing import KVStoreTests

CAUGHT = Table()
caught_by = CAUGHT.caught_by


class FileCase(KVStoreTests):
    store_type = FileStore

    def open(self, context):
        return self.store_type(context.folder())


class StorageCase(KVStoreTests):
    store_type = SegmentedStore

    def open(self, context):
        return self.store_type(context.storage())


class TestSoundFile(FileCase):
    """Passes everything."""


@caught_by("test_a_damaged_byte_gives_right_data_or_a_typed_error", "other keys of .* and no error")
class TestNoChecksum(FileCase):
    class store_type(FileStore):
        def check(self, extent, header, payload):
            if header[:8] != self.header(extent, payload)[:8]:
                super().check(extent, header, payload)


@caught_by("test_blocks_in_the_wrong_place_give_right_data_or_a_typed_error", "other keys of .* and no error")
class TestHeaderNotComparedWithWhatWasAsked(FileCase):
    class store_type(FileStore):
        def check(self, extent, header, payload):
            super().check(extent, self.header(extent, payload)[:8] + header[8:], payload)


@caught_by("test_what_is_written_is_on_the_disk", "the files grew by")
class TestFlushThatDoesNothing(FileCase):
    class store_type(FileStore):
        def keep(self, extent, payload):
            self.pending = {**getattr(self, "pending", {}), extent: payload}
            if len(self.pending) == 1:
                super().keep(extent, payload)

        def pread(self, fd, size, offset):
            (found,) = [one for one in self.pending.items() if one[0].location.offset == offset]
            return self.header(*found) + found[1]


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


@caught_by("test_dropped_bytes_stay_until_they_are_freed", "a reader of the old one|bytes differ|was damaged")
class TestStaleSlotUnderAPinnedSnapshot(FileCase):
    class store_type(FileStore):
        def place(self, key, size):
            self.keys = getattr(self, "keys", {})
            return self.keys.setdefault(key, super().place(key, size))


@caught_by("test_what_is_kept_stays_while_others_come_and_go", "was damaged|bytes differ|KeyError")
class TestGapTakenToBeLargerThanItIs(FileCase):
    class store_type(FileStore):
        def place(self, key, size):
            return super().place(key, size - 4096)


@caught_by("test_no_file_holds_a_path", "store-all.bin")
class TestPathFromAFile(FileCase):
    class store_type(FileStore):
        def __init__(self, folder):
            super().__init__(folder)
            index = folder.open_file("store-index.txt")
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


@caught_by("test_files_that_may_not_grow_are_survived", "was damaged|cut off|left its trace")
class TestNotAllOrNothing(FileCase):
    class store_type(FileStore):
        def keep(self, extent, payload):
            try:
                super().keep(extent, payload)
            except Exception:
                os.ftruncate(self.file(), 0)
                raise


@caught_by("test_a_file_that_is_cut_gives_right_data_or_a_typed_error", "raise StorageError, CorruptDataError")
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
        def free(self, locations):
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
            time.sleep(0)  # gives others their turn, so that the planted fault shows; no test waits for it
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


@caught_by("test_what_was_not_adopted_is_free", "stores that left nothing of their own")
class TestAdoptForgetsWhatIsFree(FileCase):
    class store_type(FileStore):
        def adopt(self, extents):
            super().adopt(extents)
            size = os.fstat(self.file()).st_size
            self.used[size] = 0  # so that all goes behind it

        def place(self, key, size):
            return max(start + taken for start, taken in self.used.items()) if self.used else 0


@caught_by("test_nothing_that_lives_is_written_over", "was damaged")
class TestAdoptDoesNothing(FileCase):
    class store_type(FileStore):
        def adopt(self, extents):
            pass


@caught_by("test_nothing_that_lives_is_written_over", "was damaged")
class TestNumbersFromZeroAgain(FileCase):
    class store_type(FileStore):
        number = -1

        def place(self, key, size):
            self.number += 1
            return self.number * 2**20


@caught_by("test_nothing_that_lives_is_written_over", "was damaged")
class TestAdoptsOneBranchOnly(FileCase):
    class store_type(FileStore):
        def adopt(self, extents):
            super().adopt({(extent.key.layer, extent.key.start): extent for extent in extents}.values())


@caught_by("test_what_was_kept_is_found_again|test_another_process_goes_on", "cut off|was damaged")
class TestBeginsAnewInAKeptFolder(FileCase):
    class store_type(FileStore):
        def file(self):
            if "all" not in self.files:
                os.ftruncate(super().file(), 0)
            return self.files["all"]


@caught_by("test_a_table_that_names_what_was_not_written_is_refused", "another branch than was written, and no error")
class TestBranchIsNotChecked(FileCase):
    class store_type(FileStore):
        def identity(self, extent):
            key = extent.key
            return repr((key.layer, key.start, key.tokens, key.rows, extent.layout)).encode()


@caught_by("test_a_table_that_names_what_was_not_written_is_refused", "other shapes than was written, and no error")
class TestShapesAreNotChecked(FileCase):
    class store_type(FileStore):
        def identity(self, extent):
            return repr(extent.key).encode()


@caught_by("test_files_that_changed_meanwhile_give_right_data_or_a_typed_error", "other keys of .* and no error")
class TestAdoptedBytesAreTrusted(FileCase):
    class store_type(FileStore):
        adopted = ()

        def adopt(self, extents):
            super().adopt(extents)
            self.adopted = {*extents}

        def check(self, extent, header, payload):
            if extent not in self.adopted:
                super().check(extent, header, payload)


@caught_by("test_files_that_changed_meanwhile_give_right_data_or_a_typed_error", "raise StorageError, Corr")
class TestUntypedErrorOfAdopt(FileCase):
    class store_type(FileStore):
        def adopt(self, extents):
            super().adopt(extents)
            for extent in extents:
                HEADER.unpack(os.pread(self.file(), HEADER.size, extent.location.offset))


@caught_by("test_nothing_that_lives_is_written_over", "was damaged")
class TestAdoptsNothingThatWasCut(FileCase):
    class store_type(FileStore):
        def adopt(self, extents):
            super().adopt([extent for extent in extents if extent.visible == extent.key.tokens])


@caught_by("test_parts_of_a_block_are_those_of_the_whole", "keys of heads .* bytes differ")
class TestWritesSomethingElseThanTheBlock(StorageCase):
    class store_type(SegmentedStore):
        def write(self, block, key):
            return super().write(KVBlock(-block.keys, -block.values), key)

        def decode(self, extent, raw, out):
            block = super().decode(extent, raw, out)
            return KVBlock(-block.keys, -block.values)


@caught_by("test_a_flipped_bit_is_noticed_in_the_piece_that_has_it", "DID NOT RAISE")
class TestNeverVerifies(StorageCase):
    options = StorageOptions(verify="never", min_free_bytes=0)


@caught_by("test_a_text_that_was_dropped_whole_is_followed_by_another", "Bad file descriptor")
class TestTidiesUpForGood(FileCase):
    class store_type(FileStore):
        def free(self, locations):
            super().free(locations)
            if not self.used:
                os.close(self.file())


@caught_by("test_any_fault_of_the_disk_is_survived[short]", "the threads of a disk go on")
class TestDoesNotClose(StorageCase):
    class store_type(SegmentedStore):
        def close(self):
            pass


@caught_by("test_any_fault_loses_nothing_that_was_committed", "cannot be opened")
class TestCommitRemovesTheOldOneFirst(StorageCase):
    class store_type(SegmentedStore):
        def __init__(self, storage):
            super().__init__(storage)
            commit = storage.commit

            def removing(extents, **more):
                shim.disk.unlink(storage.path / "manifest.json")
                commit(extents, **more)

            storage.commit = removing


@caught_by("test_kill_9_behind_a_commit_loses_nothing_of_it", "assert")
class TestCommitsWhenItIsClosed(StorageCase):
    class store_type(SegmentedStore):
        later = None

        def __init__(self, storage):
            super().__init__(storage)
            commit = storage.commit
            storage.commit = lambda extents, **more: setattr(self, "later", lambda: commit(extents, **more))

        def close(self):
            if self.later is not None:
                self.later()
            super().close()
