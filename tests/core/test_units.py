"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollm.errors import ConfigurationError
from ollm.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (1234, 1234),
        ("0", 0),
        ("512", 512),
        ("512 B", 512),
        ("512MiB", 512 * 2**20),
        ("512mib", 512 * 2**20),
        (" 1.5 GiB ", 3 * 2**29),
        ("2GB", 2 * 10**9),
        ("3 TiB", 3 * 2**40),
        ("7kB", 7000),
        ("1.001kB", 1001),  # binary floats make 1000 of it
    ],
)
def test_sizes_that_are_understood(text, nbytes):
    assert parse_size(text, "ram_budget") == nbytes


@given(st.integers(0, 2**90))
def test_a_number_and_its_text_are_the_same_size(nbytes):
    """Beyond 2**53 as well, where binary floats have gaps."""
    assert parse_size(nbytes, "x") == parse_size(str(nbytes), "x") == parse_size(f"{nbytes} B", "x") == nbytes


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_size_beyond_all_measure_is_no_accident(digits):
    """More than a float holds, and more digits than `int` reads from text."""
    assert parse_size("9" * digits, "x") > 10 ** (digits - 1)


@pytest.mark.parametrize(
    "value",
    [
        -1,
        1.5,
        True,
        None,
        b"5",
        "",
        " ",
        "MiB",
        "-5MiB",
        "+5",
        "1e9",
        ".5",
        "1.",
        "1,5 GiB",
        "5 MiB of it",
        "5 G",
        "٣x",
    ],
)
def test_everything_else_names_the_argument(value):
    with pytest.raises(
        ConfigurationError, match=r"ram_budget=.* is not a size: give a number of bytes or text such as"
    ):
        parse_size(value, "ram_budget")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (5 * 2**29, "2.5 GiB"), (2**42, "4.0 TiB")],
)
def test_sizes_are_printed_in_binary_units(nbytes, text):
    assert format_size(nbytes) == text


@given(st.integers(0, 2**50))
def test_what_is_printed_is_understood_and_close(nbytes):
    assert abs(parse_size(format_size(nbytes), "x") - nbytes) <= 0.05 * nbytes + 1
