"""Which row of a stored extent each row of the current batch stands for.

Beams, repeats and selections change the batch; what is stored stays as it was written and only these maps change. A
map is an int64 tensor on the host, `None` for the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

RowMap = Tensor | None


def select(maps: Sequence[RowMap], index: Tensor) -> list[RowMap]:
    """The maps after the batch became `batch[index]`. Extents written together share one map, composed once."""
    composed: dict[int, Tensor] = {}
    for row_map in maps:
        if id(row_map) not in composed:
            composed[id(row_map)] = index if row_map is None else row_map[index]
    return [composed[id(row_map)] for row_map in maps]


def take(tensor: Tensor, row_map: RowMap) -> Tensor:
    """The rows of today out of a stored tensor; the tensor itself for the identity."""
    return tensor if row_map is None else tensor.index_select(0, row_map.to(tensor.device))
