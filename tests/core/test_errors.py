"""What ollm says of errors that are not its own."""

from __future__ import annotations

import pytest

from ollm.errors import brief

CUDA = "CUDA error: out of memory\nCUDA kernel errors might be reported at some other call. Compile with a flag."


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no"), "RuntimeError: no"),
        (RuntimeError(CUDA), "RuntimeError: CUDA error: out of memory"),
        (ValueError("x" * 500), f"ValueError: {'x' * 160} …"),
        (KeyError(), "KeyError"),
    ],
)
def test_what_goes_on_and_on_is_cut(error, said):
    assert brief(error) == said
