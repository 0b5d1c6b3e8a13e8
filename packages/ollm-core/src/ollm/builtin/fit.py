"""`fit`: the default placement, as many layers as the budget takes."""

from __future__ import annotations

from collections.abc import Sequence

from ollm.plugin import OffloadPlacement


class Fit(OffloadPlacement):
    """As many layers as fit, spread evenly, so that reading the others has their compute to hide behind."""

    def place(self, layer_bytes: Sequence[int], *, count: int | None, budget: int | None) -> tuple[int, ...]:
        total = len(layer_bytes)
        for wanted in range(total if count is None else min(count, total), 0, -1):
            chosen = tuple((2 * number + 1) * total // (2 * wanted) for number in range(wanted))
            if budget is None or sum(layer_bytes[index] for index in chosen) <= budget:
                return chosen
        return ()
