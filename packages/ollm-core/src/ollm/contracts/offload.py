"""The placement contract: which decoder layers stay in a tier. Pure functions, no I/O."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence


class Tier(enum.Enum):
    """Where a layer's weights stay between forward passes."""

    DISK = "disk"
    """Nowhere: they are read each time."""
    HOST = "host"
    DEVICE = "device"
    """The model's own; on a CPU it is the same as `HOST`."""


class OffloadPlacement(ABC):
    """Chooses layers. A pure function of sizes and a count: no I/O, no state.

    Attributes:
        resolves_to: the name of the placement that this one stands for (`auto` names `middle-band`); `None` for
            itself.
    """

    resolves_to: str | None = None

    @abstractmethod
    def place(self, layer_bytes: Sequence[int], *, count: int | None, budget: int | None) -> tuple[int, ...]:
        """Indices of the layers to keep, ascending, without repeats.

        Args:
            layer_bytes: bytes of every decoder layer, in order.
            count: how many layers the caller asked for, not negative; at most all are placed. `None`: as the budget
                says.
            budget: bytes that the chosen layers may take together, or `None` for no limit.
        """
