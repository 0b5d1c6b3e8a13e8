"""`SegmentedStore`: what every store over a storage of records has in common. A subclass says where records go.

Knows nothing of bytes on disk, which are the storage's, nor of which tokens are where, or when something is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

from torch import Tensor

from ollm.contracts.blocks import BlockKey, Extent, KVBlock, KVLayout, Location
from ollm.contracts.kv import KVStore
from ollm.contracts.storage import Storage
from ollm.storage.tensors import unpack


class SegmentedStore(KVStore):
    """A store that keeps keys and values as they are, or as its `encode` and `decode` make them."""

    storage: Storage

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._numbers: dict[Hashable, int] = {}  # of files that hold something

    def file(self, key: BlockKey, layout: KVLayout) -> Hashable:
        """Which records share a file: those for which this is equal. By default those of one layer and branch, so that
        what a fork wrote goes with it. Depends on nothing but its arguments."""
        return key.layer, key.branch

    def place(self, key: BlockKey, layout: KVLayout) -> tuple[int, int | None]:
        """Where the next record goes: the number of a file, by default that of `file`, and the byte in it where the
        record begins, or `None` for behind all others. Changes nothing: `placed` is called once the record is there.

        That byte is a multiple of 4096 and may lie behind the end of the file. A record takes
        `storage.record_bytes(payload_bytes)` bytes; its payload, which `Location.offset` names, begins 4096 bytes
        later. A store that reckons with places sets `extent_tokens`, and a record then takes at most
        `storage.record_bytes(layout.nbytes(rows, extent_tokens))`.
        """
        return self.number(self.file(key, layout)), None

    def placed(self, extent: Extent) -> None:
        """A record went where `place` said, or is where an earlier store put it. Default: nothing. If this fails, the
        record is given to `free`."""

    def encode(self, block: KVBlock) -> Sequence[Tensor] | None:
        """The tensors that are written in place of a block, one behind the other; `None`, the default, to keep it as it
        is. A store that overrides this also overrides `decode`."""
        return None

    def number(self, file: Hashable) -> int:
        """The number of a file that is called so: a free one, if nothing is in it yet."""
        if file in self._numbers:
            return self._numbers[file]
        taken = set(self._numbers.values())
        return next(number for number in itertools.count() if number not in taken)

    def write(self, block: KVBlock, key: BlockKey) -> Location:
        layout = block.layout
        encoded = self.encode(block)
        segment, at = self.place(key, layout)
        location: Location | None = None
        try:
            location = self.storage.write(block, key, segment=segment, at=at, encoded=encoded)
            self._note(Extent.of(key, layout, location))
            return location
        except BaseException:
            if location is not None:
                self.free([location])
            raise

    def decode(self, extent: Extent, raw: Tensor, out: KVBlock | None) -> KVBlock:
        return unpack(extent, raw)

    def free(self, locations: Sequence[Location]) -> None:
        """Give their bytes back to the storage. Whoever overrides this calls it, too. Called, as every method but
        `decode`, on the thread that writes."""
        self.storage.free(locations)
        self._numbers = {file: number for file, number in self._numbers.items() if self.storage.holds(number)}

    def adopt(self, extents: Sequence[Extent]) -> None:
        self.storage.adopt(extents)
        for extent in extents:
            self._note(extent)

    def _note(self, extent: Extent) -> None:
        self._numbers[self.file(extent.key, extent.layout)] = extent.location.segment
        self.placed(extent)
