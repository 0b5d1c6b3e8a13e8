"""The block table: the one place that knows which tokens are where.

For each layer of each cache over one store it holds an ordered list of entries. Forks, crops, windows and reordered
batches are operations on these lists, and none of them moves or copies a byte. An extent that no list has any more is
freed once nobody reads it. Knows positions and rows; nothing of tensors' contents, of reading, or of how a store keeps
its bytes.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import attrs
import torch
from torch import Tensor

from ollm.contracts.blocks import Extent, Location
from ollm.storage.kept import KeptEntry, KeptLayer

RowMap = Tensor | None
"""Which row of an extent each row of the current batch stands for: int64 on the host, `None` for the identity. Beams,
repeats, selections and forks change the batch; what is stored stays as it was written and only the maps change."""


@attrs.frozen(eq=False)
class Entry:
    """An extent as one layer of one cache sees it."""

    extent: Extent
    row_map: RowMap = None

    @property
    def start(self) -> int:
        """Position of its first token."""
        return self.extent.start

    @property
    def stop(self) -> int:
        """Position after its last token."""
        return self.extent.stop


@attrs.frozen(eq=False)
class Entries:
    """What a layer holds at one moment, in order of position. Each change makes another one, so that whoever walks this
    goes on undisturbed, and whoever made something of it knows by its identity that it still holds."""

    items: tuple[Entry, ...] = ()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class BlockTable:
    """The lists of all layers of a cache and its forks. Changed by one thread; `pinned` may end in any."""

    def __init__(self) -> None:
        self._lists: Counter[Location] = Counter()  # how many have an extent
        self._dropped: deque[tuple[int, Location]] = deque()
        self._moment = 0  # counts what was dropped
        self._readers: dict[int, int] = {}  # the moment at which each began
        self._reader_numbers = itertools.count()
        self.branches: set[int] = set()
        """The numbers of the caches that share the store: the first one and its forks."""

    def join(self) -> int:
        """A cache more; its number, the smallest that none has: `BlockKey.branch`."""
        branch = next(number for number in itertools.count() if number not in self.branches)
        self.branches.add(branch)
        return branch

    def leave(self, branch: int) -> None:
        """A cache less, whose layers are empty by now."""
        self.branches.discard(branch)

    def pin(self) -> int:
        """A reader more: whatever any list has now stays where it is until `unpin`. One number is given, however many
        extents there are."""
        number = next(self._reader_numbers)
        self._readers[number] = self._moment
        return number

    def unpin(self, reader: int) -> None:
        """A reader less. May be called twice, by any thread, and by the garbage collector in the midst of anything:
        it takes one step and frees nothing."""
        self._readers.pop(reader, None)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Pin until the end of the `with` block."""
        reader = self.pin()
        try:
            yield
        finally:
            self.unpin(reader)

    def take_unread(self) -> list[Location]:
        """Where dropped extents are that nobody reads any more, each once."""
        unread: list[Location] = []
        if self._dropped:
            oldest = min(list(self._readers.values()), default=self._moment)
            while self._dropped and self._dropped[0][0] < oldest:
                unread.append(self._dropped.popleft()[1])
        return unread

    def share(self, entries: Iterable[Entry]) -> None:
        """One list more has these."""
        self._lists.update(entry.extent.location for entry in entries)

    def discard(self, locations: Iterable[Location]) -> None:
        """These were written, and no list will have them."""
        self._dropped.extend((self._moment, location) for location in locations)
        self._moment += 1

    def drop(self, entries: Iterable[Entry]) -> None:
        """One list less has these."""
        for entry in entries:
            location = entry.extent.location
            self._lists[location] -= 1
            if not self._lists[location]:
                del self._lists[location]
                self._dropped.append((self._moment, location))
        self._moment += 1


