"""Blockwise attention as transformers calls it: an attention function and a mask function, registered by name.

Takes `KVHandle`s, plain tensors (sliding layers, vision towers, any other cache) and 4-D masks, and equals stock
attention in each case. Registered when the first block-mode cache is made, never at import.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    TransformGetItemToIndex,
    _vmap_expansion_sdpa,
    causal_mask_function,
)

from ollm.attention.blockwise import Block, Scores, blockwise_attention
from ollm.attention.masks import MaskFunction, TileMask
from ollm.errors import BlockModeError
from ollm.kv.handle import KVHandle

NAME = "ollm_blockwise"


def register() -> None:
    """Make the name known to transformers; doing so again changes nothing."""
    AttentionInterface.register(NAME, block_attention)
    AttentionMaskInterface.register(NAME, tile_mask)


def tile_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> TileMask:
    """The mask object that `block_attention` evaluates tile by tile; transformers passes it through the layers."""
    function: MaskFunction | None = None if mask_function is causal_mask_function else mask_function
    padding = attention_mask
    if padding is not None:
        missing = kv_length + kv_offset - padding.shape[-1]
        padding = torch.nn.functional.pad(padding.to(torch.bool), (0, max(missing, 0)))
        if bool(padding.all()):
            padding = None
    return TileMask(
        rows=batch_size,
        queries=q_length,
        query_offset=int(q_offset),
        keys=kv_length,
        key_offset=int(kv_offset),
        function=_mapped(mask_function) if use_vmap else function,
        padding=padding,
        device=torch.device(device),
    )


@torch.no_grad()
def block_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | KVHandle,
    value: Tensor | KVHandle,
    attention_mask: TileMask | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention output `[rows, queries, heads, size]`; arguments as transformers' attention functions take them."""
    if dropout or (module.training and query.requires_grad):
        raise BlockModeError(
            "Blockwise attention has no dropout and no gradients: call model.eval() or close the cache."
        )
    keys = key.tokens if isinstance(key, KVHandle) else key.shape[2]
    mask, bias = _as_tile_mask(module, query, keys, attention_mask, is_causal)
    if isinstance(key, KVHandle) and key.window is not None:
        mask = mask.windowed(key.window, key.sinks)
    start = 0
    blocks: Generator[Block, None, None]
    if isinstance(key, KVHandle):
        blocks = key.blocks(query)
    else:
        start = mask.first_key(keys)
        blocks = (block for block in [Block(start, key, cast(Tensor, value))])
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    scores = Scores(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        bias=bias,
        bias_start=start,
        sinks=s_aux,
    )
    with closing(blocks):  # after an error nothing is left half-way
        return blockwise_attention(query, blocks, mask, scores).transpose(1, 2).contiguous(), None


def _as_tile_mask(
    module: torch.nn.Module, query: Tensor, keys: int, mask: TileMask | Tensor | None, is_causal: bool | None
) -> tuple[TileMask, Tensor | None]:
    """Whatever stands for a mask as a `TileMask`, with what must be added to the scores."""
    if isinstance(mask, TileMask):
        return mask, None
    rows, queries = query.shape[0], query.shape[2]
    causal = mask is None and queries > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    function: MaskFunction | None = None if causal else _everything
    if mask is not None and mask.dtype == torch.bool:
        function = _looked_up(mask)
    # without a mask, the newest query belongs to the newest key; rows of a mask tensor count from 0
    tiles = TileMask(
        rows=rows, queries=queries, query_offset=keys - queries if causal else 0,
        keys=keys, key_offset=0, function=function, padding=None, device=query.device,
    )  # fmt: skip
    return tiles, mask if mask is not None and mask.dtype != torch.bool else None


def _everything(rows: Tensor, heads: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=keys.device)


def _looked_up(mask: Tensor) -> MaskFunction:
    return lambda rows, heads, queries, keys: mask[:, :, queries.flatten()[:, None], keys.flatten()]


def _mapped(function: Callable[..., Any]) -> MaskFunction:
    """A mask function of scalars, over index tensors."""

    def mapped(rows: Tensor, heads: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        with TransformGetItemToIndex():
            tile: Tensor = _vmap_expansion_sdpa(function)(
                rows.flatten(), heads.flatten(), queries.flatten(), keys.flatten()
            )
        return tile

    return mapped
