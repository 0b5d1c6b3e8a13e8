"""In which order the entries of a layer reach attention, and what of them must be read: worked out once, until entries
or residency change, so that a step costs no more Python with many extents than with few.

Knows tiers and places; reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import attrs

from ollm.attention.blockwise import Block
from ollm.kv.encoded import EncodedResidency
from ollm.kv.reader import Run
from ollm.kv.residency import Piece, Residency
from ollm.kv.table import Entries, Entry
from ollm.storage.options import BUFFER_BYTES
from ollm.storage.records import record_span

_LEAST_SLICE_BYTES = 8 * 2**20


@attrs.frozen(eq=False)
class Route:
    """What is done with the entries of one layer."""

    resident: tuple[Block, ...]
    """In memory, neighbours joined; in slices, where something else must be read meanwhile."""
    encoded: tuple[Entry, ...]
    """In memory as they are stored."""
    cut: tuple[Entry, ...]
    """Less than half of these is visible: only that is read."""
    cold: tuple[tuple[Entry, ...], ...]
    """The others, in runs that are read at once."""
    runs: tuple[Run, ...]
    """The extents of `cold`."""


class RoutePlanner:
    """Makes routes and remembers them."""

    def __init__(self, tiers: Sequence[Residency], encoded: EncodedResidency, *, in_files: bool) -> None:
        """For what is resident in these; `in_files`: whether what is cold lies in the files of a storage."""
        self._tiers = tiers
        self._encoded = encoded
        self._in_files = in_files
        self._routes: WeakKeyDictionary[Entries, Route] = WeakKeyDictionary()
        self._version = 0

    def route(self, entries: Entries) -> Route:
        """The route of what a layer holds."""
        version = self._encoded.version + sum(tier.version for tier in self._tiers)
        if version != self._version:  # all of them: they hold memory that may not be resident any more
            self._routes.clear()
            self._version = version
        known = self._routes.get(entries)
        if known is None:
            known = self._routes[entries] = self._made(entries)
        return known

    def clear(self) -> None:
        """Forget all routes, and with them the memory that they refer to."""
        self._routes.clear()

    def _made(self, entries: Entries) -> Route:
        joined: list[tuple[Piece, Entry, int]] = []  # a piece, the first entry in it, and where the last one ends
        encoded: list[Entry] = []
        cut: list[Entry] = []
        cold: list[Entry] = []
        for entry in entries:
            piece = next((piece for tier in self._tiers if (piece := tier.home(entry.extent))), None)
            if piece is None:
                location = entry.extent.location
                if self._encoded.holds(entry.extent):
                    encoded.append(entry)
                elif self._in_files and not location.encoded and 2 * entry.extent.visible < entry.extent.key.tokens:
                    cut.append(entry)
                else:
                    cold.append(entry)
            elif joined and joined[-1][0] is piece and _goes_on(joined[-1], entry):
                joined[-1] = (piece, joined[-1][1], entry.stop)
            else:
                joined.append((piece, entry, entry.stop))
        runs = tuple(self._runs(cold))
        resident = [_block(piece, first, stop) for piece, first, stop in joined]
        if runs or cut:
            resident = [part for block in resident for part in _slices(block, resident, len(runs) + len(cut))]
        extents = tuple(tuple(entry.extent for entry in run) for run in runs)
        return Route(tuple(resident), tuple(encoded), tuple(cut), runs, extents)

    def _runs(self, cold: Sequence[Entry]) -> Iterator[tuple[Entry, ...]]:
        """Neighbours in a file together, as far as one read goes."""
        run: list[Entry] = []
        begin = end = 0
        for entry in cold:
            location = entry.extent.location
            start, stop = record_span(location)
            together = run and location.segment == run[-1].extent.location.segment and start == end
            if not (self._in_files and together and stop - begin <= BUFFER_BYTES):
                if run:
                    yield tuple(run)
                run, begin = [], start
            run.append(entry)
            end = stop
        if run:
            yield tuple(run)


def _goes_on(joined: tuple[Piece, Entry, int], entry: Entry) -> bool:
    _, first, stop = joined
    return entry.start == stop and entry.row_map is first.row_map


def _block(piece: Piece, first: Entry, stop: int) -> Block:
    block = piece.view(first.start, stop)
    return Block(first.start, block.keys, block.values, first.row_map)


def _slices(block: Block, resident: Sequence[Block], gaps: int) -> Iterator[Block]:
    """A resident block as several, so that there is about one for every gap between reads: while attention computes
    with a large one, all buffers would fill up and the disk would stand still."""
    tokens = block.keys.shape[2]
    in_all = sum(other.keys.shape[2] for other in resident)
    per_token = (block.keys.nbytes + block.values.nbytes) // tokens
    size = max(-(-in_all // (gaps + 1)), _LEAST_SLICE_BYTES // per_token, 1)
    for start in range(0, tokens, size):
        span = slice(start, min(start + size, tokens))
        yield Block(block.start + start, block.keys[:, :, span], block.values[:, :, span], block.row_map)
