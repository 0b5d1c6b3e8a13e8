"""A tile whose keys are shared by several rows of the queries: forks of one document, beams of one prompt.

The rows ride in the query dimension, so that keys and values are neither copied nor visited twice.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ollm.attention.kernels import Settings, Tile, attend_tile
from ollm.attention.masks import Answer, Visible


def attend_shared(
    query: Tensor, keys: Tensor, values: Tensor, visible: Answer, row_map: Tensor, **settings: Unpack[Settings]
) -> Tile:
    """Attention of one tile where row i of the queries attends to row `row_map[i]` of keys and values.

    Args:
        query: `[rows, heads, queries, size]`.
        keys, values: `[stored_rows, kv_heads, keys, size]`.
        visible: the mask's answer for this tile; never `Visible.NONE`.
        row_map: int64 `[rows]`, on the host.
        settings: as of `attend_tile`.
    """
    rows, heads, queries, _ = query.shape
    riders: dict[int, list[int]] = {}
    for row, stored in enumerate(row_map.tolist()):
        riders.setdefault(stored, []).append(row)
    if visible is Visible.DIAGONAL and len(riders) < rows:
        visible = torch.ones(queries, queries, dtype=torch.bool, device=query.device).tril()
    tiles = [
        _attend_group(query, keys[stored, None], values[stored, None], visible, group, **settings)
        for stored, group in riders.items()
    ]
    if len(tiles) == 1:  # all rows, in order
        return tiles[0]
    out = query.new_empty(rows, heads, queries, values.shape[-1], dtype=torch.float32)
    lse = query.new_empty(rows, heads, queries, dtype=torch.float32)
    for group, (tile, tile_lse) in zip(riders.values(), tiles, strict=True):
        out[group], lse[group] = tile.float(), tile_lse
    return out, lse


def _attend_group(
    query: Tensor, keys: Tensor, values: Tensor, visible: Answer, group: list[int], **settings: Unpack[Settings]
) -> Tile:
    """Attention of some rows to one row of keys and values."""
    rows, heads, queries, _ = query.shape
    bias = settings["bias"]
    settings["bias"] = None if bias is None else _ride(bias, group, rows, queries)
    seen = _ride(visible, group, rows, queries) if isinstance(visible, Tensor) else visible
    theirs = query if len(group) == rows else query[group]
    packed = theirs.transpose(0, 1).reshape(1, heads, len(group) * queries, -1)
    out, lse = attend_tile(packed, keys, values, seen, **settings)
    shape = (heads, len(group), queries)
    return out[0].view(*shape, -1).transpose(0, 1), lse[0].view(shape).transpose(0, 1)


def _ride(of_scores: Tensor, group: list[int], rows: int, queries: int) -> Tensor:
    """What can be broadcast to scores `[rows, heads, queries, keys]`, for rows that ride in the query dimension:
    `[1, heads or 1, len(group) * queries, keys]`."""
    while of_scores.dim() < 4:
        of_scores = of_scores[None]
    heads, keys = of_scores.shape[1], of_scores.shape[3]
    whole = of_scores.expand(rows, heads, queries, keys)
    return whole[group].transpose(0, 1).reshape(1, heads, len(group) * queries, keys)
