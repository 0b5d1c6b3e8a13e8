"""Several sessions in one `cache_dir`, and sessions that end without closing: none disturbs another, nothing stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from ollm.contracts.kv import KVStore
from ollm.io import shim
from ollm.testing.blocks import assert_holds
from ollm.testing.case import StoreCase, assert_nothing_left, settle
from ollm.testing.faults import FaultyDisk
from ollm.testing.processes import in_child

_KILLS = 12
"""How many places of a life are met by kill -9."""


class SessionsTests(StoreCase):
    """Stores that never touch a disk pass these easily."""

    def test_two_sessions_do_not_disturb_each_other(self, tmp_path: Path) -> None:
        first, second = self.new(tmp_path), self.new(tmp_path)
        ours = [self.block(first, 5, seed=seed) for seed in (1, 2)]
        theirs = [self.block(first, 5, seed=seed) for seed in (3, 4)]
        for mine, other in zip(ours, theirs, strict=True):
            first.append(0, *mine)
            second.append(0, *other)
        settle(first)
        settle(second)
        self.holds(first, 0, ours)
        self.holds(second, 0, theirs)
        second.close()
        self.holds(first, 0, ours)
        third = self.new(tmp_path)  # which tidies up after the dead, and must not after the living
        self.holds(first, 0, ours)
        first.append(0, *theirs[0])
        self.holds(first, 0, [*ours, theirs[0]])
        third.close()
        first.close()
        assert_nothing_left(tmp_path, "after every session was closed")

    def test_a_session_of_another_process_is_left_alone(self, tmp_path: Path) -> None:
        ours = self.new(tmp_path)
        block = self.block(ours, 5)
        ours.append(0, *block)
        settle(ours)

        def other_session() -> None:
            store = self.new(tmp_path)
            store.append(0, *self.block(store, 5, seed=9))
            assert_holds(store, 0, [self.block(store, 5, seed=9)], self.tolerance)
            store.close()

        in_child(other_session)
        self.holds(ours, 0, [block])
        ours.close()
        assert_nothing_left(tmp_path, "after every session was closed")

    def test_kill_9_leaves_nothing_that_stays(self, tmp_path: Path) -> None:
        """Killed at any step: the next session tidies up, works, and leaves nothing."""
        steps = FaultyDisk()
        _with_disk(steps, lambda: self._live(tmp_path))
        total = len(steps.operations)
        for at in sorted({*range(0, total, max(total // _KILLS, 1)), total}):

            def killed(at: int = at) -> None:
                _with_disk(FaultyDisk(_kill, at), lambda: self._live(tmp_path, close=False))
                os.kill(os.getpid(), signal.SIGKILL)

            in_child(killed, killed=True)
            self._live(tmp_path)
            assert_nothing_left(tmp_path, f"by what was killed at step {at} of {total}, after another session")

    def test_a_store_that_is_dropped_leaves_nothing_for_the_next(self, tmp_path: Path) -> None:
        """Whoever forgets to close it, and goes on or ends, has nothing to tidy up."""

        def forgetful() -> None:
            store = self.new(tmp_path)
            store.append(0, *self.block(store, 5))

        in_child(forgetful)  # ends without any handler
        self._live(tmp_path)
        assert_nothing_left(tmp_path, "after every session was closed")

    def test_close_after_the_folder_was_removed(self, tmp_path: Path) -> None:
        """Somebody tidied up by hand."""
        store = self.new(tmp_path)
        store.append(0, *self.block(store, 5))
        settle(store)
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
        """A short life: append, read, truncate, append."""
        store: KVStore = self.new(folder)
        blocks = [self.block(store, 5, seed=seed) for seed in (1, 2, 3)]
        for block in blocks[:2]:
            store.append(0, *block)
        settle(store)
        self.holds(store, 0, blocks[:2])
        dropped = store.extents(0)[1:]
        store.truncate(0, blocks[0][0].shape[2])
        store.release(dropped)
        store.append(0, *blocks[2])
        settle(store)
        self.holds(store, 0, [blocks[0], blocks[2]])
        if close:
            store.close()


def _with_disk(disk: FaultyDisk, action: object) -> None:
    before = shim.disk
    shim.disk = disk
    try:
        action()  # type: ignore[operator]
    finally:
        shim.disk = before


def _kill(name: str, arguments: tuple[object, ...]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
