"""The manifest: what it says in bytes, and that nothing but what ollm would have written is read."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ollm.contracts.blocks import BlockKey, Extent, KVLayout, Location
from ollm.errors import CorruptDataError
from ollm.storage import manifest as module
from ollm.storage.manifest import Committed, Manifest
from ollm.storage.records import ALIGNMENT, DTYPE_CODES

GOLDEN = Path(__file__).parent / "golden" / "manifest.json"
LAYOUTS = (KVLayout(torch.bfloat16, 2, 64, 32), KVLayout(torch.float8_e5m2, 1, 7, 0))


def record(
    layer: int, start: int, tokens: int, offset: int, checksum: int, *, visible: int | None = None, **more: Any
) -> Committed:
    """A row of the table, as whoever commits has it."""
    layout, rows = more.get("layout", LAYOUTS[0]), more.get("rows", 1)
    nbytes = more.get("nbytes", layout.nbytes(rows, tokens))
    location = Location(nbytes, more.get("segment", layer), offset, "nbytes" in more)
    key = BlockKey(layer, more.get("branch", 0), start, tokens, rows)
    return Committed(Extent(key, layout, location, tokens if visible is None else visible), checksum)


EXAMPLE = Manifest(
    lifecycle="persistent",
    store_id="00112233445566778899aabbccddeeff",
    strategy="chunked",
    parameters={"verify": "first", "ratio": 0.5, "nested": {"list": [1, None, True]}},
    tokens=30,
    records=(
        record(0, 0, 10, 4096, 1),
        record(0, 10, 20, 12288, 2**64 - 1),
        record(1, 0, 10, 4096, 3, visible=6),
        record(1, 6, 24, 12288, 4, branch=1, rows=2, layout=LAYOUTS[1], nbytes=5),
    ),
)
"""Two layers: contiguous extents; and an extent that is cut, with an encoded one of a fork behind it."""

counts = st.integers(0, 2**62)


@st.composite
def tables(draw: st.DrawFn) -> list[Committed]:
    """Records of any layers, branches, rows and shapes, some cut, some encoded, with holes between some of them."""
    ends: Counter[int] = Counter()
    names = st.sampled_from(sorted(DTYPE_CODES)).map(lambda name: getattr(torch, name))
    layouts = draw(st.lists(st.builds(KVLayout, names, *[st.integers(0, 3)] * 3), min_size=1, max_size=2))
    records = []
    for layer in draw(st.lists(st.integers(0, 2**32 - 1), unique=True, max_size=3).map(sorted)):
        start = draw(st.integers(0, 100))
        for _ in range(draw(st.integers(0, 8))):
            segment, tokens = draw(st.sampled_from((0, 7, 999_999))), draw(st.integers(1, 50))
            more = {"nbytes": draw(st.integers(0, 10**5))} if draw(st.booleans()) else {}
            one = record(
                layer, start, tokens, ends[segment] + ALIGNMENT * draw(st.sampled_from((1, 1, 2))),
                draw(st.integers(0, 2**64 - 1)), visible=draw(st.sampled_from((tokens, tokens, max(tokens // 2, 1)))),
                branch=draw(st.integers(0, 2)), rows=draw(st.sampled_from((1, 1, 2))),
                layout=draw(st.sampled_from(layouts)), segment=segment, **more,
            )  # fmt: skip
            records.append(one)
            start = one.extent.stop
            ends[segment] = one.extent.location.offset + -(-one.extent.location.nbytes // ALIGNMENT) * ALIGNMENT
    return records


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any manifest that this version may write."""
    values = st.none() | st.booleans() | counts | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    records = draw(tables())
    return Manifest(
        lifecycle=draw(st.sampled_from(["runtime-scoped", "persistent"])),
        store_id=draw(st.binary(min_size=16, max_size=16)).hex(),
        strategy=draw(st.text()),
        parameters=draw(st.dictionaries(st.text(), values | st.lists(values) | st.dictionaries(st.text(), values))),
        tokens=max((one.extent.stop for one in records), default=0) + draw(st.integers(0, 9)),
        records=tuple(records),
    )


def test_a_manifest_has_the_bytes_that_were_written_down() -> None:
    assert EXAMPLE.to_json() == GOLDEN.read_bytes().rstrip(b"\n")
    assert Manifest.from_json(GOLDEN.read_bytes()) == EXAMPLE


@given(manifests(), st.integers(1, 12))
def test_what_is_written_is_read_back_however_many_rows_it_has(manifest: Manifest, compact_from: int) -> None:
    raw = manifest.to_json(compact_from=compact_from)
    assert raw.isascii()
    assert Manifest.from_json(raw) == manifest


