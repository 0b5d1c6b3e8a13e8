"""A store that goes on with what an earlier one left: after it was closed, in another process, after kill -9, and where
something else was written than what the table says.

Skipped for stores that keep nothing beyond their process: those that do not override `adopt`, or are `in_memory`.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import pytest

from ollm.contracts.blocks import Extent, KVBlock
from ollm.contracts.kv import KVStore
from ollm.errors import OllmError
from ollm.storage.kept import extents_of
from ollm.storage.segments import SegmentedStorage
from ollm.testing.blocks import load_table, read_extent, save_table, write_blocks
from ollm.testing.case import StoreCase, bytes_of, commit, files_of, flip, flush_writes, some, typed
from ollm.testing.processes import in_child

_TOKENS = 16
_PLACES = 6
"""About how many places of each file are changed while no store has it open; see `some`."""
_SIZES: dict[str, Any] = {"heads": 4, "key_size": 32, "value_size": 32}

Kept = dict[Extent, KVBlock]
"""A table, and what must be found by it."""


class ReopeningTests(StoreCase):
    """The table is what the kit kept, or what the storage committed."""

    def test_what_was_kept_is_found_again(self, kept: Path) -> None:
        """Layers and branches, some of it freed, one extent cut. Then the store goes on growing, and the next one goes
        on from there."""
        table = self._session(kept)
        for seed in (1, 2, 3):
            store = self._reopened(kept, table)
            self._holds(store, table)
            table |= self._write(store, 3, seed=seed, layer=seed, branch=seed % 2, start=100)
            self._holds(store, table)
            for extent in [*table][::4]:
                store.free([extent.location])
                del table[extent]
            self._holds(store, table)
            self._leave(store)

    def test_nothing_that_lives_is_written_over(self, kept: Path) -> None:
        """Blocks of every size go around what an earlier store left."""
        table = self._session(kept)
        store = self._reopened(kept, table)
        for number in range(1, 12):
            for branch in (0, 1):
                start = 1000 + 64 * number
                table |= self._write(store, 1, tokens=number, seed=number, branch=branch, start=start)
            self._holds(store, table)
        store.close()

    def test_what_was_not_adopted_is_free(self, kept: Path) -> None:
        """Whatever is not in the table is gone, and its space is used again, however often somebody goes on."""
        table, most = self._session(kept), 0
        for seed in range(1, 9):
            store = self._reopened(kept, table)
            assert store.stats().disk_bytes > 0, "stats() must tell of bytes that an earlier store left"
            self._write(store, 6, seed=seed, start=1000)
            self._holds(store, table)
            self._leave(store)
            most = most or bytes_of(kept)
            assert bytes_of(kept) <= 2 * most, f"after {seed} stores that left nothing of their own in the table"

    def test_an_empty_table_makes_all_of_it_free(self, kept: Path) -> None:
        self._session(kept)
        before = bytes_of(kept)
        store = self._reopened(kept, {})
        table = self._write(store, 3, seed=3)
        self._leave(store)
        assert bytes_of(kept) <= before, "three blocks take more room than many did"
        store = self._reopened(kept, table)
        self._holds(store, table)
        store.close()

    def test_another_process_goes_on(self, kept: Path, tmp_path: Path) -> None:
        """What one process left, another one reads, and the other way round."""
        note = tmp_path / "table"
        in_child(lambda: save_table(self._session(kept), note))
        table = load_table(note)
        store = self._reopened(kept, table)
        self._holds(store, table)
        table |= self._write(store, 2, seed=4, start=100)
        self._leave(store)

        def goes_on() -> None:
            other = self._reopened(kept, table)
            self._holds(other, table)
            other.close()

        in_child(goes_on)

    def test_kill_9_behind_a_commit_loses_nothing_of_it(self, kept: Path, tmp_path: Path) -> None:
        """What came later is not in the table. A store with files of its own is told of no commit: it may say that
        they are damaged, but gives no other numbers."""
        note = tmp_path / "table"

        def child() -> None:
            store = self.new(kept, keep=True)
            store.adopt(())
            table = self._of_one_cache(self._fill(store))
            flush_writes(store)
            commit(store, [*table], durable=True)
            save_table(table, note)
            self._write(store, 6, seed=5, layer=7)
            os.kill(os.getpid(), signal.SIGKILL)

        in_child(child, killed=True)
        table = load_table(note)
        errors, committed = self._goes_on(kept, table, "after kill -9")
        if committed is not None:
            assert committed == [*table]
            assert not errors, "what was committed is lost"

    def test_the_table_that_was_committed_is_found(self, kept: Path) -> None:
        """For stores over a storage of ollm's: its manifest says what is to be adopted, cut extents as they are."""
        table = self._of_one_cache(self._session(kept))
        errors, committed = self._goes_on(kept, table, "after a commit")
        if committed is None:
            pytest.skip("this store has files of its own")
        assert committed == [*table]
        assert not errors

    def test_a_table_that_names_what_was_not_written_is_refused(self, kept: Path) -> None:
        """A wrong key, place, length or shape is a typed error, at once or when it is read; never other numbers."""
        table = [*self._session(kept)]
        first = table[0]
        key, place, layout = first.key, first.location, first.layout
        shapes = attrs.evolve(layout, kv_heads=2 * layout.kv_heads, key_size=16, value_size=16)
        wrong = {
            "another layer": attrs.evolve(first, key=attrs.evolve(key, layer=key.layer + 1)),
            "another branch": attrs.evolve(first, key=attrs.evolve(key, branch=key.branch + 1)),
            "another position": attrs.evolve(first, key=attrs.evolve(key, start=key.start + 1)),
            "other rows": attrs.evolve(first, key=attrs.evolve(key, rows=1, tokens=2 * key.tokens)),
            "other shapes": attrs.evolve(first, layout=shapes),
            "another length": attrs.evolve(first, location=attrs.evolve(place, nbytes=place.nbytes - 1)),
            "another place": attrs.evolve(first, location=attrs.evolve(place, offset=place.offset + 2**30)),
            "the place of another": attrs.evolve(first, location=table[1].location),
        }
        for what, extent in wrong.items():
            with _copied(kept) as folder, typed(what):
                assert self._is_refused(folder, extent), f"{what} than was written, and no error"

    def test_files_that_changed_meanwhile_give_right_data_or_a_typed_error(self, kept: Path) -> None:
        """A byte is flipped, a file is cut or removed, while no store has it open."""
        table = self._session(kept)
        caught = 0
        for path in files_of(kept):
            changes: list[tuple[str, Callable[[Path], object]]] = [("removed", Path.unlink)]
            for place in some(range(path.stat().st_size), _PLACES):
                changes.append((f"changed at {place}", functools.partial(flip, place=place)))
                changes.append((f"cut at {place}", functools.partial(os.truncate, length=place)))
            for what, change in changes:
                with _copied(kept) as folder:
                    change(folder / path.relative_to(kept))
                    caught += self._goes_on(folder, table, f"{path.name}, {what}")[0]
        assert caught, "no change was ever noticed: are these the files that the store reads?"

    def _fill(self, store: KVStore) -> Kept:
        """Two layers and, in each, a cache and a fork of it, whose last extent is cut; all blocks are equally large."""
        table: Kept = {}
        for layer in (0, 1):
            ours = self._write(store, 3, seed=10 + layer, layer=layer)
            fork = self._write(store, 2, seed=20 + layer, layer=layer, branch=1, start=[*ours][1].stop)
            last, block = fork.popitem()
            table |= ours | fork | {attrs.evolve(last, visible=max(last.visible // 3, 1)): block}
        return table

    @staticmethod
    def _of_one_cache(table: Kept) -> Kept:
        """What the fork has: in each layer two blocks of the cache that it was forked from, then its own."""
        seen = [extent for extent in table if extent.key.branch == 1 or extent.start < 2 * extent.key.tokens]
        return {extent: table[extent] for extent in sorted(seen, key=lambda one: (one.key.layer, one.start))}

    def _session(self, folder: Path) -> Kept:
        """A whole life, and what was in its table at the end. What the fork had is committed."""
        store = self.new(folder, keep=True)
        store.adopt(())
        table = self._fill(store)
        store.free([extent.location for extent in self._write(store, 3, seed=9, layer=2)])
        self._leave(store, self._of_one_cache(table))
        return table

    def _write(self, store: KVStore, count: int, *, seed: int, tokens: int = _TOKENS, **place: int) -> Kept:
        blocks = self.blocks(store, count, tokens, seed=seed, **_SIZES)
        return dict(zip(write_blocks(store, blocks, **place), blocks, strict=True))

    @staticmethod
    def _leave(store: KVStore, committed: Iterable[Extent] = ()) -> None:
        flush_writes(store)
        commit(store, [*committed])
        store.close()

    def _reopened(self, folder: Path, table: Iterable[Extent]) -> KVStore:
        store = self.new(folder, keep=True)
        try:
            store.adopt([*table])
        except BaseException:
            store.close()
            raise
        return store

    def _holds(self, store: KVStore, table: Kept) -> None:
        __tracebackhide__ = True
        self.holds(store, [*table], [*table.values()])

    def _is_refused(self, folder: Path, extent: Extent) -> bool:
        try:
            store = self._reopened(folder, [extent])
        except OllmError:
            return True
        try:
            read_extent(store, extent)
        except OllmError:
            return True
        finally:
            store.close()
        return False

    def _goes_on(self, folder: Path, table: Kept, what: str) -> tuple[int, list[Extent] | None]:
        """Adopt a table and read it: how often there was a typed error, and what the storage had committed."""
        __tracebackhide__ = True
        with typed(what):
            try:
                store = self._reopened(folder, table)
            except OllmError:
                return 1, None
            errors = self.right_or_refused(store, table, what)
            with suppress(OllmError):  # it may say that its files are not what they were
                store.close()
        return errors, extents_of(store.storage.committed) if isinstance(store.storage, SegmentedStorage) else None


@contextmanager
def _copied(folder: Path) -> Iterator[Path]:
    """A copy, for as long as the `with` block."""
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)
