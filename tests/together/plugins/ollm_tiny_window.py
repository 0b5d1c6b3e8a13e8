"""A windowed store, as a third party would write it: blocks in memory, dropped when core says so."""

import itertools

from ollm.plugin import KVStore, Location, pack, unpack


class TinyWindowStore(KVStore):
    """Raw bytes in a dict; every block has a number of its own."""

    def __init__(self, window, sinks):
        self.window, self.sinks = window, sinks
        self._raw, self._numbers = {}, itertools.count()

    def write(self, block, key):
        raw = pack(block)
        location = Location(raw.numel(), offset=next(self._numbers))
        self._raw[location] = raw
        return location

    def read(self, extent):
        return self._raw[extent.location]

    def decode(self, extent, raw, out):
        return unpack(extent, raw)

    def free(self, locations):
        for location in locations:
            del self._raw[location]
