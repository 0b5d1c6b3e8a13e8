"""The block table: the one place that knows which tokens are where.

For each layer of each cache over one store it holds an ordered list of entries. Forks, crops, windows and reordered
batches are operations on these lists, and none of them moves or copies a byte. An extent that no list has any more is
freed once nobody reads it. Knows positions and rows; nothing of tensors' contents, of reading, or of how a store keeps
its bytes.
"""

from __future__ import annotations

import itertools
import weakref
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

    @property
    def rows(self) -> int:
        """Rows of the batch of today."""
        return self.extent.key.rows if self.row_map is None else len(self.row_map)


@attrs.frozen(eq=False)
class Entries:
    """What a layer holds at one moment, in order of position. Each change makes another one, so that whoever walks this
    goes on undisturbed, and whoever made something of it knows by its identity that it still holds."""

    items: tuple[Entry, ...] = ()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


@attrs.define(eq=False)
class Reader:
    """Somebody who walks lists: until it leaves, or is dropped, whatever any list had when it came stays where it is.
    One object is made, however many extents there are."""

    moment: int
    reading: bool = True

    def leave(self) -> None:
        """May be called twice, by any thread: it takes one step and frees nothing."""
        self.reading = False


@attrs.frozen
class Due:
    """What can be freed."""

    drops: int
    """How often a list dropped something."""
    free: tuple[Location, ...]
    """Where that is what no list has any more, each once."""
    shared: dict[Location, int]
    """How many lists have the rest of it still."""


class BlockTable:
    """The lists of all layers of a cache and its forks. Changed by one thread; readers may leave in any."""

    def __init__(self) -> None:
        self._lists: dict[Location, int] = {}  # how many have an extent, those that dropped it until that is settled
        self._dropped: deque[tuple[int, Location]] = deque()
        self._moment = 0  # counts what was dropped
        self._readers: list[weakref.ref[Reader]] = []
        self._numbers = itertools.count()
        self.branches: set[int] = set()
        """The numbers of the caches that share the store: the first one and its forks."""

    def join(self) -> int:
        """A cache more; its number, which none had before: `BlockKey.branch`."""
        branch = next(self._numbers)
        self.branches.add(branch)
        return branch

    def leave(self, branch: int) -> None:
        """A cache less, whose layers are empty by now. May be called twice."""
        self.branches.discard(branch)

    def pin(self) -> Reader:
        """A reader more."""
        reader = Reader(self._moment)
        self._readers.append(weakref.ref(reader))
        return reader

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """A reader until the end of the `with` block."""
        reader = self.pin()
        try:
            yield
        finally:
            reader.leave()

    def due(self) -> Due:
        """What was dropped and nobody reads any more."""
        readers = [reader for one in self._readers if (reader := one()) is not None and reader.reading]
        self._readers = [*map(weakref.ref, readers)]
        oldest = min((reader.moment for reader in readers), default=self._moment)
        due = [location for _, location in itertools.takewhile(lambda dropped: dropped[0] < oldest, self._dropped)]
        left = {location: self._lists.get(location, 0) - times for location, times in Counter(due).items()}
        free = tuple(location for location, lists in left.items() if lists <= 0)
        return Due(len(due), free, {location: lists for location, lists in left.items() if lists > 0})

    def settle(self, due: Due) -> None:
        """All of this is done with."""
        rest = deque(itertools.islice(self._dropped, due.drops, None))
        lists = {**self._lists, **due.shared} if due.shared else self._lists
        self._dropped, self._lists = rest, lists  # at once: an interrupt leaves neither without the other
        for location in due.free:
            self._lists.pop(location, None)  # else `add` sets it right

    def add(self, entries: Iterable[Entry]) -> None:
        """A list has these, which were just written."""
        self._lists.update({entry.extent.location: 1 for entry in entries})

    def share(self, entries: Iterable[Entry]) -> None:
        """One list more has these."""
        self._lists.update({location: self._lists.get(location, 0) + 1 for location in _locations(entries)})

    def discard(self, locations: Iterable[Location]) -> None:
        """These were written, and no list will have them."""
        self._dropped.extend([(self._moment, location) for location in locations])
        self._moment += 1

    def drop(self, entries: Iterable[Entry]) -> None:
        """One list less has these."""
        self.discard(_locations(entries))


