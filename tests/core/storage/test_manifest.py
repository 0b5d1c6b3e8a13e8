"""The manifest: what it says in bytes, and that nothing but what ollm would have written is read."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ollm.contracts.blocks import BlockKey, Extent, KVLayout, Location
from ollm.errors import CorruptDataError
from ollm.storage import manifest as module
from ollm.storage import records
from ollm.storage.kept import KeptEntry, KeptLayer, extents_of
from ollm.storage.manifest import Manifest
from ollm.storage.records import ALIGNMENT, DTYPE_CODES

GOLDEN = Path(__file__).parent / "golden" / "manifest.json"
LAYOUTS = (KVLayout(torch.bfloat16, 2, 64, 32), KVLayout(torch.float8_e5m2, 1, 7, 0))


def entry(layer: int, start: int, tokens: int, offset: int, *, visible: int | None = None, **more: Any) -> KeptEntry:
    """An extent of a layer, as whoever commits has it."""
    layout, rows = more.get("layout", LAYOUTS[0]), more.get("rows", 1)
    nbytes = more.get("nbytes", layout.nbytes(rows, tokens))
    location = Location(nbytes, more.get("segment", layer), offset, "nbytes" in more)
    key = BlockKey(layer, more.get("branch", 0), start, tokens, rows)
    return KeptEntry(Extent(key, layout, location, tokens if visible is None else visible), more.get("row_map"))


def layer_of(*entries: KeptEntry, **more: int) -> KeptLayer:
    """A layer that has these."""
    last = entries[-1].extent
    return KeptLayer(**{"layer": last.key.layer, "entries": entries, "tokens": last.stop, **more})


def manifest_of(*layers: KeptLayer, checksum: int = 0) -> Manifest:
    """A small one, all of whose records have one checksum."""
    checksums = {extent.location: checksum for extent in extents_of(layers)}
    return Manifest(lifecycle="persistent", store_id="0" * 32, strategy="s", layers=layers, checksums=checksums)


FIRST = (entry(0, 0, 10, 4096, rows=2), entry(0, 10, 20, 12288 + 4096, rows=2))
SECOND = (
    entry(1, 0, 10, 4096, visible=6, row_map=(0, 0)),
    entry(1, 6, 24, 12288, branch=1, rows=2, layout=LAYOUTS[1], nbytes=5, row_map=(1, 0)),
)
THIRD = (entry(2, 0, 4, 4096, rows=2), entry(2, 20, 4, 12288, rows=2))
EXAMPLE = Manifest(
    lifecycle="persistent",
    store_id="00112233445566778899aabbccddeeff",
    strategy="chunked",
    parameters={"page_tokens": 64, "ratio": 0.5, "nested": {"list": [1, None, True]}},
    layers=(layer_of(*FIRST), layer_of(*SECOND), layer_of(*THIRD, tokens=30, first_kept=30)),
    checksums=dict(
        zip((one.extent.location for one in (*FIRST, *SECOND, *THIRD)), (1, 2**64 - 1, 3, 4, 5, 6), strict=True)
    ),
)
"""Contiguous extents; one that is cut, and an encoded one of a fork behind it, whose rows were reordered; and a window
with sinks, of which the last tokens left it, too."""

counts = st.integers(0, 2**62)


@st.composite
def tables(draw: st.DrawFn) -> list[KeptLayer]:
    """Layers of one batch, of any branches and shapes, some extents cut, some encoded, some of other rows, with holes
    in files between some of them, and gaps in positions where a window passed."""
    ends: Counter[int] = Counter()
    names = st.sampled_from(sorted(DTYPE_CODES)).map(lambda name: getattr(torch, name))
    layouts = draw(st.lists(st.builds(KVLayout, names, *[st.integers(0, 3)] * 3), min_size=1, max_size=2))
    batch = draw(st.integers(1, 3))
    layers = []
    for layer in draw(st.lists(st.integers(0, 2**32 - 1), unique=True, max_size=3).map(sorted)):
        start = first_kept = 0
        entries = []
        for _ in range(draw(st.integers(0, 8))):
            if draw(st.sampled_from((False, False, True))):
                start = first_kept = start + draw(st.integers(1, 100))
            segment, tokens = draw(st.sampled_from((0, 7, 999_999))), draw(st.integers(1, 50))
            more = {"nbytes": draw(st.integers(0, 10**5))} if draw(st.booleans()) else {}
            rows = draw(st.sampled_from((batch, batch, 1, 2)))
            a_map = st.tuples(*[st.integers(0, rows - 1)] * batch)
            one = entry(
                layer, start, tokens, ends[segment] + ALIGNMENT * draw(st.sampled_from((1, 1, 2))),
                visible=draw(st.sampled_from((tokens, tokens, max(tokens // 2, 1)))),
                branch=draw(st.integers(0, 2)), rows=rows, layout=draw(st.sampled_from(layouts)), segment=segment,
                row_map=draw(st.none() | a_map if rows == batch else a_map), **more,
            )  # fmt: skip
            entries.append(one)
            start, place = one.extent.stop, one.extent.location
            ends[segment] = place.offset + -(-place.nbytes // ALIGNMENT) * ALIGNMENT
        if draw(st.booleans()):
            start = first_kept = start + draw(st.integers(0, 9))
        layers.append(KeptLayer(layer, tuple(entries), start, first_kept))
    return layers


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any manifest that this version may write."""
    values = st.none() | st.booleans() | counts | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    layers = draw(tables())
    return Manifest(
        lifecycle=draw(st.sampled_from(["runtime-scoped", "persistent"])),
        store_id=draw(st.binary(min_size=16, max_size=16)).hex(),
        strategy=draw(st.text()),
        parameters=draw(st.dictionaries(st.text(), values | st.lists(values) | st.dictionaries(st.text(), values))),
        layers=tuple(layers),
        checksums={extent.location: draw(st.integers(0, 2**64 - 1)) for extent in extents_of(layers)},
    )


