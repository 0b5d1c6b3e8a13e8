"""Reading a text to be asked about."""

from __future__ import annotations

import pytest

from ollm import file_get_contents
from ollm.errors import ConfigurationError


def test_the_text_of_a_file(tmp_path):
    (tmp_path / "text.txt").write_bytes("\ufeffÜber alles, und mehr.\n".encode())
    assert file_get_contents(tmp_path / "text.txt") == "Über alles, und mehr.\n"


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"Cannot read .*nowhere\.txt"):
        file_get_contents(tmp_path / "nowhere.txt")
