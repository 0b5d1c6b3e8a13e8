"""A windowed store, as a third party would write it: chunks in memory, dropped when core says so."""

import itertools

import torch

from ollm.plugin import Extent, KVStore, LayerLayout, unpack


class TinyWindowStore(KVStore):
    """Raw bytes in a dict; every extent has a number of its own."""

    def __init__(self, window, sinks):
        self.window, self.sinks = window, sinks
        self._extents, self._layouts, self._raw, self._serial = {}, {}, {}, itertools.count()

    def append(self, layer, keys, values):
        before = self.extents(layer)
        raw = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in (keys, values)])
        start = before[-1].stop if before else 0
        extent = Extent(layer, start, keys.shape[2], keys.shape[0], raw.numel(), offset=next(self._serial))
        self._raw[extent], self._layouts[layer] = raw, LayerLayout.of(keys, values)
        self._extents[layer] = (*before, extent)

    def extents(self, layer):
        return self._extents.get(layer, ())

    def read(self, extent):
        return self._raw[extent]

    def decode(self, extent, raw, out):
        return unpack(self._layouts[extent.layer], extent, raw)

    def truncate(self, layer, length):
        self._extents[layer] = tuple(extent for extent in self.extents(layer) if extent.stop <= length)

    def evict(self, layer, extents):
        self._extents[layer] = tuple(extent for extent in self.extents(layer) if extent not in extents)

    def release(self, extents):
        for extent in extents:
            del self._raw[extent]