def test_a_manifest_has_the_bytes_that_were_written_down() -> None:
    assert EXAMPLE.to_json() == GOLDEN.read_bytes().rstrip(b"\n")
    assert Manifest.from_json(GOLDEN.read_bytes().rstrip(b"\n")) == EXAMPLE


def test_a_manifest_begins_with_the_checksum_of_all_the_rest() -> None:
    raw = EXAMPLE.to_json()
    assert raw == b'{"checksum":"' + xxhash.xxh3_64_hexdigest(raw[31:]).encode() + b'",' + raw[31:]


def test_whatever_byte_is_changed_it_is_noticed() -> None:
    """Also those of numbers that nothing else tells of, such as how many tokens of a last extent are visible."""
    raw = EXAMPLE.to_json()
    for at, byte in enumerate(raw):
        for other in {byte ^ 1, byte ^ 2, ord("7")} - {byte}:
            with pytest.raises(CorruptDataError, match=r"^manifest: "):
                Manifest.from_json(raw[:at] + bytes([other]) + raw[at + 1 :])
    for other in (raw + b"\n", b" " + raw, raw.replace(b",", b", ", 1)):
        with pytest.raises(CorruptDataError, match="checksum"):
            Manifest.from_json(other)


@given(manifests(), st.integers(1, 12))
def test_what_is_written_is_read_back_however_many_rows_it_has(manifest: Manifest, compact_from: int) -> None:
    raw = manifest.to_json(compact_from=compact_from)
    assert raw.isascii()
    assert Manifest.from_json(raw) == manifest


