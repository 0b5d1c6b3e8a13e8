"""The manifest: the block table of one cache folder written down, as JSON, whole, and read with suspicion.

It names files by number, never by path. Reading checks everything before anything is allocated: a closed set of keys,
bounded counts, lengths that add up.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch

from ollm.contracts.blocks import BlockKey, Extent, KVLayout, Location
from ollm.errors import CorruptDataError
from ollm.io import strict_json
from ollm.io.buffers import ALIGNMENT
from ollm.storage.folder import MOST_SEGMENTS
from ollm.storage.records import DTYPE_CODES, STORE_ID_BYTES, record_span

FORMAT = "ollm-kv"
FORMAT_VERSION = 2
MAX_MANIFEST_BYTES = 64 * 2**20
_LARGEST = 2**62


@attrs.frozen
class Committed:
    """A record that a commit lists."""

    extent: Extent
    checksum: int
    """Of its header, which holds the hashes of its payload."""


@attrs.frozen(kw_only=True)
class Manifest:
    """All that a reader must know of a cache folder. `sequence_axis` is the token axis of keys and values."""

    lifecycle: str
    store_id: str
    strategy: str
    parameters: dict[str, Any] = attrs.field(factory=dict)
    sequence_axis: int = 2
    tokens: int = 0
    """Positions that the table covers."""
    records: tuple[Committed, ...] = ()
    """The table: layer after layer, in order of position."""

    def to_json(self, *, compact_from: int = 1) -> bytes:
        """Canonical JSON: sorted keys, no spaces, ASCII.

        Args:
            compact_from: how many rows a layer of a branch has before those that are contiguous become one.

        Raises:
            CorruptDataError: no manifest of this version says so.
        """
        _check_table(self.records, self.tokens)
        layouts = list(dict.fromkeys(one.extent.layout for one in self.records))
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in _PLAIN},
            "layouts": [_layout_json(layout) for layout in layouts],
            "table": [row.to_json(layouts) for row in _rows(self.records, compact_from)[0]],
        }
        raw = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
        _expect(len(raw) <= MAX_MANIFEST_BYTES, f"larger than {MAX_MANIFEST_BYTES} bytes")
        return raw

    def compactions(self, *, compact_from: int) -> int:
        """How often contiguous rows became fewer, on the way to those that `to_json` writes."""
        return _rows(self.records, compact_from)[1]

    @classmethod
    def from_json(cls, raw: bytes) -> Manifest:
        """Read a manifest strictly.

        Raises:
            CorruptDataError: for anything that this version would not have written.
        """
        _expect(raw.isascii(), "not ASCII")
        try:
            content = strict_json.parse(raw, most_bytes=MAX_MANIFEST_BYTES)
        except ValueError as error:
            raise CorruptDataError(f"manifest: {error}") from None
        _expect(isinstance(content, dict), "not a JSON object")
        _expect(content.pop("format", None) == FORMAT, f"format is not {FORMAT!r}")
        version = content.pop("version", None)
        _expect(_is_count(version), "version is not a number")
        _expect(version == FORMAT_VERSION, f"format version {version}: this ollm reads version {FORMAT_VERSION} only")
        _closed(content, {*_PLAIN, "layouts", "table"}, "the manifest")
        _expect(content["lifecycle"] in ("runtime-scoped", "persistent"), "unknown lifecycle")
        _expect(isinstance(content["strategy"], str), "strategy is not text")
        _expect(isinstance(content["parameters"], dict), "parameters are not an object")
        store_id = content["store_id"]
        _expect(
            isinstance(store_id, str)
            and len(store_id) == 2 * STORE_ID_BYTES
            and set(store_id) <= set("0123456789abcdef"),
            f"store_id is not {2 * STORE_ID_BYTES} hexadecimal digits",
        )
        _expect(_is_count(content["tokens"]), "tokens is not a count")
        _expect(_is_count(content["sequence_axis"]) and content["sequence_axis"] == 2, "sequence_axis is not 2")
        layouts = [_layout(item) for item in _items(content.pop("layouts"), "layouts")]
        rows = [_Row.from_json(item, layouts) for item in _items(content.pop("table"), "table")]
        records = tuple(committed for row in rows for committed in row.frames)
        _check_table(records, content["tokens"])
        return cls(records=records, **content)


_PLAIN = ("lifecycle", "store_id", "strategy", "parameters", "sequence_axis", "tokens")


@attrs.frozen
class _Row:
    """Records of one layer that follow each other in position and place: one row of the table as it is written."""

    first: Extent
    frames: tuple[Committed, ...]

    def place(self) -> tuple[int, int]:
        """Where it stands in the table."""
        return self.first.key.layer, self.first.start

    def is_followed_by(self, other: _Row) -> bool:
        """Whether `other` goes on where this one ends."""
        last = self.frames[-1].extent
        same = (last.key.rows, last.layout, last.location.segment, last.location.encoded)
        key, location = other.first.key, other.first.location
        return (
            same == (key.rows, other.first.layout, location.segment, location.encoded)
            and last.stop == key.start
            and record_span(last.location)[1] == record_span(location)[0]
        )

    def to_json(self, layouts: Sequence[KVLayout]) -> dict[str, Any]:
        key, location = self.first.key, self.first.location
        return {
            "layer": key.layer,
            "branch": key.branch,
            "rows": key.rows,
            "start": key.start,
            "layout": layouts.index(self.first.layout),
            "segment": location.segment,
            "offset": location.offset,
            "encoded": location.encoded,
            "frames": [
                [one.extent.key.tokens, one.extent.visible, one.extent.location.nbytes, f"{one.checksum:016x}"]
                for one in self.frames
            ],
        }

    @classmethod
    def from_json(cls, item: dict[str, Any], layouts: Sequence[KVLayout]) -> _Row:
        _closed(item, _ROW_KEYS, "a row of the table")
        _expect(isinstance(item["encoded"], bool), "encoded is not true or false")
        for name in _ROW_KEYS - {"encoded", "frames"}:
            most = _MOST.get(name, _LARGEST)
            _expect(_is_count(item[name]) and item[name] <= most, f"{name}={item[name]!r} is not a count up to {most}")
        _expect(item["layout"] < len(layouts), f"there is no layout {item['layout']}")
        _expect(item["rows"] > 0, "a row of the table has no rows of the batch")
        _expect(item["offset"] % ALIGNMENT == 0 and item["offset"] >= ALIGNMENT, "a record is not aligned")
        frames, start, offset = [], item["start"], item["offset"]
        _expect(isinstance(item["frames"], list) and item["frames"], "frames is not a list of some")
        for frame in item["frames"]:
            tokens, visible, nbytes, checksum = _frame(frame)
            key = BlockKey(item["layer"], item["branch"], start, tokens, item["rows"])
            location = Location(nbytes, item["segment"], offset, item["encoded"])
            extent = Extent(key, layouts[item["layout"]], location, visible)
            _expect(
                item["encoded"] or nbytes == extent.layout.nbytes(key.rows, tokens), "a record has the wrong length"
            )
            frames.append(Committed(extent, checksum))
            start, offset = extent.stop, record_span(location)[1] + ALIGNMENT  # where the next payload begins
            _expect(max(start, offset) <= _LARGEST, "a record ends too far away")
        return cls(frames[0].extent, tuple(frames))


_MOST = {"layer": 2**32 - 1, "branch": 2**32 - 1, "rows": 2**32 - 1, "segment": MOST_SEGMENTS - 1}
_ROW_KEYS = {"layer", "branch", "rows", "start", "layout", "segment", "offset", "encoded", "frames"}


def _rows(records: Iterable[Committed], compact_from: int) -> tuple[list[_Row], int]:
    """The table in as many rows as there are records, or fewer, where a layer of a branch has enough of them; and how
    often they became fewer. Depends on nothing but the records."""
    layers: dict[tuple[int, int], list[_Row]] = {}
    compactions = 0
    for committed in records:
        rows = layers.setdefault((committed.extent.key.layer, committed.extent.key.branch), [])
        rows.append(_Row(committed.extent, (committed,)))
        if len(rows) >= compact_from:
            joined = _joined(rows)
            compactions += len(joined) < len(rows)
            rows[:] = joined
    return sorted((row for rows in layers.values() for row in rows), key=_Row.place), compactions


def _joined(rows: Iterable[_Row]) -> list[_Row]:
    joined: list[_Row] = []
    for row in rows:
        if joined and joined[-1].is_followed_by(row):
            joined[-1] = _Row(joined[-1].first, (*joined[-1].frames, *row.frames))
        else:
            joined.append(row)
    return joined


def _layout_json(layout: KVLayout) -> dict[str, Any]:
    return {
        "dtype": layout.dtype_name,
        "kv_heads": layout.kv_heads,
        "key_size": layout.key_size,
        "value_size": layout.value_size,
    }


def _layout(item: dict[str, Any]) -> KVLayout:
    _closed(item, {"dtype", "kv_heads", "key_size", "value_size"}, "a layout")
    sizes = {name: value for name, value in item.items() if name != "dtype"}
    _expect(isinstance(item["dtype"], str) and item["dtype"] in DTYPE_CODES, f"unknown dtype {item['dtype']!r}")
    for name, value in sizes.items():
        _expect(_is_count(value) and value < 2**32, f"{name}={value!r} is not a size")
    return KVLayout(getattr(torch, item["dtype"]), **sizes)


def _frame(frame: object) -> tuple[int, int, int, int]:
    """Tokens, visible ones, bytes and checksum of a record."""
    _expect(isinstance(frame, list) and len(frame) == 4, "a frame is not tokens, visible, bytes and checksum")
    assert isinstance(frame, list)
    tokens, visible, nbytes, checksum = frame
    _expect(all(map(_is_count, (tokens, visible, nbytes))), f"a frame holds {frame!r}, which are not counts")
    _expect(0 < visible <= tokens < 2**32, f"a frame shows {visible} of {tokens} tokens")
    _expect(isinstance(checksum, str) and len(checksum) == 16 and set(checksum) <= set("0123456789abcdef"),
            f"a frame has the checksum {checksum!r}")  # fmt: skip
    return tokens, visible, nbytes, int(checksum, 16)


def _closed(content: Mapping[str, Any], expected: set[str], where: str) -> None:
    """Exactly these keys: a missing one and an unknown one are both wrong."""
    _expect(set(content) == expected, f"{where} has the keys {sorted(set(content) ^ expected)} too many or too few")


def _items(items: object, name: str) -> list[dict[str, Any]]:
    _expect(isinstance(items, list), f"{name} is not a list")
    assert isinstance(items, list)
    _expect(all(isinstance(item, dict) for item in items), f"{name} holds something that is not an object")
    return items


def _check_table(records: Sequence[Committed], tokens: int) -> None:
    """Records lie apart from each other, and cover each layer in order, without a gap, up to `tokens` at most."""
    extents = [one.extent for one in records]
    ends: dict[int, int] = {}
    for extent in sorted(extents, key=lambda extent: (extent.location.segment, extent.location.offset)):
        begin, end = record_span(extent.location)
        _expect(begin >= ends.get(extent.location.segment, 0), "records overlap")
        ends[extent.location.segment] = end
    for extent, after in itertools.pairwise(extents):
        same = extent.key.layer == after.key.layer
        _expect(extent.stop == after.start if same else extent.key.layer < after.key.layer,
                "records of a layer leave a gap, or are not in order")  # fmt: skip
    _expect(all(extent.stop <= tokens for extent in extents), f"records go on behind {tokens} tokens")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _expect(condition: object, problem: str) -> None:
    if not condition:
        raise CorruptDataError(f"manifest: {problem}")
