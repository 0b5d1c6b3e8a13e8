"""Placements that choose consecutive layers. Pure arithmetic on counts and sizes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from ollm.plugin import OffloadPlacement


class Band(OffloadPlacement):
    """As many consecutive layers as were asked for and as the budget holds; where they begin is the subclass's."""

    def place(self, layer_bytes: Sequence[int], *, count: int | None, budget: int | None) -> tuple[int, ...]:
        total = len(layer_bytes)
        for wanted in range(total if count is None else min(count, total), 0, -1):
            start = self.start(total, wanted)
            if budget is None or sum(layer_bytes[start : start + wanted]) <= budget:
                return tuple(range(start, start + wanted))
        return ()

    @abstractmethod
    def start(self, total: int, count: int) -> int:
        """The first of `count` layers out of `total`."""


class Prefix(Band):
    """Layers 0 … n-1."""

    def start(self, total: int, count: int) -> int:
        return 0


class Suffix(Band):
    """Layers total-n … total-1."""

    def start(self, total: int, count: int) -> int:
        return total - count


class MiddleBand(Band):
    """n layers from (total - n) // 2 on: of 16 layers, 2 are 7 and 8."""

    def start(self, total: int, count: int) -> int:
        return (total - count) // 2


class Auto(MiddleBand):
    """What ollm recommends."""

    resolves_to = "middle-band"
