"""The manifest: what it says in bytes, and that nothing but what ollm would have written is read."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollm.errors import CorruptDataError
from ollm.storage import manifest as module
from ollm.storage.manifest import ExtentEntry, LayerEntry, Manifest, SegmentEntry
from ollm.storage.records import ALIGNMENT, DTYPE_CODES

GOLDEN = Path(__file__).parent / "golden" / "manifest.json"

EXAMPLE = Manifest(
    lifecycle="persistent",
    store_id="00112233445566778899aabbccddeeff",
    strategy="chunked",
    parameters={"verify": "first", "ratio": 0.5, "nested": {"list": [1, None, True]}},
    committed_tokens=30,
    layers=(LayerEntry(layer=0, dtype="bfloat16", rows=1, kv_heads=2, key_size=64, value_size=32),),
    segments=(SegmentEntry(segment=0, length=24576),),
    extents=(
        ExtentEntry(layer=0, start=0, tokens=10, rows=1, nbytes=3840, segment=0, offset=4096),
        ExtentEntry(layer=0, start=10, tokens=20, rows=1, nbytes=7680, segment=0, offset=12288),
    ),
)

counts = st.integers(0, 2**62)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any manifest that this version may write: records behind each other in one segment per layer."""
    layers, segments, extents = [], [], []
    for layer in draw(st.lists(st.integers(0, 2**31), unique=True, max_size=3)):
        names = st.sampled_from(sorted(DTYPE_CODES))
        layers.append(LayerEntry(layer=layer, dtype=draw(names), rows=1, kv_heads=2, key_size=4, value_size=4))
        position, at = draw(st.integers(0, 100)), 0
        for tokens, nbytes in draw(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 10**5)), max_size=4)):
            extents.append(
                ExtentEntry(
                    layer=layer, start=position, tokens=tokens, rows=1, nbytes=nbytes, segment=layer,
                    offset=at + ALIGNMENT,
                )
            )  # fmt: skip
            position, at = position + tokens, at + ALIGNMENT * (1 + -(-nbytes // ALIGNMENT))
        segments.append(SegmentEntry(segment=layer, length=at + draw(st.integers(0, 9))))
    values = st.none() | st.booleans() | counts | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    return Manifest(
        lifecycle=draw(st.sampled_from(["runtime-scoped", "persistent"])),
        store_id=draw(st.binary(min_size=16, max_size=16)).hex(),
        strategy=draw(st.text()),
        parameters=draw(st.dictionaries(st.text(), values | st.lists(values) | st.dictionaries(st.text(), values))),
        committed_tokens=draw(counts),
        layers=tuple(layers),
        segments=tuple(segments),
        extents=tuple(extents),
    )


def test_a_manifest_has_the_bytes_that_were_written_down() -> None:
    assert EXAMPLE.to_json() == GOLDEN.read_bytes().rstrip(b"\n")
    assert Manifest.from_json(GOLDEN.read_bytes()) == EXAMPLE


@given(manifests())
@settings(deadline=None)
def test_what_is_written_is_read_back(manifest: Manifest) -> None:
    raw = manifest.to_json()
    assert raw.isascii()
    assert Manifest.from_json(raw) == manifest


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    content = json.loads(GOLDEN.read_bytes())
    change(content)
    return json.dumps(content).encode()


def set_in(*path: str | int, value: object) -> Callable[[dict[str, Any]], object]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


COUNTS: list[tuple[str | int, ...]] = [
    ("version",),
    ("sequence_axis",),
    ("committed_tokens",),
    *(("layers", 0, key) for key in ("layer", "rows", "kv_heads", "key_size", "value_size")),
    *(("segments", 0, key) for key in ("segment", "length")),
    *(("extents", 0, key) for key in ("layer", "start", "tokens", "rows", "nbytes", "segment", "offset")),
]


@pytest.mark.parametrize("value", [True, -1, 1.0, "1", None, [], {}, 2**62 + 1, 10**400], ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("path", COUNTS, ids=str)
def test_a_count_that_is_no_count_is_refused(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(CorruptDataError):
        Manifest.from_json(changed(set_in(*path, value=value)))


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": set_in("format", value="ollm-weights"),
    "format missing": lambda content: content.pop("format"),
    "older version": set_in("version", value=0),
    "newer version": set_in("version", value=2),
    "unknown key": set_in("path", value="/etc/passwd"),
    "unknown key of an extent": set_in("extents", 0, "path", value="../x"),
    "missing key of a layer": lambda content: content["layers"][0].pop("rows"),
    "unknown lifecycle": set_in("lifecycle", value="eternal"),
    "lifecycle is a list": set_in("lifecycle", value=["persistent"]),
    "strategy is no text": set_in("strategy", value=1),
    "parameters are a list": set_in("parameters", value=[]),
    "store id too short": set_in("store_id", value="00"),
    "store id not hexadecimal": set_in("store_id", value="g" * 32),
    "store id in capitals": set_in("store_id", value="A" * 32),
    "another axis": set_in("sequence_axis", value=1),
    "unknown dtype": set_in("layers", 0, "dtype", value="complex64"),
    "dtype is a list": set_in("layers", 0, "dtype", value=["float32"]),
    "dtype is a number": set_in("layers", 0, "dtype", value=1),
    "layers are an object": set_in("layers", value={}),
    "an extent is a list": set_in("extents", 0, value=[0, 0, 10, 1, 3840, 0, 4096]),
    "a segment twice": lambda content: content["segments"].append(content["segments"][0]),
    "a layer twice": lambda content: content["layers"].append(content["layers"][0]),
    "extent of an unknown layer": set_in("layers", value=[]),
    "extent of an unknown segment": set_in("segments", value=[]),
    "extent of no tokens": set_in("extents", 0, "tokens", value=0),
    "extent of no rows": set_in("extents", 0, "rows", value=0),
    "extent misaligned": set_in("extents", 1, "offset", value=12289),
    "extent without room for its header": set_in("extents", 0, "offset", value=0),
    "extents on top of each other": set_in("extents", 1, "offset", value=4096),
    "payload runs into the next header": set_in("extents", 0, "nbytes", value=4097),
    "extent ends one byte behind its segment": set_in("segments", 0, "length", value=12288 + 7679),
    "gap between extents": set_in("extents", 1, "start", value=11),
    "extents overlap in position": set_in("extents", 1, "start", value=9),
    "nested deeper than anybody needs": set_in("parameters", value=json.loads('{"a":' * 100 + "1" + "}" * 100)),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(CorruptDataError, match=r"^manifest: "):
        Manifest.from_json(changed(change))


@pytest.mark.parametrize("key", json.loads(GOLDEN.read_bytes()))
def test_a_missing_key_is_refused(key: str) -> None:
    with pytest.raises(CorruptDataError):
        Manifest.from_json(changed(lambda content: content.pop(key)))


def with_parameters(text: bytes) -> bytes:
    return GOLDEN.read_bytes().replace(b'"verify":"first"', b'"verify":' + text)


@pytest.mark.parametrize(
    "raw",
    {
        "empty": b"",
        "not an object": b"[]",
        "cut off": GOLDEN.read_bytes()[:-10],
        "something behind it": GOLDEN.read_bytes() + b"{}",
        "key twice": GOLDEN.read_bytes().replace(b"{", b'{"version":1,', 1),
        "key twice inside": with_parameters(b'{"a":1,"a":1}'),
        "NaN": with_parameters(b"NaN"),
        "Infinity": with_parameters(b"-Infinity"),
        "a number that becomes infinite": with_parameters(b"1e999"),
        "more digits than Python reads": with_parameters(b"9" * 10_000),
        "nesting that ends any stack": with_parameters(b"[" * 500_000),
        "not ASCII": with_parameters('"ü"'.encode()),
        "not UTF-8": with_parameters(b'"\xff"'),
        "with a byte order mark": b"\xef\xbb\xbf" + GOLDEN.read_bytes(),
        "UTF-16": GOLDEN.read_text().encode("utf-16"),
    }.items(),
    ids=lambda item: item[0],
)
def test_bytes_that_are_no_manifest_are_refused(raw: tuple[str, bytes]) -> None:
    with pytest.raises(CorruptDataError, match=r"^manifest: "):
        Manifest.from_json(raw[1])


def test_a_manifest_that_is_too_large_is_refused_without_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", 1000)
    raw = with_parameters(b"[" + b"1," * 10**6 + b"1]")
    tracemalloc.start()
    try:
        with pytest.raises(CorruptDataError, match="larger than 1000 bytes"):
            Manifest.from_json(raw)
        assert tracemalloc.get_traced_memory()[1] < len(raw) // 10
    finally:
        tracemalloc.stop()


def test_sizes_that_a_manifest_claims_are_not_allocated() -> None:
    def claim(content: dict[str, Any]) -> None:
        content["extents"][1].update(nbytes=2**60, tokens=2**60)
        content["segments"][0]["length"] = 2**61

    tracemalloc.start()
    try:
        Manifest.from_json(changed(claim))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
