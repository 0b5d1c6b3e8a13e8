"""Offload placements: the exact layers that a compatible system chooses, and properties that hold for all of them."""

from __future__ import annotations

import itertools
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


def test_all_of_them_are_found_through_the_entry_point():
    offers = registry().offers(Kind.OFFLOAD_PLACEMENT)
    found = {registry().name_of(offer) for offer in offers if offer.distribution == "ollm-offload"}
    assert found == set(PLACEMENTS) == {"prefix", "suffix", "middle-band", "interleaved", "auto"}


def test_core_knows_who_offers_the_reserved_names():
    """So that an error tells nobody to install what would not help."""
    homes = {name: home.distribution for name, home in RESERVED[Kind.OFFLOAD_PLACEMENT].items()}
    assert homes == {**dict.fromkeys(PLACEMENTS, "ollm-offload"), "fit": "ollm-core"}


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
        ("interleaved", 8, 2, (2, 6)),
        ("interleaved", 16, 4, (2, 6, 10, 14)),
        ("interleaved", 3, 1, (1,)),
        ("interleaved", 5, 3, (0, 2, 4)),
        ("interleaved", 3, 9, (0, 1, 2)),
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


class TestInterleaved(PlacementTests):
    name = "interleaved"


class TestPlugin(PluginTests):
    distribution = "ollm-offload"
    project = Path(__file__).parents[2] / "packages" / "ollm-offload"


@each_placement
@given(
    sizes=st.lists(st.integers(0, 1000), max_size=40),
    count=st.none() | st.integers(0, 50),
    budget=st.none() | st.integers(0, 20_000),
)
def test_what_is_chosen_exists_is_as_close_as_it_should_be_and_fits(name, sizes, count, budget):
    chosen = PLACEMENTS[name].place(sizes, count=count, budget=budget)
    gaps = {right - left for left, right in itertools.pairwise(chosen)}
    if name == "interleaved":
        assert not gaps or max(gaps) - min(gaps) <= 1
    else:
        assert gaps <= {1}
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
