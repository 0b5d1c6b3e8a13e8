"""Which extents a query attends to. Today's answer is: all of them.

Attention hands the engine its query before any block is chosen, so that a strategy which reads only what matters has a
place to stand. Knows entries and queries; reads nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ollm.kv.table import Entries

Select = Callable[[Tensor, int, Entries], Entries]
"""Takes a query `[rows, heads, queries, size]`, the layer's number and what that layer holds; answers with those that
are to be attended to, in order. What a causal query must see for a right answer is the selector's responsibility: one
that leaves anything out is not lossless and says so."""


def everything(query: Tensor, layer: int, entries: Entries) -> Entries:
    """All that there is: nothing is lost."""
    return entries
