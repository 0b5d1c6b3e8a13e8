"""`quantized-cold-tier`: a journal per layer of records that hold scales and codes.

An extent is quantised once, when it leaves the tail. A crop that cuts one in two leaves its record as it is, as with
any store; nothing is ever quantised again.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from torch import Tensor

from ollm.plugin import Extent, KVBlock, SegmentedStore, Storage, StoreStats
from ollm_kv_quant.codecs import Codec


class QuantizedStore(SegmentedStore):
    """A record goes behind the last one of its layer and branch: the keys' scales and codes, then the values'."""

    def __init__(self, storage: Storage, codec: Codec) -> None:
        super().__init__(storage)
        self._codec = codec

    def encode(self, block: KVBlock) -> Sequence[Tensor]:
        return [*self._codec.encode(block.keys), *self._codec.encode(block.values)]

    def decode(self, extent: Extent, raw: Tensor, out: KVBlock | None) -> KVBlock:
        out = out or KVBlock.empty(extent.layout, extent.key.rows, extent.key.tokens, device=raw.device)
        border = self._codec.nbytes(out.keys.shape)
        key_scale = self._codec.decode(raw[:border], out.keys)
        value_scale = self._codec.decode(raw[border:], out.values)
        return KVBlock(out.keys, out.values, key_scale, value_scale)

    def stats(self) -> StoreStats:
        return attrs.evolve(super().stats(), representation=self._codec.name)
