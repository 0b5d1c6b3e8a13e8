"""The manifest: explicit metadata of one cache folder as JSON, written whole and read with suspicion.

A manifest names segments by number, never by path. Reading checks everything before anything is allocated: a closed
set of keys, no duplicate key, no NaN, no bool as a number, bounded size and depth, lengths that add up.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import attrs

from ollm.errors import CorruptDataError
from ollm.io import strict_json
from ollm.io.buffers import ALIGNMENT
from ollm.storage.records import DTYPE_CODES

FORMAT = "ollm-kv"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 64 * 2**20
_LARGEST = 2**62


@attrs.frozen(kw_only=True)
class LayerEntry:
    """One layer's shapes."""

    layer: int
    dtype: str
    rows: int
    kv_heads: int
    key_size: int
    value_size: int


@attrs.frozen(kw_only=True)
class SegmentEntry:
    """One file and how much of it counts; what lies behind is dropped on opening."""

    segment: int
    length: int


@attrs.frozen(kw_only=True)
class ExtentEntry:
    """One committed record."""

    layer: int
    start: int
    tokens: int
    rows: int
    nbytes: int
    segment: int
    offset: int


@attrs.frozen(kw_only=True)
class Manifest:
    """All that a reader must know of a cache folder. `sequence_axis` is the token axis of keys and values."""

    lifecycle: str
    store_id: str
    strategy: str
    parameters: dict[str, Any] = attrs.field(factory=dict)
    sequence_axis: int = 2
    committed_tokens: int = 0
    layers: tuple[LayerEntry, ...] = ()
    segments: tuple[SegmentEntry, ...] = ()
    extents: tuple[ExtentEntry, ...] = ()

    def to_json(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, ASCII."""
        content = {"format": FORMAT, "version": FORMAT_VERSION, **attrs.asdict(self)}
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")

    @classmethod
    def from_json(cls, raw: bytes) -> Manifest:
        """Read a manifest strictly.

        Raises:
            CorruptDataError: for anything that this version would not have written.
        """
        content = _parse(raw)
        _expect(content.pop("format", None) == FORMAT, f"format is not {FORMAT!r}")
        version = content.pop("version", None)
        _expect(_is_count(version), "version is not a number")
        _expect(version == FORMAT_VERSION, f"format version {version}: this ollm reads version {FORMAT_VERSION} only")
        _closed(content, cls, "the manifest")
        _expect(content["lifecycle"] in ("runtime-scoped", "persistent"), "unknown lifecycle")
        _expect(isinstance(content["strategy"], str), "strategy is not text")
        _expect(isinstance(content["parameters"], dict), "parameters are not an object")
        store_id = content["store_id"]
        _expect(isinstance(store_id, str) and len(store_id) == 32 and set(store_id) <= set("0123456789abcdef"),
                "store_id is not 32 hexadecimal digits")  # fmt: skip
        _expect(_is_count(content["committed_tokens"]), "committed_tokens is not a count")
        _expect(_is_count(content["sequence_axis"]) and content["sequence_axis"] == 2, "sequence_axis is not 2")
        for key, entry in (("layers", LayerEntry), ("segments", SegmentEntry), ("extents", ExtentEntry)):
            content[key] = _entries(content[key], entry, key)
        manifest = cls(**content)
        _check_lengths(manifest)
        return manifest


def _parse(raw: bytes) -> dict[str, Any]:
    _expect(raw.isascii(), "not ASCII")
    try:
        content = strict_json.parse(raw, most_bytes=MAX_MANIFEST_BYTES)
    except ValueError as error:
        raise CorruptDataError(f"manifest: {error}") from None
    _expect(isinstance(content, dict), "not a JSON object")
    return dict(content)


def _closed(content: dict[str, Any], cls: type, where: str) -> None:
    """Exactly the keys of `cls`: a missing one and an unknown one are both wrong."""
    expected = {field.name for field in attrs.fields(cls)}
    _expect(set(content) == expected, f"{where} has the keys {sorted(set(content) ^ expected)} too many or too few")


def _entries(items: object, cls: Callable[..., Any], key: str) -> tuple[Any, ...]:
    _expect(isinstance(items, list), f"{key} is not a list")
    assert isinstance(items, list)
    result = []
    for item in items:
        _expect(isinstance(item, dict), f"{key} holds something that is not an object")
        _closed(item, cls, f"an entry of {key}")  # type: ignore[arg-type]
        for name, value in item.items():
            good = isinstance(value, str) and value in DTYPE_CODES if name == "dtype" else _is_count(value)
            _expect(good, f"{key}: {name}={value!r} is not allowed")
        result.append(cls(**item))
    return tuple(result)


def _check_lengths(manifest: Manifest) -> None:
    """Extents lie inside their segment, aligned, apart from each other, and cover each layer without a gap."""
    lengths = {entry.segment: entry.length for entry in manifest.segments}
    _expect(len(lengths) == len(manifest.segments), "a segment stands twice")
    known = {entry.layer for entry in manifest.layers}
    _expect(len(known) == len(manifest.layers), "a layer stands twice")
    ends: dict[int, int] = {}
    for extent in sorted(manifest.extents, key=lambda extent: (extent.segment, extent.offset)):
        _expect(extent.layer in known, f"an extent belongs to the unknown layer {extent.layer}")
        _expect(extent.tokens > 0 and extent.rows > 0, "an extent is empty")
        _expect(extent.offset % ALIGNMENT == 0 and extent.offset >= ALIGNMENT, "an extent is not aligned")
        _expect(extent.offset - ALIGNMENT >= ends.get(extent.segment, 0), "extents overlap")
        ends[extent.segment] = extent.offset + extent.nbytes
        _expect(ends[extent.segment] <= lengths.get(extent.segment, -1), "an extent ends behind its segment")
    positions: dict[int, int] = {}
    for extent in sorted(manifest.extents, key=lambda extent: (extent.layer, extent.start)):
        _expect(extent.start == positions.get(extent.layer, extent.start), "extents of a layer leave a gap")
        positions[extent.layer] = extent.start + extent.tokens


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise CorruptDataError(f"manifest: {problem}")
