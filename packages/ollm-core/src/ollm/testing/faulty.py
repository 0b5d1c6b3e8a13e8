"""A disk that fails, under a store at work: nothing hangs, nothing that was reported as kept is lost, and a second
attempt works."""

from __future__ import annotations

import functools
import resource
import tempfile
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from ollm.contracts.blocks import Extent, KVBlock
from ollm.contracts.spill import SpillPlan
from ollm.errors import OllmError
from ollm.io.scheduler import _schedulers
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession
from ollm.storage.kept import extents_of
from ollm.storage.segments import SegmentedStorage
from ollm.testing.blocks import assert_same, random_block, write_blocks
from ollm.testing.case import StoreCase, assert_nothing_left, commit, files_of, flush_writes, some, untyped
from ollm.testing.faults import FAULTS, FaultyDisk
from ollm.testing.processes import watchdog

_STEPS = [("append", 7), ("append", 2), ("append", 9), ("crop", 14), ("append", 6), ("rows", 2), ("crop", 3)]
_WINDOW_STEPS = [("append", 7), ("append", 2), ("append", 9), ("append", 6), ("rows", 2), ("append", 30)]
_PLACES = 8
"""About how many operations of a life fail, one at a time, for each kind of fault; see `some`."""
_RAISED = (OllmError, KeyboardInterrupt, MemoryError)

Trouble = Callable[[], AbstractContextManager[None]]
"""Makes the disk go wrong for the length of a `with` block."""


@attrs.define
class _Progress:
    """How far a life came whose table is committed now and then."""

    committed: dict[Extent, KVBlock] = attrs.field(factory=dict)
    """What was reported as kept for later."""
    attempted: dict[Extent, KVBlock] = attrs.field(factory=dict)
    """What may have been kept, if an error came just then."""


class FaultsTests(StoreCase):
    """The store is driven by core's own engine, as in a cache."""

    @pytest.mark.parametrize("fault", FAULTS)
    def test_any_fault_of_the_disk_is_survived(self, fault: str, tmp_path: Path) -> None:
        """One operation of ollm's storage and folders after the other goes wrong, over a whole life of a layer."""
        sound = FaultyDisk()
        self._survives(sound.installed, "no fault")
        operations = len(sound.operations)
        for at in some(range(operations), _PLACES):
            self._survives(FaultyDisk(FAULTS[fault], at).installed, f"{fault} at operation {at} of {operations}")

    def test_files_that_may_not_grow_are_survived(self, tmp_path: Path) -> None:
        """The system itself refuses every write beyond so many bytes: for stores that write files of their own."""
        store = self.new(tmp_path)
        write_blocks(store, self.blocks(store, 4, 8))
        flush_writes(store)
        largest = max((path.stat().st_size for path in files_of(tmp_path)), default=0)
        store.close()
        if not largest:
            pytest.skip("this store has no files")
        for limit in some(range(largest), _PLACES):
            self._survives(functools.partial(_file_size, limit), f"no file may have more than {limit} bytes")

    @pytest.mark.parametrize("fault", ["no room", "input/output error"])
    def test_a_store_that_cannot_be_made_leaves_nothing(self, fault: str, tmp_path: Path) -> None:
        """One operation after the other goes wrong while it is opened: a typed error, or a store all the same."""
        sound = FaultyDisk()
        with sound.installed():
            store = self.new(tmp_path)
        store.close()
        for at in range(len(sound.operations)):
            try:
                with FaultyDisk(FAULTS[fault], at).installed():
                    store = self.new(tmp_path)
                store.close()
            except OllmError:
                continue
            except Exception as error:
                raise untyped(f"{fault} at operation {at} of opening it", error) from error
        self.new(tmp_path).close()  # tidies up what could not be removed
        assert_nothing_left(tmp_path, "by stores that could not be made, after one that could")

    @pytest.mark.parametrize("fault", FAULTS)
    def test_any_fault_loses_nothing_that_was_committed(self, fault: str, kept: Path) -> None:
        """One operation after the other goes wrong while a store writes, commits, is closed and opened again; the one
        after that finds the last table that was reported as committed, or the one that just was to be."""
        sound = FaultyDisk()
        with tempfile.TemporaryDirectory() as folder, sound.installed():
            self._commits(Path(folder), _Progress())
        operations = len(sound.operations)
        for at in some(range(operations), _PLACES):
            what = f"{fault} at operation {at} of {operations}"
            with tempfile.TemporaryDirectory() as folder, watchdog():
                progress = _Progress()
                try:
                    with FaultyDisk(FAULTS[fault], at).installed():
                        self._commits(Path(folder), progress)
                except _RAISED:
                    pass
                except Exception as error:
                    raise untyped(what, error) from error
                self._finds(Path(folder), progress, what)

    def _commits(self, folder: Path, progress: _Progress) -> None:
        """Two lives, with two commits each."""
        for life in (1, 2):
            store = self.new(folder, keep=True)
            try:
                over_storage, table = isinstance(store.storage, SegmentedStorage), dict(progress.committed)
                store.adopt([*table])
                for seed in (10 * life, 10 * life + 1):
                    blocks = self.blocks(store, 3, 5, seed=seed)
                    extents = write_blocks(store, blocks, start=max((extent.stop for extent in table), default=0))
                    store.free([extents[-1].location])
                    table |= zip(extents[:-1], blocks, strict=False)
                    progress.attempted = dict(table)
                    flush_writes(store)
                    commit(store, [*table], durable=True)
                    if over_storage:
                        progress.committed = dict(table)
            finally:
                store.close()
            progress.committed = dict(table)

    def _finds(self, folder: Path, progress: _Progress, what: str) -> None:
        __tracebackhide__ = True
        try:
            store = self.new(folder, keep=True)
        except OllmError as error:
            assert not progress.committed, f"{what}: what was committed cannot be opened: {error}"
            return
        table = progress.committed
        if isinstance(store.storage, SegmentedStorage):
            found = extents_of(store.storage.committed)
            table = next(
                (table for table in (progress.committed, progress.attempted) if [*table] == found), progress.committed
            )
            assert [*table] == found, f"{what}: other extents than were committed"
        store.adopt([*table])
        self.holds(store, [*table], [*table.values()])
        store.close()

    def _survives(self, trouble: Trouble, what: str) -> None:
        """Every step first while there is trouble, then, if that failed, again without."""
        __tracebackhide__ = True
        before_it = _users()
        with tempfile.TemporaryDirectory() as folder, watchdog():
            ours, model = self._layer(Path(folder) / "ours"), self._layer(Path(folder) / "model")
            for seed, (step, argument) in enumerate(_WINDOW_STEPS if self.window_tokens else _STEPS):
                before = _content(ours)
                _take(model, step, argument, seed)
                after = _content(model)
                taken = False
                try:
                    with trouble():
                        _take(ours, step, argument, seed)
                        taken = True
                        flush_writes(ours._session.store)
                except _RAISED as error:
                    if taken:  # it failed in the background, behind what was reported as kept
                        _assert_content(ours, after, f"{what}: lost by {step} {argument} after {error!r}")
                        continue
                    if _is(ours, after) and (step == "crop" or not isinstance(error, OllmError)):
                        continue  # only giving back the bytes of what was dropped was interrupted
                    _assert_content(ours, before, f"{what}: {step} {argument} failed with {error!r} and left its trace")
                    _take(ours, step, argument, seed)
                except Exception as error:
                    raise untyped(f"{what}: {step} {argument}", error) from error
                _assert_content(ours, after, f"{what}: after {step} {argument}")
            ours._session.close()
            model._session.close()
            kept = {disk: users for disk, users in _users().items() if users > before_it.get(disk, 0)}
            assert not kept, f"{what}: the threads of a disk go on for what was closed"

    def _layer(self, folder: Path) -> LayerHistory:
        plan = SpillPlan(flush_tokens=4, flush_bytes=2**30, hot_tokens=1, resident_bytes=200)
        session = KVSession(self.new(folder), plan, strategy="under-test", layers=[0], lossless=not self.tolerance)
        return LayerHistory(0, session)


