"""What a model id means, and what is said of one that means nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ollm.errors import ConfigurationError, ModelDirectoryError
from ollm.models.directory import check_model_directory
from ollm.models.references import resolve_reference


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("llama3-1b-chat", "llama3-1B-chat"), ("llama-8B-chat", "llama3-8B-chat"), ("GPT-OSS-20B", "gpt-oss-20B")],
)
def test_an_alias_that_is_nearly_right(wrong, meant):
    with pytest.raises(ConfigurationError, match=f"Did you mean '{meant}'"):
        resolve_reference(wrong)


@pytest.mark.parametrize("wrong", ["", "x", 7, None, "Tell me a story"])
def test_what_is_like_nothing_gets_no_guess(wrong):
    with pytest.raises(ConfigurationError) as caught:
        resolve_reference(wrong)
    assert "Did you mean" not in str(caught.value)


def test_a_directory_that_is_nearly_right(tmp_path):
    (tmp_path / "my-llama").mkdir()
    (tmp_path / "my-llama.txt").touch()
    with pytest.raises(ModelDirectoryError, match=r"no model directory .*my-lama\. Did you mean 'my-llama'\? Get it"):
        check_model_directory(tmp_path / "my-lama", where_from="Get it.")


def test_a_directory_that_is_like_nothing_there():
    for path in (Path("/nowhere/at/all"), Path("quite-another-name")):
        with pytest.raises(ModelDirectoryError) as caught:
            check_model_directory(path)
        assert "Did you mean" not in str(caught.value)
