"""Between tensors and raw little-endian bytes: keys, then values, each contiguous as `[rows, heads, tokens, size]`."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from ollm.contracts.kv import Extent, KVBlock
from ollm.errors import StoreContractError


@attrs.frozen
class LayerLayout:
    """What turns the raw bytes of one layer's extents back into tensors."""

    dtype: torch.dtype
    kv_heads: int
    key_size: int
    value_size: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> LayerLayout:
        """The layout of keys `[rows, kv_heads, tokens, key_size]` and values of the same rows, heads and tokens.

        Raises:
            StoreContractError: when the two do not belong together.
        """
        if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
            raise StoreContractError(
                f"Keys {tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} {values.dtype} do not belong "
                "together: a store takes [rows, kv_heads, tokens, size], both of one dtype."
            )
        return cls(keys.dtype, keys.shape[1], keys.shape[3], values.shape[3])

    @property
    def dtype_name(self) -> str:
        """`bfloat16`, `float32`, …: the name in manifests and record headers."""
        return str(self.dtype).removeprefix("torch.")

    def key_bytes(self, rows: int, tokens: int) -> int:
        """Bytes of the keys of so many tokens."""
        return rows * self.kv_heads * tokens * self.key_size * self.dtype.itemsize

    def nbytes(self, rows: int, tokens: int) -> int:
        """Bytes of keys and values of so many tokens."""
        return rows * self.kv_heads * tokens * (self.key_size + self.value_size) * self.dtype.itemsize


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


def unpack(layout: LayerLayout, extent: Extent, raw: Tensor) -> KVBlock:
    """Keys and values as views of raw bytes (uint8, as long as the extent)."""
    border = layout.key_bytes(extent.rows, extent.tokens)
    shape = (extent.rows, layout.kv_heads, extent.tokens)
    keys = raw[:border].view(layout.dtype).view(*shape, layout.key_size)
    values = raw[border:].view(layout.dtype).view(*shape, layout.value_size)
    return KVBlock(keys, values)
