"""The one reader of JSON that others may have written: compared with Python's own, and refusals of all else."""

from __future__ import annotations

import json
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollm.io import strict_json
from ollm.io.strict_json import MOST_DEPTH, parse

LIMIT = 1000

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


@given(documents, st.booleans())
def test_what_json_writes_is_read_as_json_reads_it(document, ascii):
    raw = json.dumps(document, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        with pytest.raises(ValueError, match="utf-8"):
            parse(raw, most_bytes=10**6)
    else:
        assert parse(raw, most_bytes=10**6) == json.loads(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b"{'a': 1}", "Expecting property name"),
        (b'{"a": 1, "a": 1}', "a name occurs twice"),
        (b'[{"b": {"a": 1, "\\u0061": 2}}]', "a name occurs twice"),
        (b"NaN", "NaN is no JSON"),
        (b"[-Infinity]", "-Infinity is no JSON"),
        (b"1e999", "1e999 is too large"),
        (b"[-1.5e400]", "-1.5e400 is too large"),
        (b"\xff", "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("{}".encode("utf-16"), "utf-8"),
        ("{}".encode("utf-32-le"), "Expecting"),
        (b"1" * (LIMIT + 1), f"larger than {LIMIT} bytes"),
    ],
)
def test_what_is_doubtful_is_refused_with_a_short_reason(raw, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(raw, most_bytes=LIMIT)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_depth_is_bounded(opening, closing):
    def nested(depth):
        return opening * (depth - 1) + (b"[]" if opening == b"[" else b"{}") + closing * (depth - 1)

    assert parse(nested(MOST_DEPTH), most_bytes=LIMIT) == json.loads(nested(MOST_DEPTH))
    deeper = (MOST_DEPTH + 1, 60, sys.getrecursionlimit() - 100, 10 * sys.getrecursionlimit(), 500_000)
    for depth in deeper:
        with pytest.raises(ValueError, match=f"nested deeper than {MOST_DEPTH}"):
            parse(nested(depth), most_bytes=10**9)


def test_what_is_too_large_is_not_parsed():
    raw = b"[" + b"1," * 10**6 + b"1]"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="larger than"):
            strict_json.parse(raw, most_bytes=LIMIT)
        assert tracemalloc.get_traced_memory()[1] < len(raw) // 10
    finally:
        tracemalloc.stop()
