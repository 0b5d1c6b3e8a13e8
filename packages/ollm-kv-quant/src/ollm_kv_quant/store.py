"""`quantized-cold-tier`: a journal per layer of records that hold scales and codes.

An extent is quantised once, when it leaves the tail. A crop that cuts an extent in two leaves its record as it is, and
decodes less of it; nothing is ever quantised again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from ollm.plugin import Extent, KVBlock, LayerLayout, SegmentedStorage, SegmentedStore, StoreStats
from ollm_kv_quant.codecs import Codec


class QuantizedStore(SegmentedStore):
    """Segment number = layer number. The payload of a record: the keys' scales and codes, then the values'."""

    trims = True

    def __init__(self, storage: SegmentedStorage, codec: Codec) -> None:
        super().__init__(storage)
        self._codec = codec
        self._uses: Counter[tuple[int, int]] = Counter()  # extents, dropped ones included, of a record

    def place(self, layer: int, layout: LayerLayout, rows: int) -> tuple[int, int | None]:
        return layer, None

    def placed(self, extent: Extent) -> None:
        self._uses[_record(extent)] += 1

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Sequence[Tensor], str]:
        return [*self._codec.encode(keys), *self._codec.encode(values)], "opaque"

    def decode(self, extent: Extent, raw: Tensor, out: KVBlock | None) -> KVBlock:
        layout = self.layout(extent.layer)
        tokens = self._tokens(extent, layout)
        shape = (extent.rows, layout.kv_heads, tokens)
        if out is None:
            out = _empty(extent, layout, raw.device)
        border = self._codec.nbytes((*shape, layout.key_size))
        key_scale = self._codec.decode(raw[:border], (*shape, layout.key_size), out.keys)
        value_scale = self._codec.decode(raw[border:], (*shape, layout.value_size), out.values)
        return KVBlock(out.keys, out.values, key_scale, value_scale)

    def truncate(self, layer: int, length: int) -> None:
        cut = next((extent for extent in self.extents(layer) if extent.start < length < extent.stop), None)
        super().truncate(layer, length)
        if cut is not None:
            self._extents[layer] += (attrs.evolve(cut, tokens=length - cut.start),)
            self._uses[_record(cut)] += 1

    def release(self, extents: Sequence[Extent]) -> None:
        unused = []
        for extent in extents:
            self._uses[_record(extent)] -= 1
            if not self._uses[_record(extent)]:
                del self._uses[_record(extent)]
                unused.append(extent)
        super().release(unused)

    def stats(self) -> StoreStats:
        return attrs.evolve(super().stats(), representation=self._codec.name)

    def _tokens(self, extent: Extent, layout: LayerLayout) -> int:
        """How many tokens the record holds: more than the extent, if that was cut."""

        def nbytes(tokens: int) -> int:
            shape = (extent.rows, layout.kv_heads, tokens)
            return sum(self._codec.nbytes((*shape, size)) for size in (layout.key_size, layout.value_size))

        return (extent.nbytes - nbytes(0)) // (nbytes(1) - nbytes(0))


def _record(extent: Extent) -> tuple[int, int]:
    return extent.segment, extent.offset


def _empty(extent: Extent, layout: LayerLayout, device: torch.device) -> KVBlock:
    shape = (extent.rows, layout.kv_heads, extent.tokens)
    keys, values = (
        torch.empty(*shape, size, dtype=layout.dtype, device=device) for size in (layout.key_size, layout.value_size)
    )
    return KVBlock(keys, values)
