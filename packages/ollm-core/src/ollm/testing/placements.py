"""What every offload placement must keep to, whatever the layers weigh."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import hypothesis.strategies as st
from hypothesis import example, given

from ollm.testing.examples import unhurried
from ollm.testing.purity import no_side_effects

_LAYERS = st.lists(st.integers(0, 10**9), max_size=60)
_COUNTS = st.none() | st.integers(0, 70)
_BUDGETS = st.none() | st.integers(0, 10**11)


class OffloadPlacementTests(ABC):
    """Tests of one offload placement.

    ```python
    class TestMyPlacement(OffloadPlacementTests):
        def place(self, layer_bytes, *, count, budget):
            return MyPlacement().place(layer_bytes, count=count, budget=budget)
    ```
    """

    @abstractmethod
    def place(self, layer_bytes: Sequence[int], *, count: int | None, budget: int | None) -> tuple[int, ...]:
        """Ask the placement under test."""

    @unhurried()
    @given(layers=_LAYERS, count=_COUNTS, budget=_BUDGETS)
    @example(layers=[], count=0, budget=0)
    @example(layers=[], count=3, budget=None)
    @example(layers=[5, 5, 5], count=None, budget=None)
    def test_layers_that_exist_each_once_in_order(
        self, layers: list[int], count: int | None, budget: int | None
    ) -> None:
        chosen = self.place(layers, count=count, budget=budget)
        assert isinstance(chosen, tuple)
        assert list(chosen) == sorted(set(chosen)), "ascending, without repeats"
        assert set(chosen) <= set(range(len(layers))), f"there are {len(layers)} layers"

    @unhurried()
    @given(layers=_LAYERS, count=st.integers(0, 70), budget=_BUDGETS)
    @example(layers=[1, 1, 1, 1], count=2, budget=None)
    @example(layers=[1, 1, 1, 1], count=0, budget=None)
    def test_never_more_than_were_asked_for(self, layers: list[int], count: int, budget: int | None) -> None:
        assert len(self.place(layers, count=count, budget=budget)) <= count

    @unhurried()
    @given(layers=_LAYERS, count=_COUNTS, budget=st.integers(0, 10**11))
    @example(layers=[10, 1], count=None, budget=10)
    @example(layers=[3, 3, 3], count=3, budget=0)
    def test_never_more_bytes_than_the_budget(self, layers: list[int], count: int | None, budget: int) -> None:
        assert sum(layers[index] for index in self.place(layers, count=count, budget=budget)) <= budget

    @unhurried()
    @given(layers=_LAYERS, count=_COUNTS, budget=_BUDGETS)
    def test_it_depends_on_its_arguments_alone(self, layers: list[int], count: int | None, budget: int | None) -> None:
        """Pure: the same answer at any time, its arguments stay as they are, and nothing is opened or started."""
        given_layers = list(layers)
        first = self.place(given_layers, count=count, budget=budget)  # what is heavy may be imported here
        assert given_layers == layers, "the sizes are the caller's"
        with no_side_effects():
            second = self.place(tuple(layers), count=count, budget=budget)
        assert first == second
