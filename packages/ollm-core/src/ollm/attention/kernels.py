"""One tile of attention: its output and the log-sum-exp of its scores, so that tiles can be merged.

Heads are never repeated: queries come as `[rows, heads, queries, size]`, keys and values with `kv_heads` heads, and
head h belongs to key head h // (heads // kv_heads).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from ollm.attention.masks import Answer, Visible

Tile = tuple[Tensor, Tensor]
"""Output `[rows, heads, queries, value_size]` in the query's dtype or fp32, and log-sum-exp `[rows, heads, queries]`
in fp32, minus infinity where a query sees no key of the tile."""


class Settings(TypedDict):
    """What is done to the scores of a tile; see `attend_tile`."""

    scale: float
    softcap: float | None
    bias: Tensor | None


_FLASH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CUDA_FLASH_DTYPES = (torch.bfloat16, torch.float16)


def attend_tile(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Answer,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tile:
    """Attention of one tile.

    Args:
        query: `[rows, heads, queries, key_size]`.
        keys, values: `[rows, kv_heads, keys, key_size | value_size]`.
        visible: the mask's answer for this tile; never `Visible.NONE`.
        scale: of the scores.
        softcap: scores become `softcap * tanh(scores / softcap)`, before bias and mask (Gemma 2).
        bias: added to the scores, broadcastable to `[rows, heads, queries, keys]`.
    """
    kernel = _flash_kernel(query, keys, values) if softcap is None and bias is None else None
    if kernel is None:
        return _plain(query, keys, values, visible, scale=scale, softcap=softcap, bias=bias)
    return kernel(query, keys, values, visible, scale)


def _flash_kernel(query: Tensor, keys: Tensor, values: Tensor) -> Callable[..., Tile] | None:
    """The fused kernel for this device and dtype, if there is one that returns the log-sum-exp."""
    if keys.shape[-1] != values.shape[-1]:
        return None
    if query.device.type == "cpu" and query.dtype in _FLASH_DTYPES:
        return _cpu_flash
    size = keys.shape[-1]
    if query.device.type == "cuda" and query.dtype in _CUDA_FLASH_DTYPES and size <= 256 and size % 8 == 0:
        return _cuda_flash
    return None


def _cpu_flash(query: Tensor, keys: Tensor, values: Tensor, visible: Answer, scale: float) -> Tile:
    """torch's own CPU kernel. Few queries are packed, all heads of a group as rows of one: it then runs the keys once
    per group (measured: 4 times as fast for one query)."""
    rows, heads, queries, size = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    mask = None
    if isinstance(visible, Tensor):
        mask = torch.zeros((), dtype=query.dtype).expand(visible.shape).masked_fill(~visible, float("-inf"))
        while mask.dim() < 4:
            mask = mask[None]
    few = group > 1 and queries * group <= _PACKED_QUERIES
    packed = few and visible is not Visible.DIAGONAL and (mask is None or mask.shape[1] == 1)
    if packed:
        query = query.reshape(rows, kv_heads, group * queries, size)
        if mask is not None:
            mask = mask.repeat(1, 1, group, 1) if mask.shape[2] == queries else mask
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, visible is Visible.DIAGONAL, attn_mask=mask, scale=scale
    )
    if mask is not None:  # a query that sees nothing gets 0 from the kernel, which is the log-sum-exp of one key
        lse = lse.masked_fill((mask == float("-inf")).all(-1), float("-inf"))
    return out.reshape(rows, heads, queries, -1), lse.reshape(rows, heads, queries)


def _cuda_flash(query: Tensor, keys: Tensor, values: Tensor, visible: Answer, scale: float) -> Tile:
    """torch's FlashAttention-2 kernel for tiles that need no mask; others are computed plainly.

    Not run on a device yet: a trial with the model itself decides whether it is used at all (`seam.mode`).
    """
    if isinstance(visible, Tensor):
        return _plain(query, keys, values, visible, scale=scale, softcap=None, bias=None)
    rows, heads, queries, size = query.shape
    kv_heads = keys.shape[1]
    packed = visible is Visible.ALL and heads > kv_heads
    if packed:
        query = query.reshape(rows, kv_heads, heads // kv_heads * queries, size)
    elif heads > kv_heads:
        keys, values = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (keys, values))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, 0.0, visible is Visible.DIAGONAL, False, scale=scale
    )
    return out.reshape(rows, heads, queries, size), lse.reshape(rows, heads, queries)


_PACKED_QUERIES = 64


def _plain(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Answer,
    *,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
) -> Tile:
    """In fp32 with nothing but matrix products: for every device, dtype and case that has no kernel."""
    rows, heads, queries, _ = query.shape
    kv_heads = keys.shape[1]
    grouped = query.float().reshape(rows, kv_heads, (heads // kv_heads) * queries, -1)
    scores = torch.matmul(grouped, keys.float().transpose(-1, -2)).mul_(scale).view(rows, heads, queries, -1)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores = scores + bias.float()
    if visible is Visible.DIAGONAL:
        visible = torch.ones(queries, queries, dtype=torch.bool, device=query.device).tril()
    if isinstance(visible, Tensor):
        scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse.isfinite(), lse, 0.0)[..., None])
    out = torch.matmul(weights.view(rows, kv_heads, -1, weights.shape[-1]), values.float())
    return out.view(rows, heads, queries, -1), lse
