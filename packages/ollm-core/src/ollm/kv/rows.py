"""Which row of a stored extent each row of the current batch stands for.

Beams, repeats, selections and forks change the batch; what is stored stays as it was written and only these maps
change. A map is an int64 tensor on the host, `None` for the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from torch import Tensor

from ollm.contracts.kv import Extent

RowMap = Tensor | None


@attrs.frozen(eq=False)
class Stored:
    """A stored extent as one layer of one cache sees it."""

    extent: Extent
    start: int
    """Position of its first token in the sequence. A fork counts on where its store counts from 0."""
    row_map: RowMap = None

    @property
    def stop(self) -> int:
        """Position after its last token."""
        return self.start + self.extent.tokens


def select(stored: Sequence[Stored], index: Tensor) -> tuple[Stored, ...]:
    """The same extents after the batch became `batch[index]`. Those with one map share the new one, too."""
    composed: dict[int, Tensor] = {}
    for part in stored:
        if id(part.row_map) not in composed:
            composed[id(part.row_map)] = index if part.row_map is None else part.row_map[index]
    return tuple(attrs.evolve(part, row_map=composed[id(part.row_map)]) for part in stored)


def take(tensor: Tensor, row_map: RowMap) -> Tensor:
    """The rows of today out of a stored tensor; the tensor itself for the identity."""
    return tensor if row_map is None else tensor.index_select(0, row_map.to(tensor.device))
