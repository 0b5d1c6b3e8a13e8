"""The manifest: the block table of one cache folder written down, as JSON, whole, and read with suspicion.

It names files by number, never by path, and begins with a checksum of all the rest. Reading checks everything before
anything is allocated: a closed set of keys, bounded counts, lengths that add up. What the table means is `kept`'s.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
import xxhash

from ollm.contracts.blocks import BlockKey, Extent, KVLayout, Location
from ollm.errors import CorruptDataError
from ollm.io import strict_json
from ollm.io.buffers import ALIGNMENT
from ollm.storage.folder import MOST_SEGMENTS
from ollm.storage.kept import KeptEntry, KeptLayer, check_layers, expect, extents_of
from ollm.storage.records import DTYPE_CODES, STORE_ID_BYTES, record_span

FORMAT = "ollm-kv"
FORMAT_VERSION = 2
MAX_MANIFEST_BYTES = 64 * 2**20
_LARGEST = 2**62
_BEGINS = '{"checksum":"%s",'
"""How every manifest begins: its first key in order. The checksum is that of all bytes behind this."""


@attrs.frozen(kw_only=True)
class Manifest:
    """All that a reader must know of a cache folder. `sequence_axis` is the token axis of keys and values."""

    lifecycle: str
    store_id: str
    strategy: str
    parameters: dict[str, Any] = attrs.field(factory=dict)
    sequence_axis: int = 2
    layers: tuple[KeptLayer, ...] = ()
    """The table."""
    checksums: Mapping[Location, int] = attrs.field(factory=dict)
    """Of the header of each record, which holds the hashes of its payload."""

    def to_json(self, *, compact_from: int = 1) -> bytes:
        """Canonical JSON: sorted keys, no spaces, ASCII.

        Args:
            compact_from: how many runs a layer of a branch has before those that are contiguous become one.

        Raises:
            CorruptDataError: no manifest of this version says so.
        """
        check_layers(self.layers)
        layouts = list(dict.fromkeys(extent.layout for extent in extents_of(self.layers)))
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in _PLAIN},
            "layouts": [_layout_json(layout) for layout in layouts],
            "layers": [
                {
                    **{name: getattr(layer, name) for name in _OF_LAYER},
                    "runs": [
                        _run_json(run, layouts, self.checksums) for run in _compacted(layer.entries, compact_from)[0]
                    ],
                }
                for layer in self.layers
            ],
        }
        raw = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")[1:]
        raw = _begins(_checksum(raw)) + raw
        expect(len(raw) <= MAX_MANIFEST_BYTES, f"larger than {MAX_MANIFEST_BYTES} bytes")
        return raw

    def compactions(self, *, compact_from: int) -> int:
        """How often contiguous runs became fewer, on the way to those that `to_json` writes."""
        return sum(_compacted(layer.entries, compact_from)[1] for layer in self.layers)

    @classmethod
    def from_json(cls, raw: bytes) -> Manifest:
        """Read a manifest strictly.

        Raises:
            CorruptDataError: for anything that this version would not have written.
        """
        expect(raw.isascii(), "not ASCII")
        try:
            content = strict_json.parse(raw, most_bytes=MAX_MANIFEST_BYTES)
        except ValueError as error:
            raise CorruptDataError(f"manifest: {error}") from None
        expect(isinstance(content, dict), "not a JSON object")
        expect(content.pop("format", None) == FORMAT, f"format is not {FORMAT!r}")
        version = content.pop("version", None)
        expect(_is_count(version), "version is not a number")
        expect(version == FORMAT_VERSION, f"format version {version}: this ollm reads version {FORMAT_VERSION} only")
        checksum = content.pop("checksum", None)
        begins = _begins(checksum) if _is_hexadecimal(checksum, 16) else b""
        expect(begins and raw.startswith(begins), "it does not begin with a checksum")
        expect(_checksum(raw[len(begins) :]) == checksum, "it was changed: its checksum is not that of what follows")
        _closed(content, {*_PLAIN, "layouts", "layers"}, "the manifest")
        expect(content["lifecycle"] in ("runtime-scoped", "persistent"), "unknown lifecycle")
        expect(isinstance(content["strategy"], str), "strategy is not text")
        expect(isinstance(content["parameters"], dict), "parameters are not an object")
        expect(_is_hexadecimal(content["store_id"], 2 * STORE_ID_BYTES), "store_id is not hexadecimal, or too short")
        expect(_is_count(content["sequence_axis"]) and content["sequence_axis"] == 2, "sequence_axis is not 2")
        layouts = [_layout(item) for item in _items(content.pop("layouts"), "layouts")]
        checksums: dict[Location, int] = {}
        layers = tuple(_layer(item, layouts, checksums) for item in _items(content.pop("layers"), "layers"))
        check_layers(layers)
        return cls(layers=layers, checksums=checksums, **content)


_PLAIN = ("lifecycle", "store_id", "strategy", "parameters", "sequence_axis")
_OF_LAYER = ("layer", "tokens", "first_kept")
_OF_RUN = ("branch", "rows", "start", "layout", "segment", "offset")
_MOST = {"layer": 2**32 - 1, "branch": 2**32 - 1, "rows": 2**32 - 1, "segment": MOST_SEGMENTS - 1}

_Run = Sequence[KeptEntry]
"""Entries of one layer that follow each other in position and place: one item of its list in the manifest."""


def _begins(checksum: str) -> bytes:
    return (_BEGINS % checksum).encode()


def _checksum(rest: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(rest)


def _compacted(entries: Sequence[KeptEntry], compact_from: int) -> tuple[list[_Run], int]:
    """A layer's entries in as many runs as there are entries, or fewer where one of its branches has enough of them;
    and how often they became fewer. Depends on nothing but the entries."""
    joins = [False, *map(_is_followed_by, entries, entries[1:])]  # whether each goes on where the one before ends
    count, whole = Counter[int](), Counter[int]()  # runs of each branch: now, and if all that is contiguous were joined
    joined: dict[int, int] = {}  # where each branch is not joined yet
    compactions = 0
    for place, entry in enumerate(entries):
        branch = entry.extent.key.branch
        count[branch] += 1
        whole[branch] += not joins[place]
        if count[branch] >= compact_from and count[branch] > whole[branch]:
            count[branch], joined[branch] = whole[branch], place + 1
            compactions += 1
    runs: list[list[KeptEntry]] = []
    for place, entry in enumerate(entries):
        if joins[place] and place < joined.get(entry.extent.key.branch, 0):
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return [*runs], compactions


def _is_followed_by(entry: KeptEntry, after: KeptEntry) -> bool:
    """Whether `after` goes on where `entry` ends."""
    return (
        _shared(entry) == _shared(after)
        and entry.extent.stop == after.extent.start
        and record_span(entry.extent.location)[1] == record_span(after.extent.location)[0]
    )


def _shared(entry: KeptEntry) -> tuple[object, ...]:
    """What a run says once for all of its entries."""
    key, location = entry.extent.key, entry.extent.location
    return key.branch, key.rows, entry.row_map, entry.extent.layout, location.segment, location.encoded


def _run_json(run: _Run, layouts: Sequence[KVLayout], checksums: Mapping[Location, int]) -> dict[str, Any]:
    first = run[0].extent
    return {
        "branch": first.key.branch,
        "rows": first.key.rows,
        "row_map": run[0].row_map,
        "start": first.start,
        "layout": layouts.index(first.layout),
        "segment": first.location.segment,
        "offset": first.location.offset,
        "encoded": first.location.encoded,
        "frames": [
            [extent.key.tokens, extent.visible, extent.location.nbytes, f"{checksums[extent.location]:016x}"]
            for extent in (entry.extent for entry in run)
        ],
    }


def _layer(item: dict[str, Any], layouts: Sequence[KVLayout], checksums: dict[Location, int]) -> KeptLayer:
    """A layer; notes the checksums of its records."""
    _closed(item, {*_OF_LAYER, "runs"}, "a layer")
    _check_counts(item, _OF_LAYER)
    runs = [_run(run, item["layer"], layouts, checksums) for run in _items(item.pop("runs"), "runs")]
    return KeptLayer(entries=tuple(entry for run in runs for entry in run), **item)


def _run(item: dict[str, Any], layer: int, layouts: Sequence[KVLayout], checksums: dict[Location, int]) -> _Run:
    _closed(item, {*_OF_RUN, "row_map", "encoded", "frames"}, "a run")
    expect(isinstance(item["encoded"], bool), "encoded is not true or false")
    _check_counts(item, _OF_RUN)
    expect(item["layout"] < len(layouts), f"there is no layout {item['layout']}")
    expect(item["rows"] > 0, "a run has no rows of the batch")
    expect(item["offset"] % ALIGNMENT == 0 and item["offset"] >= ALIGNMENT, "a record is not aligned")
    row_map = None if item["row_map"] is None else _row_map(item["row_map"])
    entries, start, offset = [], item["start"], item["offset"]
    expect(isinstance(item["frames"], list) and item["frames"], "frames is not a list of some")
    for frame in item["frames"]:
        tokens, visible, nbytes, checksum = _frame(frame)
        key = BlockKey(layer, item["branch"], start, tokens, item["rows"])
        location = Location(nbytes, item["segment"], offset, item["encoded"])
        extent = Extent(key, layouts[item["layout"]], location, visible)
        expect(item["encoded"] or nbytes == extent.layout.nbytes(key.rows, tokens), "a record has the wrong length")
        entries.append(KeptEntry(extent, row_map))
        checksums[location] = checksum
        start, offset = extent.stop, record_span(location)[1] + ALIGNMENT  # where the next payload begins
        expect(max(start, offset) <= _LARGEST, "a record ends too far away")
    return entries


def _row_map(rows: object) -> tuple[int, ...]:
    expect(isinstance(rows, list) and rows and all(map(_is_count, rows)), "row_map is not a list of some rows")
    assert isinstance(rows, list)
    return tuple(rows)


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
    expect(isinstance(item["dtype"], str) and item["dtype"] in DTYPE_CODES, f"unknown dtype {item['dtype']!r}")
    for name, value in sizes.items():
        expect(_is_count(value) and value < 2**32, f"{name}={value!r} is not a size")
    return KVLayout(getattr(torch, item["dtype"]), **sizes)


def _frame(frame: object) -> tuple[int, int, int, int]:
    """Tokens, visible ones, bytes and checksum of a record."""
    expect(isinstance(frame, list) and len(frame) == 4, "a frame is not tokens, visible, bytes and checksum")
    assert isinstance(frame, list)
    tokens, visible, nbytes, checksum = frame
    expect(all(map(_is_count, (tokens, visible, nbytes))), f"a frame holds {frame!r}, which are not counts")
    expect(0 < visible <= tokens < 2**32, f"a frame shows {visible} of {tokens} tokens")
    expect(_is_hexadecimal(checksum, 16), f"a frame has the checksum {checksum!r}")
    return tokens, visible, nbytes, int(checksum, 16)


def _closed(content: Mapping[str, Any], expected: set[str], where: str) -> None:
    """Exactly these keys: a missing one and an unknown one are both wrong."""
    expect(set(content) == expected, f"{where} has the keys {sorted(set(content) ^ expected)} too many or too few")


def _items(items: object, name: str) -> list[dict[str, Any]]:
    expect(isinstance(items, list), f"{name} is not a list")
    assert isinstance(items, list)
    expect(all(isinstance(item, dict) for item in items), f"{name} holds something that is not an object")
    return items


def _check_counts(item: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        most = _MOST.get(name, _LARGEST)
        expect(_is_count(item[name]) and item[name] <= most, f"{name}={item[name]!r} is not a count up to {most}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_hexadecimal(value: object, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and set(value) <= set("0123456789abcdef")
