"""`disk_cache` and `Inference.DiskCache` take what a request holds, and say so themselves."""

from __future__ import annotations

import inspect

import attrs
import pytest

from ollm import AutoInference, Inference, disk_cache
from ollm.errors import ConfigurationError
from ollm.plan import CacheRequest
from together.tiny_models import make_model

FIELDS = [field.name for field in attrs.fields(CacheRequest)]
FIRST = {disk_cache: "model", Inference.DiskCache: "self", AutoInference.DiskCache: "self"}


@pytest.mark.parametrize("function", FIRST)
def test_its_signature_is_that_of_a_request(function):
    parameters = inspect.signature(function).parameters
    assert list(parameters) == [FIRST[function], *FIELDS, "progress"]
    fields = attrs.fields_dict(CacheRequest)
    assert all(parameters[name].default == fields[name].default for name in FIELDS)
    assert parameters["ram_budget"].annotation == int | str | None


@pytest.mark.parametrize("function", FIRST)
def test_its_documentation_has_every_argument(function):
    words = " ".join(inspect.getdoc(function).split())
    for field in attrs.fields(CacheRequest):
        assert f"{field.name}: {field.metadata['help']}" in words
    assert words.index("Args:") < words.index("cache_dir:") < words.index("progress:") < words.index("Raises:")
    assert "{" not in words


def test_neither_file_nor_environment_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ollm.toml").write_text('cache_strategy = "nonsense"')
    monkeypatch.setenv("OLLM_CACHE_STRATEGY", "nonsense")
    monkeypatch.setenv("OLLM_NONSENSE", "1")
    with disk_cache(make_model("llama"), cache_dir=tmp_path / "kv") as cache:
        assert cache.state().strategy == "chunked"


def test_arguments_may_be_given_in_any_way_that_python_has(tmp_path):
    model = make_model("llama")
    with disk_cache(model=model, cache_dir=tmp_path, mode="tensor") as cache:
        assert cache.state().mode == "tensor"
    with disk_cache(model, tmp_path, "paged") as cache:
        assert cache.state().strategy == "paged"
    with pytest.raises(TypeError, match="model"):
        disk_cache(cache_dir=tmp_path)
    with pytest.raises(TypeError, match="multiple values"):
        disk_cache(model, tmp_path, cache_dir=tmp_path)


def test_an_unknown_argument_names_the_known_ones(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no setting 'cache_dri'\. Known: cache_dir, cache_strategy, "):
        disk_cache(make_model("llama"), cache_dri=tmp_path)
