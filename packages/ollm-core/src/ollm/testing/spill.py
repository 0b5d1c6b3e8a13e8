"""What every spill policy must keep to, whatever memory and budget there are."""

from __future__ import annotations

from abc import ABC, abstractmethod

import hypothesis.strategies as st
from hypothesis import example, given

from ollm.contracts.spill import KVGeometry, LayerGeometry, MemorySnapshot, SpillPlan
from ollm.testing.examples import unhurried
from ollm.testing.purity import no_side_effects

_SIZES = st.integers(0, 2**44)
_GEOMETRIES = st.builds(
    lambda layers, heads, size: KVGeometry(
        tuple(LayerGeometry(layer, heads, size, size, itemsize=2) for layer in range(layers))
    ),
    st.integers(0, 100), st.integers(1, 64), st.sampled_from([1, 64, 128, 576]),
)  # fmt: skip
_MEMORY = st.builds(
    lambda kind, host, used, device, taken: MemorySnapshot(
        device_type=kind, host_total=host, host_free=host // used,
        device_total=host if kind == "cpu" else device,
        device_free=host // used if kind == "cpu" else device // taken,
    ),
    st.sampled_from(["cpu", "cuda"]), st.integers(2**26, 2**42), st.integers(1, 10**6),
    st.integers(2**28, 2**38), st.integers(1, 10**6),
)  # fmt: skip
_EMPTY = KVGeometry(())
_SMALL = MemorySnapshot(device_type="cpu", host_total=2**26, host_free=0, device_total=2**26, device_free=0)


class SpillPolicyTests(ABC):
    """Tests of one spill policy.

    ```python
    class TestMyPolicy(SpillPolicyTests):
        def plan(self, geometry, memory, budget):
            return MyPolicy().plan(geometry, memory, budget)
    ```
    """

    @abstractmethod
    def plan(self, geometry: KVGeometry, memory: MemorySnapshot, budget: int | None) -> SpillPlan:
        """Ask the policy under test."""

    @unhurried()
    @given(geometry=_GEOMETRIES, memory=_MEMORY, budget=st.none() | _SIZES)
    @example(geometry=_EMPTY, memory=_SMALL, budget=None)
    @example(geometry=_EMPTY, memory=_SMALL, budget=0)
    def test_it_always_answers_with_a_plan(
        self, geometry: KVGeometry, memory: MemorySnapshot, budget: int | None
    ) -> None:
        """Without stored layers and without free memory, too."""
        assert isinstance(self.plan(geometry, memory, budget), SpillPlan)

    @unhurried()
    @given(geometry=_GEOMETRIES, memory=_MEMORY, budget=_SIZES)
    @example(geometry=_EMPTY, memory=_SMALL, budget=0)
    def test_the_budget_is_never_exceeded(self, geometry: KVGeometry, memory: MemorySnapshot, budget: int) -> None:
        """What stays resident, on host and accelerator together."""
        plan = self.plan(geometry, memory, budget)
        assert plan.resident_bytes + plan.resident_bytes_device <= budget

    @unhurried()
    @given(geometry=_GEOMETRIES, memory=_MEMORY)
    def test_without_a_budget_no_more_than_is_free_is_taken(self, geometry: KVGeometry, memory: MemorySnapshot) -> None:
        """A policy may ask for a fixed amount, such as 256 MiB, where less is free: core takes less then. It may not
        count on memory that no machine of this size has."""
        plan = self.plan(geometry, memory, None)
        assert plan.resident_bytes <= max(memory.host_total, 2**30)
        if memory.device_type != "cpu":
            assert plan.resident_bytes_device <= max(memory.device_total, 2**30)

    @unhurried()
    @given(geometry=_GEOMETRIES, memory=_MEMORY, budget=st.none() | _SIZES)
    def test_it_depends_on_its_arguments_alone(
        self, geometry: KVGeometry, memory: MemorySnapshot, budget: int | None
    ) -> None:
        """Pure: the same answer at any time, and nothing is opened, started or connected to."""
        first = self.plan(geometry, memory, budget)  # what is heavy may be imported here
        with no_side_effects():
            second = self.plan(geometry, memory, budget)
        assert first == second
