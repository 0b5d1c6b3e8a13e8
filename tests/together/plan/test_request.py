"""Where a request's values may come from, which goes first, and that a wrong one is an error that says where it is."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from ollm.errors import ConfigurationError
from ollm.plan import CacheRequest

TYPED = {
    "cache_dir": "kv",
    "cache_strategy": "paged",
    "cache_lifecycle": "persistent",
    "cache_window_tokens": 64,
    "ram_budget": 512 * 2**20,
    "spill_policy": "auto",
    "options": {"page_tokens": "4", "verify": "always"},
    "mode": "tensor",
    "dense_projection_chunk_rows": 100,
}
TEXT = {
    **TYPED,
    "cache_window_tokens": "64",
    "ram_budget": "512MiB",
    "options": "page_tokens=4, verify=always",
    "dense_projection_chunk_rows": " 100 ",
}
TOML = """
cache_dir = "kv"
cache_strategy = "paged"
cache_lifecycle = "persistent"
cache_window_tokens = 64
ram_budget = "512MiB"
spill_policy = "auto"
mode = "tensor"
dense_projection_chunk_rows = 100
[options]
page_tokens = "4"
verify = "always"
"""


def settings(tmp_path, toml="", environment=None, **arguments):
    if toml:
        (tmp_path / "ollm.toml").write_text(toml)
    return CacheRequest.from_settings(environment=environment or {}, folder=tmp_path, **arguments)


def test_there_is_a_value_for_every_field_here():
    assert list(TYPED) == [field.name for field in attrs.fields(CacheRequest)]


def test_all_sources_end_the_same(tmp_path):
    request = CacheRequest.from_arguments(**TYPED)
    assert attrs.asdict(request) == TYPED
    assert CacheRequest.from_arguments(**TEXT) == request
    assert CacheRequest(**TYPED) == request
    assert settings(tmp_path, **TEXT) == request
    variables = {f"OLLM_{name.upper()}": value for name, value in TEXT.items()}
    assert settings(tmp_path, environment=variables) == request
    assert settings(tmp_path, TOML) == request


def test_without_values_there_are_defaults(tmp_path):
    request = settings(tmp_path)
    assert request == CacheRequest.from_arguments() == CacheRequest()
    assert (request.cache_strategy, request.cache_lifecycle, request.mode) == ("chunked", "runtime-scoped", "auto")
    assert (request.ram_budget, request.options) == (None, {})


def test_a_path_may_be_a_path():
    assert CacheRequest.from_arguments(cache_dir=Path("a") / "b").cache_dir == str(Path("a") / "b")


def test_arguments_go_before_variables_and_these_before_the_file(tmp_path):
    toml = 'ram_budget = 1\nspill_policy = "file"\nmode = "tensor"\ncache_strategy = "file"'
    variables = {"OLLM_RAM_BUDGET": "2", "OLLM_SPILL_POLICY": "variable", "OLLM_MODE": "block", "PATH": "not ours"}
    request = settings(tmp_path, toml, variables, ram_budget=0, spill_policy=None)
    assert request.ram_budget == 0
    assert request.spill_policy == "variable"
    assert request.mode == "block"
    assert request.cache_strategy == "file"
    assert request.cache_lifecycle == "runtime-scoped"


def test_a_variable_names_another_file(tmp_path):
    (tmp_path / "mine.toml").write_text("ram_budget = 7")
    file = {"OLLM_CONFIG": str(tmp_path / "mine.toml")}
    assert settings(tmp_path, "ram_budget = 1", file).ram_budget == 7
    assert settings(tmp_path, "ram_budget = 1", {"OLLM_CONFIG": ""}).ram_budget == 1
    with pytest.raises(ConfigurationError, match=r"Cannot read the settings in .*nowhere\.toml: No such file"):
        settings(tmp_path, environment={"OLLM_CONFIG": str(tmp_path / "nowhere.toml")})


def test_the_working_directory_and_the_environment_are_the_process_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ollm.toml").write_text('spill_policy = "file"\nmode = "tensor"')
    monkeypatch.setenv("OLLM_MODE", "block")
    request = CacheRequest.from_settings()
    assert (request.spill_policy, request.mode) == ("file", "block")
    assert CacheRequest.from_arguments() == CacheRequest(), "a library call reads neither"


@pytest.mark.parametrize(
    "name", ["OLLM_ACME_TOKEN", "OLLM_MODEL", "OLLM_DISABLE_PLUGINS", "OLLM_CONFIG", "OLLM_", "OLLM", "OLLM_RAM"]
)
def test_variables_of_others_are_theirs(tmp_path, name):
    variables = {name: "", "OLLM_RAM_BUDGET": "2"}
    assert settings(tmp_path, environment=variables) == CacheRequest(ram_budget=2)


@pytest.mark.parametrize("name", ["RAM_BUGDET", "CACHE_STRATGY", "OPTION", "SPILL_POLCIY", "CACHE_DIRS"])
def test_a_slip_in_a_variable_of_ours_is_an_error(tmp_path, name):
    with pytest.raises(ConfigurationError, match=f"^environment: there is no setting 'OLLM_{name}'. Known: OLLM_CACHE"):
        settings(tmp_path, environment={f"OLLM_{name}": "1"})


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"ram_bugdet": 1}, r"^there is no setting 'ram_bugdet'\. Known: cache_dir, cache_strategy, .*chunk_rows\.$"),
        ({"environment": {"OLLM_RAM_BUGDET": "1"}}, "^environment: .* 'OLLM_RAM_BUGDET'. Known: OLLM_CACHE_DIR, OLLM_"),
        ({"toml": "ram_bugdet = 1"}, r"ollm\.toml: there is no setting 'ram_bugdet'. Known: cache_dir, "),
        ({"toml": "[cache]\nram_budget = 1"}, r"ollm\.toml: there is no setting 'cache'"),
        ({"ram_budget": "lots"}, "^ram_budget='lots' is not a size: give a number of bytes"),
        ({"environment": {"OLLM_RAM_BUDGET": "lots"}}, "^environment: ram_budget='lots' is not a size"),
        ({"toml": "ram_budget = 1.5"}, r"ollm\.toml: ram_budget=1.5 is not a size"),
        ({"cache_dir": b"kv"}, "^cache_dir=b'kv': give a path as text"),
        ({"cache_dir": 5}, "^cache_dir=5: expected str"),
        ({"cache_strategy": 5}, "^cache_strategy=5: 5 is not text"),
        ({"mode": ["block"]}, "^mode=.*is not text"),
        ({"cache_window_tokens": "many"}, "^cache_window_tokens='many': 'many' is not a whole number"),
        ({"dense_projection_chunk_rows": True}, "^dense_projection_chunk_rows=True: True is not a whole number"),
        ({"options": "verify"}, "^options='verify': give a mapping of option names to values, or text such as"),
        ({"options": 3}, "^options=3: give a mapping"),
        ({"environment": {"OLLM_OPTIONS": "verify=always,page_tokens"}}, "^environment: options='verify=always,page"),
        ({"toml": "ram_budget = "}, r"ollm\.toml is no TOML: Invalid value"),
    ],
)
def test_a_wrong_value_says_where_it_is(tmp_path, sources, message):
    with pytest.raises(ConfigurationError) as caught:
        settings(tmp_path, **sources)
    assert caught.match(message)


def test_every_field_has_a_text_for_help():
    assert [field.name for field in attrs.fields(CacheRequest) if not field.metadata.get("help")] == []


@pytest.mark.parametrize(
    ("cache_dir", "problem"),
    [
        ("a\0b", "such a character"),
        ("\ud800", "such a character"),
        ("~nobody-has-this-name/kv", "nobody knows where that home is"),
        (b"kv", "give a path as text"),
        (7, "cache_dir=7"),
        (["kv"], "cache_dir="),
    ],
)
def test_a_cache_dir_that_is_no_path_is_refused(cache_dir, problem):
    with pytest.raises(ConfigurationError, match=problem):
        CacheRequest.from_arguments(cache_dir=cache_dir)


def test_a_home_is_found_wherever_the_path_was_written_down(tmp_path, monkeypatch):
    """No shell has seen a file, or an argument."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for request in (
        CacheRequest.from_arguments(cache_dir="~/kv"),
        CacheRequest.from_arguments(cache_dir=Path("~/kv")),
        settings(tmp_path, environment={"OLLM_CACHE_DIR": "~/kv"}),
        settings(tmp_path, toml='cache_dir = "~/kv"'),
    ):
        assert request.cache_dir == str(tmp_path / "kv")
    assert CacheRequest.from_arguments(cache_dir="./~/kv").cache_dir == "./~/kv"
