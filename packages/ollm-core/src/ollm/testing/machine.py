"""Random operations on a store, against lists of tensors: a state machine of Hypothesis.

A failure prints the shortest sequence of operations that shows it, as a program.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ollm.contracts.blocks import Extent, KVBlock
from ollm.testing.blocks import assert_holds, random_block, write_blocks
from ollm.testing.case import StoreCase, depth, flush_writes, most_tokens
from ollm.testing.examples import unhurried

_LAYERS = st.sampled_from((0, 1))
_BRANCHES = st.sampled_from((0, 1))


@attrs.frozen(eq=False)
class _Kept:
    """A row of the table that the machine keeps, and what must be there."""

    extent: Extent
    block: KVBlock


class RandomOperationsTests(StoreCase):
    """Any order of what core does to a store: layers grow, are cropped anywhere, lose what left a window; forks come
    and go; the process ends and another one goes on."""

    def test_random_operations(self, tmp_path: Path) -> None:
        """What was written and not freed is given back, whatever else was done."""
        goes_on = self.can_go_on(tmp_path)
        machine: Any = partial(_StoreMachine, self, goes_on)
        # every step reads all that there is: with the 50 of Hypothesis' default this takes longer than all other tests
        steps = min(settings().stateful_step_count, 10 + depth(10))
        tried = unhurried(max_examples=depth(30), stateful_step_count=steps)
        run_state_machine_as_test(machine, settings=tried)


class _StoreMachine(RuleBasedStateMachine):
    def __init__(self, case: StoreCase, goes_on: bool) -> None:
        super().__init__()
        self.case, self.goes_on = case, goes_on
        self.folder = tempfile.TemporaryDirectory()
        self.store = case.new(Path(self.folder.name), keep=goes_on)
        if goes_on:
            self.store.adopt(())
        self.table: dict[tuple[int, int], list[_Kept]] = {}
        self.dropped: list[_Kept] = []
        self.seed = 0

    @rule(layer=_LAYERS, branch=_BRANCHES, tokens=st.integers(1, 9), count=st.integers(1, 3))
    def write(self, layer: int, branch: int, tokens: int, count: int) -> None:
        rows = self._rows(layer, branch)
        start = rows[-1].extent.stop if rows else 0
        blocks = []
        for _ in range(count):
            self.seed += 1
            blocks.append(random_block(min(tokens, most_tokens(self.store)), value_size=6, seed=self.seed))
        extents = write_blocks(self.store, blocks, layer=layer, branch=branch, start=start)
        rows += map(_Kept, extents, blocks)

    @precondition(lambda self: any(self.table.values()))
    @rule(layer=_LAYERS, branch=_BRANCHES, gone=st.integers(1, 20))
    def crop(self, layer: int, branch: int, gone: int) -> None:
        """The last tokens go, wherever that cuts; a reader still holds what is dropped."""
        rows = self._rows(layer, branch)
        tokens = rows[-1].extent.stop - gone if rows else 0
        keep = sum(kept.extent.start < tokens for kept in rows)
        self.dropped += rows[keep:]
        del rows[keep:]
        if rows and rows[-1].extent.stop > tokens:
            last = rows[-1]
            cut = attrs.evolve(last.extent, visible=tokens - last.extent.start)
            rows[-1] = attrs.evolve(last, extent=cut)

    @precondition(lambda self: any(len(rows) > 1 for rows in self.table.values()))
    @rule(layer=_LAYERS, branch=_BRANCHES, count=st.integers(1, 3))
    def evict(self, layer: int, branch: int, count: int) -> None:
        """The oldest leave the window, never the newest one."""
        rows = self._rows(layer, branch)
        gone = rows[:-1][:count]
        self.dropped += gone
        del rows[: len(gone)]

    @precondition(lambda self: any(self.table.values()))
    @rule(branch=_BRANCHES)
    def forget_branch(self, branch: int) -> None:
        """A fork was closed."""
        for place, rows in self.table.items():
            if place[1] == branch:
                self.dropped += rows
                rows.clear()

    @precondition(lambda self: self.dropped)
    @rule()
    def free(self) -> None:
        self.store.free([kept.extent.location for kept in self.dropped])
        self.dropped = []

    @precondition(lambda self: self.goes_on and any(self.table.values()))
    @rule()
    def reopen(self) -> None:
        """Another process goes on with what is in the table; what was dropped is gone."""
        flush_writes(self.store)
        self.store.close()
        self.store = self.case.new(Path(self.folder.name), keep=True)
        self.store.adopt([kept.extent for rows in self.table.values() for kept in rows])
        self.dropped = []

    @invariant()
    def same_as_the_model(self) -> None:
        kept = [*self.dropped, *(kept for rows in self.table.values() for kept in rows)]
        assert_holds(self.store, [one.extent for one in kept], [one.block for one in kept], self.case.tolerance)

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def _rows(self, layer: int, branch: int) -> list[_Kept]:
        return self.table.setdefault((layer, branch), [])