def _users() -> dict[Hashable, int]:
    """How many use the threads of each disk, whoever else there is in this process included."""
    return {disk: len(scheduler._users) for disk, scheduler in _schedulers.items()}


def _take(layer: LayerHistory, step: str, argument: int, seed: int) -> None:
    if step == "append":
        layer.append(*_tokens(argument, layer.rows or 2, seed))
    elif step == "crop":
        layer.crop(argument)
    else:
        layer.select_rows(torch.arange(argument + 1) % layer.rows)


def _tokens(count: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    block = random_block(count, rows=rows, heads=2, key_size=4, value_size=3, seed=seed)
    return block.keys, block.values


def _content(layer: LayerHistory) -> dict[int, tuple[Tensor, Tensor]]:
    """A copy of all that a layer holds, by position."""
    if not layer.tokens:
        return {}
    found: dict[int, tuple[Tensor, Tensor]] = {}
    keys, values = _tokens(1, layer.rows)
    handle: Any = layer.handle(keys, values)
    for block in handle.blocks(keys):
        keys, values = block.keys * block.key_scale, block.values * block.value_scale
        if block.row_map is not None:
            keys, values = keys[block.row_map], values[block.row_map]
        for index in range(keys.shape[2]):
            found[block.start + index] = keys[:, :, index].clone(), values[:, :, index].clone()
    del found[layer.tokens]  # the one that was only asked with
    return found


def _is(layer: LayerHistory, expected: dict[int, tuple[Tensor, Tensor]]) -> bool:
    ours = _content(layer)
    return ours.keys() == expected.keys() and all(
        torch.equal(mine, theirs)
        for position, pair in ours.items()
        for mine, theirs in zip(pair, expected[position], strict=True)
    )


def _assert_content(layer: LayerHistory, expected: dict[int, tuple[Tensor, Tensor]], what: str) -> None:
    __tracebackhide__ = True
    ours = _content(layer)
    assert sorted(ours) == sorted(expected), f"{what}: positions"
    for position, pair in ours.items():
        for name, mine, theirs in zip(("keys", "values"), pair, expected[position], strict=True):
            assert_same(mine, theirs, 0.0, f"{what}: {name} of token {position}")


@contextmanager
def _file_size(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
