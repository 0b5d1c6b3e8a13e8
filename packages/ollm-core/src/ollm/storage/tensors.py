"""Between tensors and raw little-endian bytes.

Row after row and head after head: all keys of a head, then all of its values. So what belongs to one head is one run of
bytes, and so are the keys, or the values, of some of its tokens; and both are tensors where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ollm.contracts.blocks import Extent, KVBlock, KVLayout


def pack(block: KVBlock, into: Tensor | None = None) -> Tensor:
    """The bytes of a block: uint8, on its device.

    Args:
        block: of any strides.
        into: uint8, contiguous, where they go; by default a tensor of their own.
    """
    layout, (rows, _, tokens, _) = block.layout, block.keys.shape
    if into is None:
        into = torch.empty(layout.nbytes(rows, tokens), dtype=torch.uint8, device=block.keys.device)
    target = _views(layout, rows, tokens, into)
    target.keys.copy_(block.keys.detach())
    target.values.copy_(block.values.detach())
    return into


def unpack(extent: Extent, raw: Tensor) -> KVBlock:
    """Keys and values as views of the bytes (uint8) that `pack` made of them."""
    return _views(extent.layout, extent.key.rows, extent.key.tokens, raw)


def lay_out(payload: Sequence[Tensor], into: Tensor) -> None:
    """Copy tensors into raw bytes, one behind the other, each as its contiguous elements.

    Args:
        payload: of any dtype, shape and stride, on any device.
        into: uint8, as long as all of them.
    """
    at = 0
    for tensor in payload:
        target = into[at : at + tensor.nbytes]
        if (into.storage_offset() + at) % tensor.itemsize == 0:
            target.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        else:
            target.copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        at += tensor.nbytes


def head_spans(extent: Extent, head: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Where the bytes of tokens `start … stop - 1` of a KV head are, counted from the first token of the extent: for
    each row the keys, then the values."""
    layout, tokens, size = extent.layout, extent.key.tokens, extent.layout.dtype.itemsize
    for row in range(extent.key.rows):
        base = layout.nbytes(1, tokens) // layout.kv_heads * (row * layout.kv_heads + head)
        for width in (layout.key_size * size, layout.value_size * size):
            yield base + start * width, base + stop * width
            base += tokens * width


def _views(layout: KVLayout, rows: int, tokens: int, raw: Tensor) -> KVBlock:
    heads = raw.view(layout.dtype).view(rows, layout.kv_heads, tokens * (layout.key_size + layout.value_size))
    border = tokens * layout.key_size
    shape = (rows, layout.kv_heads, tokens)
    return KVBlock(
        heads[..., :border].view(*shape, layout.key_size), heads[..., border:].view(*shape, layout.value_size)
    )
