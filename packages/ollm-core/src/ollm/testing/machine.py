"""Random operations on a store, against lists of tensors: a state machine of Hypothesis.

A failure prints the shortest sequence of operations that shows it, as a program.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from ollm.contracts.kv import Extent
from ollm.testing.blocks import Pair, assert_holds, assert_reads, random_block
from ollm.testing.case import StoreCase, most_tokens

_LAYERS = (0, 1)


class RandomOperationsTests(StoreCase):
    """Any order of appends, truncations, evictions and releases."""

    def test_random_operations(self) -> None:
        """What is listed is what was appended; what was dropped stays readable until it is released."""
        run_state_machine_as_test(lambda: _StoreMachine(self))  # type: ignore[arg-type]


class _StoreMachine(RuleBasedStateMachine):
    def __init__(self, case: StoreCase) -> None:
        super().__init__()
        self.case = case
        self.folder = tempfile.TemporaryDirectory()
        self.store = case.new(Path(self.folder.name))
        self.model: dict[int, list[Pair]] = {layer: [] for layer in _LAYERS}
        self.kept = dict.fromkeys(_LAYERS, 0)
        """Extents at the front that were evicted."""
        self.dropped: list[tuple[Extent, Pair]] = []
        self.seed = 0

    @rule(layer=st.sampled_from(_LAYERS), tokens=st.integers(1, 9))
    def append(self, layer: int, tokens: int) -> None:
        self.seed += 1
        block = random_block(min(tokens, most_tokens(self.store)), value_size=6, seed=self.seed)
        self.store.append(layer, *block)
        self.model[layer].append(block)

    @rule(layer=st.sampled_from(_LAYERS), keep=st.integers(0, 5))
    def truncate(self, layer: int, keep: int) -> None:
        """Drop all but the first extents; a reader still holds those that are dropped."""
        if self.kept[layer]:  # core empties a layer that has evicted, or leaves it
            keep = 0
        dropped = self._listed(layer)[keep:]
        del self.model[layer][keep:]
        self.store.truncate(layer, sum(keys.shape[2] for keys, _ in self.model[layer]))
        self.kept[layer] = 0
        self.dropped += dropped

    @precondition(lambda self: self.store.trims)
    @rule(layer=st.sampled_from(_LAYERS), tokens=st.integers(0, 20))
    def trim(self, layer: int, tokens: int) -> None:
        """Keep some tokens, wherever that cuts."""
        listed, blocks = self._listed(layer), self.model[layer]
        if self.kept[layer] or sum(keys.shape[2] for keys, _ in blocks) <= tokens:
            return
        kept = [block for extent, block in listed if extent.stop <= tokens]
        self.dropped += listed[len(kept) :]
        if listed[len(kept)][0].start < tokens:
            keys, values = blocks[len(kept)]
            inside = tokens - listed[len(kept)][0].start
            kept.append((keys[:, :, :inside], values[:, :, :inside]))
        self.store.truncate(layer, tokens)
        self.model[layer] = kept

    @precondition(lambda self: self.store.window is not None)
    @rule(layer=st.sampled_from(_LAYERS), count=st.integers(1, 3))
    def evict(self, layer: int, count: int) -> None:
        """The oldest extents leave the window, never the newest one."""
        gone = self._listed(layer)[:-1][:count]
        if not gone:
            return
        self.store.evict(layer, [extent for extent, _ in gone])
        self.kept[layer] += len(gone)
        self.dropped += gone

    @precondition(lambda self: self.dropped)
    @rule()
    def release(self) -> None:
        self.store.release([extent for extent, _ in self.dropped])
        self.dropped = []

    @invariant()
    def same_as_the_model(self) -> None:
        for layer in _LAYERS:
            if not self.kept[layer]:
                assert_holds(self.store, layer, self.model[layer], self.case.tolerance)
            for extent, block in self._listed(layer)[: None if self.kept[layer] else 0]:
                assert_reads(self.store, extent, block, self.case.tolerance)
        for extent, block in self.dropped:
            assert_reads(self.store, extent, block, self.case.tolerance)

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def _listed(self, layer: int) -> list[tuple[Extent, Pair]]:
        """The extents that the store lists, with what they must hold, once their positions are right."""
        extents: Any = self.store.extents(layer)
        blocks, start = self.model[layer], 0
        expected = []
        for keys, _ in blocks:
            expected.append((start, keys.shape[2]))
            start += keys.shape[2]
        listed = [(extent.start, extent.tokens) for extent in extents]
        assert listed == expected[self.kept[layer] :], f"layer {layer}: starts and tokens of the extents"
        return list(zip(extents, blocks[self.kept[layer] :], strict=True))