def follows(one: KeptEntry, other: KeptEntry) -> bool:
    """Whether two extents belong in one run, once there are enough of them."""
    same = [
        (entry.extent.key.branch, entry.extent.key.rows, entry.row_map, entry.extent.layout,
         entry.extent.location.segment, entry.extent.location.encoded)
        for entry in (one, other)
    ]  # fmt: skip
    first, second = one.extent, other.extent
    end = first.location.offset + -(-first.location.nbytes // ALIGNMENT) * ALIGNMENT
    return same[0] == same[1] and first.stop == second.start and end == second.location.offset - ALIGNMENT


def frames(manifest: Manifest, compact_from: int = 1) -> list[int]:
    """How many frames each run has, layer after layer."""
    layers = json.loads(manifest.to_json(compact_from=compact_from))["layers"]
    return [len(run["frames"]) for layer in layers for run in layer["runs"]]


@given(manifests())
def test_what_is_contiguous_is_one_run_and_nothing_else_is(manifest: Manifest) -> None:
    expected: list[int] = []
    for layer in manifest.layers:
        for number, one in enumerate(layer.entries):
            if number and follows(layer.entries[number - 1], one):
                expected[-1] += 1
            else:
                expected.append(1)
    assert frames(manifest) == expected
    assert frames(manifest, 10**6) == [1] * len(extents_of(manifest.layers))


def as_they_come(entries: Sequence[KeptEntry], compact_from: int) -> list[int]:
    """The rule, one entry after the other: it is a run; if its branch has so many, those that are contiguous become
    one. How many entries each run has, in order."""
    runs: list[list[KeptEntry]] = []
    for one in entries:
        runs.append([one])
        branch = one.extent.key.branch
        ours = [run for run in runs if run[0].extent.key.branch == branch]
        if len(ours) >= compact_from:
            for before, after in reversed([*itertools.pairwise(ours)]):
                if follows(before[-1], after[0]):
                    before += after
                    runs = [run for run in runs if run is not after]
    return [len(run) for run in sorted(runs, key=lambda run: run[0].extent.start)]


@given(manifests(), st.integers(1, 6))
def test_runs_are_joined_whenever_a_branch_has_so_many(manifest: Manifest, compact_from: int) -> None:
    expected = [count for layer in manifest.layers for count in as_they_come(layer.entries, compact_from)]
    assert frames(manifest, compact_from) == expected


def test_one_two_then_three_become_one_and_two_more_are_three_again() -> None:
    runs = []
    for count in range(1, 10):
        layer = layer_of(*(entry(0, number, 1, 4096 + 8192 * number) for number in range(count)))
        runs.append(len(frames(manifest_of(layer), 3)))
    assert runs == [1, 2, 1, 2, 1, 2, 1, 2, 1]


@pytest.mark.parametrize("compact_from", [1, 64])
def test_a_table_is_written_in_as_many_steps_as_it_has_records(
    compact_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in their square, also where no two of them are neighbours: a long text has tens of thousands."""
    spans: list[int] = []
    real = records.record_span
    monkeypatch.setattr(module, "record_span", lambda location: (spans.append(1), real(location))[1])
    steps = []
    for count in (1000, 2000):
        layer = layer_of(*(entry(0, number, 1, 4096 + 16384 * number) for number in range(count)))
        spans.clear()
        manifest_of(layer).to_json(compact_from=compact_from)
        steps.append(len(spans))
    assert steps[1] <= 2 * steps[0] + 10


def test_branches_that_take_turns_keep_the_order_of_positions() -> None:
    """A number that a closed cache had is used again: a fork of a fork may write under the number of the first."""
    turns = layer_of(*(entry(0, 10 * number, 10, 4096, branch=number % 2, segment=number) for number in range(4)))
    for compact_from in (1, 2, 9):
        assert Manifest.from_json(manifest_of(turns).to_json(compact_from=compact_from)).layers == (turns,)


WRONG: dict[str, tuple[KeptLayer, ...]] = {
    "over each other": (layer_of(entry(0, 0, 10, 4096), entry(0, 10, 10, 4096)),),
    "over each other in two layers": (layer_of(entry(0, 0, 10, 4096)), layer_of(entry(1, 0, 10, 4096, segment=0))),
    "a gap": (layer_of(entry(0, 0, 10, 4096), entry(0, 11, 10, 12288)),),
    "a gap at the beginning": (layer_of(entry(0, 1, 10, 4096)),),
    "a gap at the end": (layer_of(entry(0, 0, 10, 4096), tokens=11),),
    "nothing at all of some tokens": (KeptLayer(0, (), 7),),
    "a gap behind what left a window": (layer_of(entry(0, 0, 10, 4096), entry(0, 30, 10, 12288), first_kept=29),),
    "a window beyond the end": (layer_of(entry(0, 0, 10, 4096), first_kept=11),),
    "not in order": (layer_of(entry(0, 10, 10, 12288), entry(0, 0, 10, 4096), tokens=20, first_kept=20),),
    "layers not in order": (layer_of(entry(1, 0, 10, 4096)), layer_of(entry(0, 0, 10, 4096))),
    "a layer twice": (layer_of(entry(0, 0, 10, 4096)), layer_of(entry(0, 0, 10, 12288))),
    "in another layer than its own": (layer_of(entry(0, 0, 10, 4096), layer=1),),
    "more than there are": (layer_of(entry(0, 0, 31, 4096), tokens=30),),
    "nothing visible": (layer_of(entry(0, 0, 10, 4096, visible=0)),),
    "more visible than there is": (layer_of(entry(0, 0, 10, 4096, visible=11)),),
    "a map to a row that is not there": (layer_of(entry(0, 0, 10, 4096, row_map=(0, 1))),),
    "a map to a row below 0": (layer_of(entry(0, 0, 10, 4096, row_map=(0, -1))),),
    "batches of two sizes": (layer_of(entry(0, 0, 10, 4096, row_map=(0, 0)), entry(0, 10, 10, 12288)),),
    "batches of two sizes in two layers": (
        layer_of(entry(0, 0, 10, 4096, row_map=(0, 0))),
        layer_of(entry(1, 0, 10, 4096)),
    ),
}


@pytest.mark.parametrize("layers", WRONG.values(), ids=WRONG)
def test_a_table_that_could_not_be_read_back_is_not_written(layers: tuple[KeptLayer, ...]) -> None:
    with pytest.raises(CorruptDataError, match=r"^manifest: "):
        manifest_of(*layers).to_json()


def test_a_manifest_that_would_be_too_large_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", len(EXAMPLE.to_json()))
    EXAMPLE.to_json()
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", len(EXAMPLE.to_json()) - 1)
    with pytest.raises(CorruptDataError, match="larger than"):
        EXAMPLE.to_json()


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    content = json.loads(GOLDEN.read_bytes())
    change(content)
    return sealed(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def sealed(raw: bytes) -> bytes:
    """What was changed, with the checksum that it has now."""
    return raw[:13] + xxhash.xxh3_64_hexdigest(raw[31:]).encode() + raw[29:]


def set_in(*path: str | int, value: object) -> Callable[[dict[str, Any]], object]:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


RUN = ("layers", 0, "runs", 0)
COUNTS: list[tuple[str | int, ...]] = [
    ("version",),
    ("sequence_axis",),
    *(("layouts", 0, key) for key in ("kv_heads", "key_size", "value_size")),
    *(("layers", 0, key) for key in ("layer", "tokens", "first_kept")),
    *((*RUN, key) for key in ("branch", "rows", "start", "layout", "segment", "offset")),
    *((*RUN, "frames", 0, number) for number in range(3)),
    ("layers", 1, "runs", 0, "row_map", 0),
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
        place = ("layers", -1) if name == "layer" else ("layers", -1, "runs", -1)
        Manifest.from_json(changed(set_in(*place, name, value=2**32)))


WRONG_TYPES = {
    **{key: [1, None, [], {}, True] for key in ("format", "lifecycle", "store_id", "strategy")},
    "parameters": [1, "x", None, []],
    "layouts": [1, "x", None, {}, [1], [[]], [None]],
    "layers": [1, "x", None, {}, [1], [[]], [None]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG_TYPES.items() for value in values])
def test_a_value_of_another_type_is_refused(key: str, value: object) -> None:
    with pytest.raises(CorruptDataError, match=r"^manifest: "):
        Manifest.from_json(changed(set_in(key, value=value)))


PLACES: dict[str, tuple[str | int, ...]] = {
    "manifest": (),
    "layout": ("layouts", 0),
    "layer": ("layers", 0),
    "run": RUN,
}


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
    "a layout that is not there": set_in(*RUN, "layout", value=2),
    "no layouts": set_in("layouts", value=[]),
    "encoded is a number": set_in(*RUN, "encoded", value=0),
    "said to be raw, but of another length": set_in("layers", 1, "runs", 1, "encoded", value=False),
    "of no rows": set_in(*RUN, "rows", value=0),
    "of other rows": set_in(*RUN, "rows", value=1),
    "no frames": set_in(*RUN, "frames", value=[]),
    "frames are an object": set_in(*RUN, "frames", value={}),
    "frames are text": set_in(*RUN, "frames", value="abcd"),
    "a frame is an object": set_in(*RUN, "frames", 0, value={}),
    "a frame of three": lambda content: inside(content, "run")["frames"][0].pop(),
    "a frame of five": lambda content: inside(content, "run")["frames"][0].append(1),
    "of no tokens": set_in(*RUN, "frames", 0, value=[0, 0, 0, "0" * 16]),
    "more tokens than a record can hold": set_in("layers", 1, "runs", 1, "frames", 0, 0, value=2**32),
    "nothing visible": set_in("layers", 1, "runs", 0, "frames", 0, 1, value=0),
    "more visible than there is": set_in("layers", 1, "runs", 0, "frames", 0, 1, value=11),
    "one byte more than its tokens": set_in(*RUN, "frames", 0, 2, value=7681),
    "checksum is a number": set_in(*RUN, "frames", 0, 3, value=1),
    "checksum too short": set_in(*RUN, "frames", 0, 3, value="0" * 15),
    "checksum not hexadecimal": set_in(*RUN, "frames", 0, 3, value="-" + "0" * 15),
    "a row map is text": set_in(*RUN, "row_map", value="01"),
    "a row map of no rows": set_in(*RUN, "row_map", value=[]),
    "a row map to no row": set_in(*RUN, "row_map", value=[0, 2]),
    "a row map of another batch": set_in(*RUN, "row_map", value=[0, 0, 0]),
    "misaligned": set_in(*RUN, "offset", value=4097),
    "without room for its header": set_in(*RUN, "offset", value=0),
    "on top of each other": set_in("layers", 1, "runs", 0, "segment", value=0),
    "a segment that has no file name": set_in("layers", 1, "runs", 1, "segment", value=10**6),
    "a run twice": lambda content: content["layers"][0]["runs"].append(content["layers"][0]["runs"][-1]),
    "a layer twice": lambda content: content["layers"].append(content["layers"][-1]),
    "gap in the positions": set_in("layers", 1, "runs", 1, "start", value=7),
    "overlap in the positions": set_in("layers", 1, "runs", 1, "start", value=5),
    "layers not in order": lambda content: content["layers"].reverse(),
    "runs not in order": lambda content: content["layers"][1]["runs"].reverse(),
    "further than the layer says": set_in("layers", 0, "tokens", value=29),
    "not as far as the layer says": set_in("layers", 0, "tokens", value=31),
    "a window that has not passed": set_in("layers", 2, "first_kept", value=29),
    "so far away that sums overflow": set_in("layers", 1, "runs", 1, "start", value=2**62),
    "a place so far away that sums overflow": set_in("layers", 1, "runs", 1, "offset", value=2**62),
    "nested deeper than anybody needs": set_in("parameters", value=json.loads('{"a":' * 100 + "1" + "}" * 100)),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(CorruptDataError, match=r"^manifest: "):
        Manifest.from_json(changed(change))


def with_parameters(text: bytes) -> bytes:
    return sealed(GOLDEN.read_bytes().rstrip(b"\n").replace(b'"page_tokens":64', b'"page_tokens":' + text))


@pytest.mark.parametrize(
    "raw",
    {
        "empty": b"",
        "not an object": b"[]",
        "cut off": sealed(GOLDEN.read_bytes()[:-10]),
        "something behind it": sealed(GOLDEN.read_bytes() + b"{}"),
        "key twice": sealed(GOLDEN.read_bytes().replace(b'",', b'","version":1,', 1)),
        "no checksum": b"{" + GOLDEN.read_bytes()[31:],
        "a checksum that is a number": GOLDEN.read_bytes().replace(GOLDEN.read_bytes()[12:30], b"7" * 18, 1),
        "a checksum that no text holds": GOLDEN.read_bytes().replace(GOLDEN.read_bytes()[12:30], b'"\\ud800"', 1),
        "a checksum somewhere else": b"{" + GOLDEN.read_bytes()[31:-2] + b"," + GOLDEN.read_bytes()[1:30] + b"}",
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
        content["layers"][1]["tokens"] = 6 + 2**32 - 1
        content["layers"][1]["runs"][1]["frames"] = [[2**32 - 1, 2**32 - 1, 2**60, "0" * 16]]

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
    content.pop("checksum")
    holder, key = data.draw(st.sampled_from(list(_places(content))))
    holder[key] = data.draw(
        st.none() | st.booleans() | st.integers(-1, 50) | counts | st.text(max_size=3) | st.just([])
    )
    raw = json.dumps({**content, "checksum": "0" * 16}, sort_keys=True, separators=(",", ":")).encode()
    raw = sealed(raw)
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
