"""What a commit lists: for each layer of one cache, which extents it has, and which tokens are gone. Records, and what
must hold of them.

Knows positions, rows and places; not the bytes of a manifest, and nothing of tables that change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import attrs

from ollm.contracts.blocks import Extent
from ollm.errors import CorruptDataError
from ollm.storage.records import record_span


@attrs.frozen
class KeptEntry:
    """An extent as one layer of a cache sees it."""

    extent: Extent
    row_map: tuple[int, ...] | None = None
    """Which row of the extent each row of the batch stands for; `None` for the identity."""

    @property
    def batch_rows(self) -> int:
        """Rows of the batch."""
        return self.extent.key.rows if self.row_map is None else len(self.row_map)


@attrs.frozen
class KeptLayer:
    """What one layer of a cache holds in its store."""

    layer: int
    entries: tuple[KeptEntry, ...]
    """In order of position."""
    tokens: int
    """Position after the last token; counted, for those at the end may have left a window."""
    first_kept: int = 0
    """Tokens before this may be missing: they left a window."""

    @classmethod
    def of(cls, extents: Sequence[Extent]) -> KeptLayer:
        """A layer that nothing is missing of and whose batch is still that of its extents, of which it has some."""
        return cls(extents[0].key.layer, tuple(map(KeptEntry, extents)), extents[-1].stop)


def extents_of(layers: Iterable[KeptLayer]) -> list[Extent]:
    """All that they list, layer after layer."""
    return [entry.extent for layer in layers for entry in layer.entries]


def check_layers(layers: Sequence[KeptLayer]) -> None:
    """Whether these can be the layers of one cache.

    Raises:
        CorruptDataError: records lie over each other, or tokens are missing that left no window.
    """
    for before, after in itertools.pairwise(layers):
        expect(before.layer < after.layer, "layers are not in order")
    for layer in layers:
        _check_positions(layer)
    entries = [entry for layer in layers for entry in layer.entries]
    for entry in entries:
        rows = entry.extent.key.rows
        expect(entry.row_map is None or all(0 <= row < rows for row in entry.row_map), "a row map names no row")
    expect(len({entry.batch_rows for entry in entries}) <= 1, "extents are of batches of different numbers of rows")
    ends: dict[int, int] = {}
    places = [entry.extent.location for entry in entries]
    for location in sorted(places, key=lambda location: (location.segment, location.offset)):
        begin, end = record_span(location)
        expect(begin >= ends.get(location.segment, 0), "records overlap")
        ends[location.segment] = end


def _check_positions(layer: KeptLayer) -> None:
    """Every token up to `tokens` is there, but for those before `first_kept`."""
    at = 0
    for entry in layer.entries:
        extent = entry.extent
        expect(extent.key.layer == layer.layer, "an extent is listed in another layer than its own")
        expect(0 < extent.visible <= extent.key.tokens, f"{extent.visible} of {extent.key.tokens} tokens are visible")
        _check_gap(layer, at, extent.start)
        at = extent.stop
    _check_gap(layer, at, layer.tokens)
    expect(layer.first_kept <= layer.tokens, "more tokens left the window than there were")


def _check_gap(layer: KeptLayer, start: int, stop: int) -> None:
    expect(start <= stop, "records of a layer are not in order, or go on behind its tokens")
    expect(start == stop or stop <= layer.first_kept, "records of a layer leave a gap")


def expect(condition: object, problem: str) -> None:
    """What must be true of a manifest.

    Raises:
        CorruptDataError: it is not; with the problem.
    """
    if not condition:
        raise CorruptDataError(f"manifest: {problem}")