def follows(one: Extent, other: Extent) -> bool:
    """Whether two extents belong in one row, once there are enough of them."""
    same = [
        (extent.key.layer, extent.key.branch, extent.key.rows, extent.layout, extent.location.segment,
         extent.location.encoded)
        for extent in (one, other)
    ]  # fmt: skip
    end = one.location.offset + -(-one.location.nbytes // ALIGNMENT) * ALIGNMENT
    return same[0] == same[1] and one.stop == other.start and end == other.location.offset - ALIGNMENT


@given(manifests())
def test_what_is_contiguous_is_one_row_and_nothing_else_is(manifest: Manifest) -> None:
    extents = [one.extent for one in manifest.records]
    rows = json.loads(manifest.to_json())["table"]
    expected = [1 + sum(1 for _ in run) for run in _runs(extents)]
    assert [len(row["frames"]) for row in rows] == expected
    apart = json.loads(manifest.to_json(compact_from=10**6))["table"]
    assert [len(row["frames"]) for row in apart] == [1] * len(extents)


def _runs(extents: list[Extent]) -> list[list[Extent]]:
    """For each row, the extents behind its first."""
    runs: list[list[Extent]] = []
    for number, extent in enumerate(extents):
        if number and follows(extents[number - 1], extent):
            runs[-1].append(extent)
        else:
            runs.append([])
    return runs


def test_rows_are_joined_whenever_there_are_so_many() -> None:
    """1, 2, then 3 become one; that one and two more are 3 again."""
    offsets = [4096 + 8192 * number for number in range(9)]
    rows = []
    for count in range(1, 10):
        records = tuple(record(0, number, 1, offsets[number], 0) for number in range(count))
        manifest = Manifest(lifecycle="persistent", store_id="0" * 32, strategy="s", tokens=9, records=records)
        rows.append(len(json.loads(manifest.to_json(compact_from=3))["table"]))
    assert rows == [1, 2, 1, 2, 1, 2, 1, 2, 1]


def test_branches_that_take_turns_keep_the_order_of_positions() -> None:
    """A number that a closed cache had is used again: a fork of a fork may write under the number of the first."""
    turns = tuple(record(0, 10 * number, 10, 4096, number, branch=number % 2, segment=number) for number in range(4))
    manifest = Manifest(lifecycle="persistent", store_id="0" * 32, strategy="s", tokens=40, records=turns)
    for compact_from in (1, 2, 9):
        assert Manifest.from_json(manifest.to_json(compact_from=compact_from)).records == turns


@pytest.mark.parametrize(
    "records",
    {
        "over each other": (record(0, 0, 10, 4096, 0), record(0, 10, 10, 4096, 0)),
        "a gap": (record(0, 0, 10, 4096, 0), record(0, 11, 10, 12288, 0)),
        "not in order": (record(0, 10, 10, 12288, 0), record(0, 0, 10, 4096, 0)),
        "layers not in order": (record(1, 0, 10, 4096, 0), record(0, 0, 10, 4096, 0)),
        "more than there are": (record(0, 0, 31, 4096, 0),),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_table_that_could_not_be_read_back_is_not_written(records: tuple[str, tuple[Committed, ...]]) -> None:
    manifest = Manifest(lifecycle="persistent", store_id="0" * 32, strategy="s", tokens=30, records=records[1])
    with pytest.raises(CorruptDataError, match=r"^manifest: "):
        manifest.to_json()


def test_a_manifest_that_would_be_too_large_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", len(EXAMPLE.to_json()))
    EXAMPLE.to_json()
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", len(EXAMPLE.to_json()) - 1)
    with pytest.raises(CorruptDataError, match="larger than"):
        EXAMPLE.to_json()


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
    ("tokens",),
    *(("layouts", 0, key) for key in ("kv_heads", "key_size", "value_size")),
    *(("table", 0, key) for key in ("layer", "branch", "rows", "start", "layout", "segment", "offset")),
    *(("table", 0, "frames", 0, number) for number in range(3)),
]

NO_COUNTS = [True, -1, 1.0, "1", None, [], {}, 2**62 + 1, 10**400]


@pytest.mark.parametrize("value", NO_COUNTS, ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("path", COUNTS, ids=str)
def test_a_count_that_is_no_count_is_refused(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(CorruptDataError, match=r"^manifest: "):
        Manifest.from_json(changed(set_in(*path, value=value)))


@pytest.mark.parametrize("name", ["layer", "branch", "rows"])
def test_a_count_that_no_record_can_hold_is_refused(name: str) -> None:
    """Else whoever reads that record would meet an error of `struct`."""
    with pytest.raises(CorruptDataError, match=f"{name}=4294967296 is not a count"):
        Manifest.from_json(changed(set_in("table", -1, name, value=2**32)))


WRONG_TYPES = {
    **{key: [1, None, [], {}, True] for key in ("format", "lifecycle", "store_id", "strategy")},
    "parameters": [1, "x", None, []],
    "layouts": [1, "x", None, {}, [1], [[]], [None]],
    "table": [1, "x", None, {}, [1], [[]], [None]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG_TYPES.items() for value in values])
def test_a_value_of_another_type_is_refused(key: str, value: object) -> None:
    with pytest.raises(CorruptDataError, match=r"^manifest: "):
        Manifest.from_json(changed(set_in(key, value=value)))


PLACES: dict[str, tuple[str | int, ...]] = {"manifest": (), "layout": ("layouts", 0), "row": ("table", 0)}


def inside(content: Any, place: str) -> Any:
    for key in PLACES[place]:
        content = content[key]
    return content


KEYS = [(place, key) for place in PLACES for key in inside(json.loads(GOLDEN.read_bytes()), place)]


@pytest.mark.parametrize(("place", "key"), KEYS)
def test_a_missing_key_is_refused(place: str, key: str) -> None:
    with pytest.raises(CorruptDataError, match=r"^manifest: "):
        Manifest.from_json(changed(lambda content: inside(content, place).pop(key)))


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_key_is_refused(place: str) -> None:
    with pytest.raises(CorruptDataError, match="path"):
        Manifest.from_json(changed(set_in(*PLACES[place], "path", value="../../etc/passwd")))


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "another format": set_in("format", value="ollm-weights"),
    "older version": set_in("version", value=1),
    "newer version": set_in("version", value=3),
    "unknown lifecycle": set_in("lifecycle", value="eternal"),
    "store id too short": set_in("store_id", value="00"),
    "store id not hexadecimal": set_in("store_id", value="g" * 32),
    "store id in capitals": set_in("store_id", value="A" * 32),
    "another axis": set_in("sequence_axis", value=1),
    "unknown dtype": set_in("layouts", 0, "dtype", value="complex64"),
    "dtype is a function of torch": set_in("layouts", 0, "dtype", value="load"),
    "dtype is a list": set_in("layouts", 0, "dtype", value=["float32"]),
    "dtype is a number": set_in("layouts", 0, "dtype", value=1),
    "a size that no record can hold": set_in("layouts", 1, "key_size", value=2**32),
    "a layout that is not there": set_in("table", 0, "layout", value=2),
    "no layouts": set_in("layouts", value=[]),
    "encoded is a number": set_in("table", 0, "encoded", value=0),
    "said to be raw, but of another length": set_in("table", 2, "encoded", value=False),
    "of no rows": set_in("table", 0, "rows", value=0),
    "of other rows": set_in("table", 0, "rows", value=2),
    "no frames": set_in("table", 0, "frames", value=[]),
    "frames are an object": set_in("table", 0, "frames", value={}),
    "frames are text": set_in("table", 0, "frames", value="abcd"),
    "a frame is an object": set_in("table", 0, "frames", 0, value={}),
    "a frame of three": lambda content: content["table"][0]["frames"][0].pop(),
    "a frame of five": lambda content: content["table"][0]["frames"][0].append(1),
    "of no tokens": set_in("table", 0, "frames", 0, value=[0, 0, 0, "0" * 16]),
    "more tokens than a record can hold": set_in("table", 2, "frames", 0, 0, value=2**32),
    "nothing visible": set_in("table", 1, "frames", 0, 1, value=0),
    "more visible than there is": set_in("table", 1, "frames", 0, 1, value=11),
    "one byte more than its tokens": set_in("table", 0, "frames", 0, 2, value=3841),
    "checksum is a number": set_in("table", 0, "frames", 0, 3, value=1),
    "checksum too short": set_in("table", 0, "frames", 0, 3, value="0" * 15),
    "checksum not hexadecimal": set_in("table", 0, "frames", 0, 3, value="-" + "0" * 15),
    "misaligned": set_in("table", 0, "offset", value=4097),
    "without room for its header": set_in("table", 0, "offset", value=0),
    "on top of each other": set_in("table", 2, "segment", value=0),
    "a segment that has no file name": set_in("table", 2, "segment", value=10**6),
    "a row twice": lambda content: content["table"].append(content["table"][-1]),
    "gap in the positions": set_in("table", 2, "start", value=7),
    "overlap in the positions": set_in("table", 2, "start", value=5),
    "rows not in order": lambda content: content["table"].reverse(),
    "further than the table says": set_in("tokens", value=29),
    "so far away that sums overflow": set_in("table", 2, "start", value=2**62),
    "a place so far away that sums overflow": set_in("table", 2, "offset", value=2**62),
    "nested deeper than anybody needs": set_in("parameters", value=json.loads('{"a":' * 100 + "1" + "}" * 100)),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(CorruptDataError, match=r"^manifest: "):
        Manifest.from_json(changed(change))


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
        content["tokens"] = 2**62
        content["table"][2]["frames"] = [[2**32 - 1, 2**32 - 1, 2**60, "0" * 16]]

    tracemalloc.start()
    try:
        Manifest.from_json(changed(claim))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@given(st.data())
def test_whatever_one_value_becomes_it_is_read_as_it_stands_or_refused(data: st.DataObject) -> None:
    """Any value anywhere becomes any other: what is read then is what would be written."""
    content = json.loads(GOLDEN.read_bytes())
    holder, key = data.draw(st.sampled_from(list(_places(content))))
    holder[key] = data.draw(
        st.none() | st.booleans() | st.integers(-1, 50) | counts | st.text(max_size=3) | st.just([])
    )
    raw = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    try:
        found = Manifest.from_json(raw)
    except CorruptDataError:
        return
    assert Manifest.from_json(found.to_json()) == found


def _places(content: Any) -> Any:
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield content, key
        yield from _places(content[key])