def _locations(entries: Iterable[Entry]) -> list[Location]:
    return [entry.extent.location for entry in entries]


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
        self._before: tuple[Entries, int, int, int, int] | None = None
        self._set_aside: list[Entry] = []

    @property
    def shared_tokens(self) -> int:
        """Tokens whose extents another cache wrote."""
        return sum(entry.extent.visible for entry in self.entries if entry.extent.key.branch != self.branch)

    def append(self, extents: Sequence[Extent], *, instead_of_last: bool = False) -> None:
        """Add extents that were written with the rows of today, in the place of the last one if they hold its tokens
        too."""
        new, before = tuple(map(Entry, extents)), self.entries.items
        old = before[-1:] if instead_of_last else ()
        self._table.add(new)
        self.entries = Entries((*before[: len(before) - len(old)], *new))
        self.tokens = new[-1].stop
        self._drop(old)

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
        self._drop(dropped)
        if length == 0:
            self.first_kept = 0

    def evict(self, tokens: int, window: int, sinks: int) -> None:
        """Drop the extents of which no query sees anything that comes after `tokens` tokens."""
        border = tokens - window
        gone = [entry for entry in self.entries if sinks <= entry.start and entry.stop <= border]
        if not gone:
            return
        self.entries = Entries(tuple(entry for entry in self.entries if entry not in gone))
        self._drop(gone)
        self.evictions += 1
        self.evicted_tokens += sum(entry.extent.visible for entry in gone)
        self.first_kept = gone[-1].stop

    def rows_selected(self, index: Tensor) -> Entries:
        """What the layer would hold for the batch `batch[index]`: what it holds, if all rows stay. Entries
        with one map share the new one, too.

        Raises:
            IndexError: there is no such row.
        """
        if not self.entries:
            return self.entries
        rows = self.entries.items[0].rows
        if torch.equal(index, torch.arange(rows)):
            return self.entries
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < rows:
            raise IndexError(f"there are {rows} rows, and rows {index.tolist()} were asked for")
        maps: dict[int, Tensor] = {}
        selected = []
        for entry in self.entries.items:
            before = entry.row_map
            if id(before) not in maps:
                maps[id(before)] = index if before is None else before[index]
            selected.append(Entry(entry.extent, maps[id(before)]))
        return Entries(tuple(selected))

    def fork(self, branch: int) -> LayerTable:
        """The list of another cache that goes on from here."""
        fork = LayerTable(self._table, self.layer, branch)
        fork.entries, fork.tokens, fork.first_kept = self.entries, self.tokens, self.first_kept
        self._table.share(self.entries)
        return fork

    def begin(self) -> None:
        """From now on `undo` leads back to here, until `keep`: what the list has now is not freed if it leaves."""
        self.keep()
        self._before = self.entries, self.tokens, self.first_kept, self.evictions, self.evicted_tokens

    def keep(self) -> None:
        """What was done since `begin` stays. Does nothing without it."""
        aside, self._before, self._set_aside = self._set_aside, None, []
        if aside:
            self._table.drop(aside)

    def undo(self) -> None:
        """Back to `begin`. Does nothing without it; an interrupt costs space at most, and it can be called again."""
        if self._before is None:
            return
        was = self._locations_before()
        new = [entry for entry in self.entries if entry.extent.location not in was]
        self.entries, self.tokens, self.first_kept, self.evictions, self.evicted_tokens = self._before
        self._before, self._set_aside = None, []
        self._table.drop(new)

    def _drop(self, entries: Sequence[Entry]) -> None:
        """One list less has these, unless `undo` may want them back."""
        if entries and self._before is not None:
            was = self._locations_before()
            self._set_aside += [entry for entry in entries if entry.extent.location in was]
            entries = [entry for entry in entries if entry.extent.location not in was]
        self._table.drop(entries)

    def _locations_before(self) -> set[Location]:
        """A cut extent is where the whole one was."""
        assert self._before is not None
        return {entry.extent.location for entry in self._before[0]}

    def listed(self) -> KeptLayer:
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
