"""Blockwise attention as transformers calls it: an attention function and a mask function, registered by name.

A config that names it also knows which attention it had. What does not belong to a pass with a block-mode cache of ours
(any other cache, or none, in this thread or another) gets masks and attention from there, as if nothing had been
exchanged; and a copy of the config has its own attention again. Within such a pass, what is no `KVHandle` (sliding
layers, 4-D masks) is computed here, and equals stock attention. Registered when the first block-mode cache is made,
never at import.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    TransformGetItemToIndex,
    _vmap_expansion_sdpa,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ollm.attention.blockwise import Block, Scores, blockwise_attention
from ollm.attention.masks import MaskFunction, TileMask
from ollm.errors import BlockModeError
from ollm.kv.handle import KVHandle
from ollm.seam.gradients import refuse_gradient

NAME = "ollm_blockwise"

_NO_GRADIENTS = (
    "Blockwise attention has no dropout and no gradients: call model.eval(), run the model under torch.no_grad(), or "
    "leave the cache out."
)

_in_blocks: ContextVar[bool] = ContextVar("ollm_in_blocks", default=False)


class Exchanged(str):
    """`NAME`, in a config that named another attention before. In copies and pickles of the config it is that other
    name: nothing was exchanged there."""

    __slots__ = ("stock",)
    stock: str | None

    def __new__(cls, before: str | None) -> Self:
        self = super().__new__(cls, NAME)
        self.stock = stock_name(before)
        return self

    def __reduce__(self) -> tuple[Callable[[str | None], str | None], tuple[str | None]]:
        return stock_name, (self.stock,)


def stock_name(name: str | None) -> str | None:
    """The attention that a config names, or named before it was exchanged."""
    return name.stock if isinstance(name, Exchanged) else name


@contextmanager
def in_blocks(used: bool) -> Iterator[None]:
    """What this thread computes until the end of the `with` block uses a block-mode cache, or does not."""
    token = _in_blocks.set(used)
    try:
        yield
    finally:
        _in_blocks.reset(token)


def register() -> None:
    """Make the name known to transformers; doing so again changes nothing."""
    AttentionInterface.register(NAME, block_attention)
    AttentionMaskInterface.register(NAME, tile_mask)


def tile_mask(**arguments: Any) -> Any:
    """The mask for a pass with a block-mode cache; for any other, the one of the attention that was exchanged."""
    stock = None if _in_blocks.get() else _exchanged(arguments.get("config"))
    if stock is None:
        return _tile_mask(**arguments)
    # without a mask function an attention gets no mask, says transformers
    return ALL_MASK_ATTENTION_FUNCTIONS[stock](**arguments) if stock in ALL_MASK_ATTENTION_FUNCTIONS else None


def block_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | KVHandle,
    value: Tensor | KVHandle,
    attention_mask: TileMask | Tensor | None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention output `[rows, queries, heads, size]`; arguments as transformers' attention functions take them."""
    if not isinstance(key, KVHandle) and not isinstance(attention_mask, TileMask):
        stock = _stock_attention(module)
        if stock is not None:
            found: tuple[Tensor, Tensor | None] = stock(module, query, key, value, attention_mask, **settings)
            return found
    output = _block_attention(module, query, key, value, attention_mask, **settings)
    return refuse_gradient(output, query, BlockModeError(_NO_GRADIENTS)), None


def _exchanged(config: Any) -> str | None:
    """The name of the attention that stands behind ours in a config; `None` where there is none."""
    name = stock_name(getattr(config, "_attn_implementation", None))
    return None if name == NAME else name


def _stock_attention(module: torch.nn.Module) -> Callable[..., Any] | None:
    name = _exchanged(getattr(module, "config", None))
    if name is None:
        return None
    # each model file has an eager attention of its own, which no registry knows
    own = getattr(inspect.unwrap(type(module).forward), "__globals__", {}).get("eager_attention_forward")
    found: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get(name, own if name == "eager" else None)
    return found


def _tile_mask(
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
    """The mask object that is evaluated tile by tile; transformers passes it through the layers."""
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
def _block_attention(
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
) -> Tensor:
    if dropout or (module.training and query.requires_grad):
        raise BlockModeError(_NO_GRADIENTS)
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
        return blockwise_attention(query, blocks, mask, scores).transpose(1, 2).contiguous()


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
