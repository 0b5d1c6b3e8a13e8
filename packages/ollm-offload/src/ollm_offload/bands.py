"""Placements that choose layers by where they are. Pure arithmetic on counts and sizes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence

from ollm.plugin import OffloadPlacement


class Pattern(OffloadPlacement):
    """As many layers as were asked for and as the budget holds; which ones is the subclass's."""

    def place(self, layer_bytes: Sequence[int], *, count: int | None, budget: int | None) -> tuple[int, ...]:
        total = len(layer_bytes)
        for wanted in range(total if count is None else min(count, total), 0, -1):
            chosen = tuple(self.indices(total, wanted))
            if budget is None or sum(layer_bytes[index] for index in chosen) <= budget:
                return chosen
        return ()

    @abstractmethod
    def indices(self, total: int, count: int) -> Iterable[int]:
        """`count` layers out of `total`, ascending."""


class Prefix(Pattern):
    """Layers 0 … n-1."""

    def indices(self, total: int, count: int) -> Iterable[int]:
        return range(count)


class Suffix(Pattern):
    """Layers total-n … total-1."""

    def indices(self, total: int, count: int) -> Iterable[int]:
        return range(total - count, total)


class MiddleBand(Pattern):
    """n layers from (total - n) // 2 on: of 16 layers, 2 are 7 and 8."""

    def indices(self, total: int, count: int) -> Iterable[int]:
        start = (total - count) // 2
        return range(start, start + count)


class Interleaved(Pattern):
    """n layers as far from each other as can be: of 8 layers, 2 are 2 and 6. While they compute, others are read."""

    def indices(self, total: int, count: int) -> Iterable[int]:
        return ((2 * number + 1) * total // (2 * count) for number in range(count))


class Auto(MiddleBand):
    """What ollm recommends."""

    resolves_to = "middle-band"
