"""Stored tokens as tensors of their own: for models that need a layer's whole keys and values, and for tails."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ollm.contracts.kv import KVBlock
from ollm.kv.rows import Stored, take
from ollm.kv.source import BlockSource, Following
from ollm.kv.tail import Tail
from ollm.storage.tensors import LayerLayout


def copy_stored(
    source: BlockSource,
    stored: Sequence[Stored],
    layout: LayerLayout,
    following: Following,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Copy pinned extents, as the rows of today, to their positions in `keys` and `values`
    `[rows, kv_heads, tokens, size]`. What must be decoded is decoded there."""

    def out(part: Stored) -> KVBlock | None:
        if part.row_map is not None:
            return None
        return KVBlock(keys[:, :, part.start : part.stop], values[:, :, part.start : part.stop])

    for part in source.blocks(stored, layout, following, out):
        block = part.block
        span = slice(part.start, part.start + block.keys.shape[2])
        for whole, piece, scale in ((keys, block.keys, block.key_scale), (values, block.values, block.value_scale)):
            target = whole[:, :, span]
            if target.data_ptr() != piece.data_ptr():
                target.copy_(take(piece, part.row_map))
            if scale != 1.0:
                target.mul_(scale)


def as_tail(source: BlockSource, part: Stored, layout: LayerLayout, tokens: int, device: torch.device) -> Tail:
    """The first tokens of a pinned extent, with the rows of today, on `device`."""
    tail = Tail()
    for loaded in source.blocks([part], layout, lambda: ()):
        block = loaded.block
        keys, values = (
            take(piece[:, :, :tokens], part.row_map).to(device) * scale
            for piece, scale in ((block.keys, block.key_scale), (block.values, block.value_scale))
        )
        tail.append(keys, values)
    return tail
