"""Offload placements: the exact layers that a compatible system chooses, and properties that hold for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollm.plugin import BuildContext, NoOptions
from ollm.registry import Kind, registry
from ollm.registry.kinds import RESERVED
from ollm.testing import OffloadPlacementTests, PluginTests
from ollm_offload import ollm_offload_placements

PLACEMENTS = {strategy.name: strategy.build(BuildContext(NoOptions())) for strategy in ollm_offload_placements()}
each_placement = pytest.mark.parametrize("name", PLACEMENTS)


def test_all_four_are_found_through_the_entry_point():
    found = {name for name in registry().names(Kind.OFFLOAD_PLACEMENT) if "/" not in name}
    assert found == set(PLACEMENTS) == {"prefix", "suffix", "middle-band", "auto"}


def test_core_knows_which_of_the_reserved_names_are_offered():
    """So that an error tells nobody to install what would not help."""
    reserved = {name: home.planned for name, home in RESERVED[Kind.OFFLOAD_PLACEMENT].items()}
    assert {name for name, planned in reserved.items() if not planned} == set(PLACEMENTS)


@pytest.mark.parametrize(
    ("name", "total", "count", "expected"),
    [
        ("prefix", 16, 2, (0, 1)),
        ("suffix", 16, 2, (14, 15)),
        ("middle-band", 16, 2, (7, 8)),
        ("middle-band", 16, 3, (6, 7, 8)),
        ("middle-band", 5, 2, (1, 2)),
        ("middle-band", 16, 15, tuple(range(15))),
        ("middle-band", 3, 1, (1,)),
        ("auto", 16, 2, (7, 8)),
        ("prefix", 3, 9, (0, 1, 2)),
        ("suffix", 3, 9, (0, 1, 2)),
        ("middle-band", 3, 9, (0, 1, 2)),
        ("middle-band", 16, 0, ()),
        ("suffix", 0, 2, ()),
    ],
)
def test_the_arithmetic(name, total, count, expected):
    assert PLACEMENTS[name].place([100] * total, count=count, budget=None) == expected


def test_auto_says_what_it_stands_for():
    assert PLACEMENTS["auto"].resolves_to == "middle-band"
    assert PLACEMENTS["prefix"].resolves_to is None


class PlacementTests(OffloadPlacementTests):
    name: str

    def place(self, layer_bytes, *, count, budget):
        return PLACEMENTS[self.name].place(layer_bytes, count=count, budget=budget)


class TestPrefix(PlacementTests):
    name = "prefix"


class TestSuffix(PlacementTests):
    name = "suffix"


class TestMiddleBand(PlacementTests):
    name = "middle-band"


class TestPlugin(PluginTests):
    distribution = "ollm-offload"
    project = Path(__file__).parents[2] / "packages" / "ollm-offload"


@each_placement
@given(
    sizes=st.lists(st.integers(0, 1000), max_size=40),
    count=st.none() | st.integers(0, 50),
    budget=st.none() | st.integers(0, 20_000),
)
def test_what_is_chosen_exists_is_consecutive_and_fits(name, sizes, count, budget):
    chosen = PLACEMENTS[name].place(sizes, count=count, budget=budget)
    assert list(chosen) == list(range(chosen[0], chosen[-1] + 1)) if chosen else True
    assert set(chosen) <= set(range(len(sizes)))
    assert count is None or len(chosen) <= count
    if budget is None:
        assert len(chosen) == min(len(sizes), len(sizes) if count is None else count)
    else:
        assert sum(sizes[index] for index in chosen) <= budget


@each_placement
@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=40), budget=st.integers(0, 20_000))
def test_a_budget_is_used(name, sizes, budget):
    """One layer more, placed by the same rule, would not fit."""
    placement = PLACEMENTS[name]
    chosen = placement.place(sizes, count=None, budget=budget)
    if len(chosen) < len(sizes):
        more = placement.place(sizes, count=len(chosen) + 1, budget=None)
        assert sum(sizes[index] for index in more) > budget
