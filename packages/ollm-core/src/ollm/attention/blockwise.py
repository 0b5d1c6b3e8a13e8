"""Attention over a sequence of blocks, tile by tile, merged by log-sum-exp in fp32."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import attrs
import torch
from torch import Tensor

from ollm.attention.kernels import Settings, Tile, attend_tile
from ollm.attention.masks import TileMask, Visible
from ollm.attention.shared import attend_shared

QUERY_TILE = 4096
"""Queries of a tile; see benchmarks/results for what was measured."""
KEY_TILE = 4096
PLAIN_TILE = 512
"""Queries and keys of a tile where there is no kernel, so that its scores stay small."""


@attrs.frozen
class Block:
    """Keys and values of consecutive positions, `[rows, kv_heads, tokens, size]`."""

    start: int
    keys: Tensor
    values: Tensor
    row_map: Tensor | None = None
    """Which of its rows each row of the queries attends to: int64 `[rows]` on the host; `None` for its own."""
    key_scale: float = 1.0
    """What the keys must be multiplied by."""
    value_scale: float = 1.0

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.keys.shape[2]


@attrs.frozen(kw_only=True)
class Scores:
    """What is done to scores before the softmax."""

    scale: float
    softcap: float | None = None
    bias: Tensor | None = None
    """Broadcastable to `[rows, heads, queries, keys]` of the whole attention."""
    bias_start: int = 0
    """Position of the first key of `bias`."""
    sinks: Tensor | None = None
    """`[heads]`: the score of one more key per head, whose value is zero (gpt-oss)."""


def blockwise_attention(query: Tensor, blocks: Iterable[Block], mask: TileMask, scores: Scores) -> Tensor:
    """Attention of `query` `[rows, heads, queries, size]` over all blocks; `[rows, heads, queries, value_size]`.

    Blocks are read once, in the given order. Queries that see no key at all get zeros.
    """
    parts = [(low, query[:, :, low:high], _Merge()) for low, high in _tiles(0, query.shape[2], QUERY_TILE)]
    kernel = query.device.type == "cpu" or (query.device.type == "cuda" and mask.is_causal)
    plain = scores.softcap is not None or scores.bias is not None or not kernel
    for block in blocks:
        for low, part, merge in parts:
            _attend_block(merge, part, low, block, mask, scores, PLAIN_TILE if plain else KEY_TILE)
    rows, heads = query.shape[:2]
    found = [merge.result(scores.sinks) for _, _, merge in parts]
    size = next((tile.shape[-1] for tile in found if tile is not None), query.shape[-1])
    out = [
        query.new_zeros(rows, heads, part.shape[2], size) if tile is None else tile.to(query.dtype)
        for tile, (_, part, _) in zip(found, parts, strict=True)
    ]
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


def _attend_block(
    merge: _Merge, query: Tensor, low: int, block: Block, mask: TileMask, scores: Scores, size: int
) -> None:
    """Tiles of one block for one tile of queries."""
    first, last = mask.query_offset + low, mask.query_offset + low + query.shape[2]
    for start, stop in _pieces(block, first, last, None if mask.is_causal and size == KEY_TILE else size):
        visible = mask.tile(first, last, start, stop)
        if visible is Visible.NONE:
            continue
        keys, values = block.keys, block.values
        if (start, stop) != (block.start, block.stop):
            part = slice(start - block.start, stop - block.start)
            keys, values = keys[:, :, part], values[:, :, part]
        bias = scores.bias
        if bias is not None:
            bias = bias[..., start - scores.bias_start : stop - scores.bias_start]
            bias = bias[..., low : low + query.shape[2], :] if bias.shape[-2] > 1 else bias
        # under autocast: what stock attention is given is cast in the same way
        keys, values = keys.to(query.dtype), values.to(query.dtype)
        settings: Settings = {"scale": scores.scale * block.key_scale, "softcap": scores.softcap, "bias": bias}
        if block.row_map is None:
            out, lse = attend_tile(query, keys, values, visible, **settings)
        else:
            out, lse = attend_shared(query, keys, values, visible, block.row_map, **settings)
        merge.add((out if block.value_scale == 1.0 else out * block.value_scale, lse))


class _Merge:
    """Outputs and log-sum-exps of tiles, merged at the end where they are few and small, as they come otherwise."""

    _AT_ONCE = 2**20  # elements of output that may wait

    def __init__(self) -> None:
        self._tiles: list[Tile] = []

    def add(self, tile: Tile) -> None:
        self._tiles.append(tile)
        if len(self._tiles) > 1 and tile[0].numel() * len(self._tiles) > self._AT_ONCE:
            self._tiles = [_merge(self._tiles)]

    def result(self, sinks: Tensor | None) -> Tensor | None:
        """The output, or `None` where no query saw any key."""
        if not self._tiles:
            return None
        out, lse = _merge(self._tiles)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks.float()[None, :, None])
            out = out * torch.exp(lse - total)[..., None]
        return out


def _merge(tiles: list[Tile]) -> Tile:
    """Several tiles of the same queries as one."""
    if len(tiles) == 1:
        return tiles[0]
    lses = torch.stack([lse for _, lse in tiles])
    total = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - torch.where(total.isfinite(), total, 0.0))
    out = tiles[0][0].float() * weights[0][..., None]
    for (tile, _), weight in zip(tiles[1:], weights[1:], strict=True):
        out.addcmul_(tile.float(), weight[..., None])
    return out, total


def _tiles(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for low in range(start, stop, size):
        yield low, min(low + size, stop)


def _pieces(block: Block, first: int, last: int, size: int | None) -> Iterator[tuple[int, int]]:
    """Split a block's positions before and behind the queries' own, so that the causal diagonal is a tile; and, with
    a `size`, into tiles of at most that, for masks that must be evaluated. The first query's own position needs no
    tile of its own: a step of generation is one query, and its newest block one tile."""
    diagonal = (first, last) if block.stop > first + 1 else ()
    borders = sorted({block.start, block.stop, *(at for at in diagonal if block.start < at < block.stop)})
    for start, stop in itertools.pairwise(borders):
        yield from _tiles(start, stop, size or stop - start)