class LayerTable:
    """The list of one layer of one cache."""

    def __init__(self, table: BlockTable, layer: int, branch: int) -> None:
        """Empty."""
        self.layer, self.branch = layer, branch
        self.entries = Entries()
        self.tokens = 0
        """Position after the last stored token; counted, not read off what is left."""
        self.first_kept = 0
        """Tokens before this left the window, but for sinks."""
        self.evictions = self.evicted_tokens = 0
        """How often tokens left the window, and how many."""
        self._table = table

    @property
    def shared_tokens(self) -> int:
        """Tokens whose extents another cache wrote."""
        return sum(entry.extent.visible for entry in self.entries if entry.extent.key.branch != self.branch)

    def append(self, extents: Sequence[Extent], *, instead_of_last: bool = False) -> None:
        """Add extents that were written with the rows of today, in the place of the last one if they hold its tokens
        too."""
        new, before = tuple(map(Entry, extents)), self.entries.items
        old = before[-1:] if instead_of_last else ()
        self._table.share(new)
        self.entries = Entries((*before[: len(before) - len(old)], *new))
        self.tokens = new[-1].stop
        self._table.drop(old)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens, at most as many as are stored."""
        if length >= self.tokens:
            return
        kept = [entry for entry in self.entries if entry.start < length]
        dropped = self.entries.items[len(kept) :]
        if kept and kept[-1].stop > length:
            last = kept[-1]
            kept[-1] = attrs.evolve(last, extent=attrs.evolve(last.extent, visible=length - last.start))
        self.entries, self.tokens = Entries(tuple(kept)), length
        self._table.drop(dropped)
        if length == 0:
            self.first_kept = 0

    def evict(self, tokens: int, window: int, sinks: int) -> None:
        """Drop the extents of which no query sees anything that comes after `tokens` tokens."""
        border = tokens - window
        gone = [entry for entry in self.entries if sinks <= entry.start and entry.stop <= border]
        if not gone:
            return
        self.entries = Entries(tuple(entry for entry in self.entries if entry not in gone))
        self._table.drop(gone)
        self.evictions += 1
        self.evicted_tokens += sum(entry.extent.visible for entry in gone)
        self.first_kept = gone[-1].stop

    def rows_selected(self, index: Tensor) -> Entries:
        """What the layer would hold for the batch `batch[index]`. Entries with one map share the new one, too.

        Raises:
            IndexError: there is no such row.
        """
        maps: dict[int, Tensor] = {}
        for entry in self.entries:
            if id(entry.row_map) not in maps:
                maps[id(entry.row_map)] = index if entry.row_map is None else entry.row_map[index]
        return Entries(tuple(attrs.evolve(entry, row_map=maps[id(entry.row_map)]) for entry in self.entries))

    def fork(self, branch: int) -> LayerTable:
        """The list of another cache that goes on from here."""
        fork = LayerTable(self._table, self.layer, branch)
        fork.entries, fork.tokens, fork.first_kept = self.entries, self.tokens, self.first_kept
        self._table.share(self.entries)
        return fork

    def kept(self) -> KeptLayer:
        """What a commit lists of this layer, for `adopt`."""
        entries = tuple(KeptEntry(entry.extent, _plain(entry.row_map)) for entry in self.entries)
        return KeptLayer(self.layer, entries, self.tokens, self.first_kept)

    def adopt(self, kept: KeptLayer) -> None:
        """Begin with what an earlier cache held. Only while empty."""
        maps: dict[tuple[int, ...] | None, RowMap] = {None: None}  # entries with one map share it
        for entry in kept.entries:
            if entry.row_map is not None and entry.row_map not in maps:
                maps[entry.row_map] = torch.tensor(entry.row_map)
        entries = tuple(Entry(entry.extent, maps[entry.row_map]) for entry in kept.entries)
        self._table.share(entries)
        self.entries, self.tokens, self.first_kept = Entries(entries), kept.tokens, kept.first_kept


def _plain(row_map: RowMap) -> tuple[int, ...] | None:
    return None if row_map is None else tuple(row_map.tolist())


def take(tensor: Tensor, row_map: RowMap) -> Tensor:
    """The rows of today out of a stored tensor; the tensor itself for the identity."""
    return tensor if row_map is None else tensor.index_select(0, row_map.to(tensor.device))
