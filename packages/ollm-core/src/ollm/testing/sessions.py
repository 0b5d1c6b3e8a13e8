"""Several sessions in one `cache_dir`, and sessions that end without closing: none disturbs another, nothing stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from ollm.contracts.kv import KVStore
from ollm.testing.blocks import write_blocks
from ollm.testing.case import StoreCase, assert_nothing_left, flush_writes, some
from ollm.testing.faults import FaultyDisk
from ollm.testing.processes import in_child

_KILLS = 8
"""About how many places of a life are met by kill -9; see `depth`."""


class SessionsTests(StoreCase):
    """Stores that never touch a disk pass these easily."""

    def test_two_sessions_do_not_disturb_each_other(self, tmp_path: Path) -> None:
        first, second = self.new(tmp_path), self.new(tmp_path)
        ours, theirs = self.blocks(first, 2, 5, seed=1), self.blocks(first, 2, 5, seed=2)
        mine, others = write_blocks(first, ours[:1]), write_blocks(second, theirs[:1])
        mine += write_blocks(first, ours[1:], start=mine[0].stop)
        others += write_blocks(second, theirs[1:], start=mine[0].stop)
        flush_writes(first)
        flush_writes(second)
        self.holds(first, mine, ours)
        self.holds(second, others, theirs)
        second.close()
        self.holds(first, mine, ours)
        third = self.new(tmp_path)  # which tidies up after the dead, and must not after the living
        self.holds(first, mine, ours)
        mine += write_blocks(first, theirs[:1], start=mine[1].stop)
        self.holds(first, mine, [*ours, theirs[0]])
        third.close()
        first.close()
        assert_nothing_left(tmp_path, "after every session was closed")

    def test_a_session_of_another_process_is_left_alone(self, tmp_path: Path) -> None:
        ours = self.new(tmp_path)
        blocks = self.blocks(ours, 1, 5)
        extents = write_blocks(ours, blocks)
        flush_writes(ours)

        def other_session() -> None:
            store = self.new(tmp_path)
            theirs = self.blocks(store, 1, 5, seed=9)
            self.holds(store, write_blocks(store, theirs), theirs)
            store.close()

        in_child(other_session)
        self.holds(ours, extents, blocks)
        ours.close()
        assert_nothing_left(tmp_path, "after every session was closed")

    def test_kill_9_leaves_nothing_that_stays(self, tmp_path: Path) -> None:
        """Killed at any step: the next session tidies up, works, and leaves nothing."""
        steps = FaultyDisk()
        with steps.installed():
            self._live(tmp_path)
        total = len(steps.operations)
        for at in sorted({*some(range(total), _KILLS), total}):

            def killed(at: int = at) -> None:
                with FaultyDisk(_kill, at).installed():
                    self._live(tmp_path, close=False)
                os.kill(os.getpid(), signal.SIGKILL)

            in_child(killed, killed=True)
            self._live(tmp_path)
            assert_nothing_left(tmp_path, f"by what was killed at step {at} of {total}, after another session")

    def test_a_store_that_is_dropped_leaves_nothing_for_the_next(self, tmp_path: Path) -> None:
        """Whoever forgets to close it, and goes on or ends, has nothing to tidy up."""

        def forgetful() -> None:
            store = self.new(tmp_path)
            write_blocks(store, self.blocks(store, 1, 5))

        in_child(forgetful)  # ends without any handler
        self._live(tmp_path)
        assert_nothing_left(tmp_path, "after every session was closed")

    def test_close_after_the_folder_was_removed(self, tmp_path: Path) -> None:
        """Somebody tidied up by hand."""
        store = self.new(tmp_path)
        write_blocks(store, self.blocks(store, 1, 5))
        flush_writes(store)
        runs = [path for path in tmp_path.glob("*/*") if path.is_dir()]
        if not runs:
            store.close()
            pytest.skip("this store has no files")
        for path in runs:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        store.close()

    def _live(self, folder: Path, *, close: bool = True) -> None:
        """A short life: write, read, free, write in its place."""
        store: KVStore = self.new(folder)
        blocks = self.blocks(store, 3, 5)
        extents = write_blocks(store, blocks[:2])
        flush_writes(store)
        self.holds(store, extents, blocks[:2])
        store.free([extents[1].location])
        extents[1:] = write_blocks(store, blocks[2:], start=extents[0].stop)
        flush_writes(store)
        self.holds(store, extents, [blocks[0], blocks[2]])
        if close:
            store.close()


def _kill(name: str, arguments: tuple[object, ...]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
