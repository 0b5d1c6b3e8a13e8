"""`ollm plugins` as a person and as a program read it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ollm import __version__
from ollm.cli import app, main
from ollm.errors import ConfigurationError
from ollm.registry import registry

STORE = """
import attrs
from ollm.plugin import option


@attrs.frozen(kw_only=True)
class Options:
    journal: bool = option(True, help="Write a journal.")


@hookimpl
def ollm_kv_stores():
    facts = KVFacts(lossless=False, full_history=False, directory="kv_cache_sqlite", downsides="Slow.")
    return [Strategy(name="sqlite", summary="Extents in SQLite.", build=build, facts=facts, options=Options)]


@hookimpl
def ollm_commands():
    return [Command(name="chat", summary="Talk.", target="acme_kv:chat")]
"""


@pytest.fixture
def output(installer):
    """`output("-v")`: what the command prints with a good and a broken third party installed."""
    installer.install("acme-kv", STORE)
    installer.install("beta-kv", "raise RuntimeError('no beta today')", point="beta")
    registry.cache_clear()

    def run(*arguments):
        result = CliRunner().invoke(app, ["plugins", *arguments])
        assert result.exit_code == 0
        return result.stdout

    yield run
    registry.cache_clear()


def squeeze(text):
    return " ".join(text.split())


def test_the_list_names_distribution_version_strategies_and_reasons(output):
    text = squeeze(output())
    assert f"ollm-core {__version__} plugin 'core' in ollm.builtin: loaded" in text
    assert "acme-kv 1.0 plugin 'acme' in acme_kv: loaded KV store sqlite Extents in SQLite. command chat Talk." in text
    assert "beta-kv 1.0 plugin 'beta' in beta_kv: broken RuntimeError: no beta today at" in text
    assert "Write a journal" not in text


def test_verbose_adds_facts_and_options(output):
    text = squeeze(output("-v"))
    kept = "not lossless: keeps a window and forgets what is older; what it keeps comes back as other numbers"
    assert f"{kept}; folder: kv_cache_sqlite; spill policy: auto" in text
    assert "downsides: Slow." in text
    assert "option journal (bool, default True): Write a journal." in text


def test_verbose_says_options_that_stores_share_once(output):
    text = squeeze(output("-v"))
    assert text.count("max_disk_bytes (ByteSize | None, default None):") == 1
    assert text.count("min_free_bytes (ByteSize, default 256.0 MiB):") == 1
    chunked = text[text.index("KV store chunked") :]
    assert "options of storage: see the end" in chunked[: chunked.index("spill policy auto Flush")]


def test_verbose_calls_no_window_lossless(installer):
    installer.install("acme-kv", STORE.replace("lossless=False", "lossless=True"))
    registry.cache_clear()
    text = squeeze(CliRunner().invoke(app, ["plugins", "-v"]).stdout)
    registry.cache_clear()
    sqlite = text[text.index("KV store sqlite") :]
    assert sqlite[: sqlite.index("option journal")].count("lossless") == 1
    assert "not lossless: keeps a window and forgets what is older; what it keeps is exact" in sqlite


def test_json_holds_all_of_it(output):
    plugins = {plugin["name"]: plugin for plugin in json.loads(output("--json"))["plugins"]}
    assert plugins["beta"]["status"] == "broken"
    assert plugins["beta"]["reason"].startswith("RuntimeError: no beta today")
    assert plugins["acme"] == {
        "name": "acme",
        "module": "acme_kv",
        "distribution": "acme-kv",
        "version": "1.0",
        "status": "loaded",
        "reason": None,
        "warnings": [],
        "strategies": [
            {
                "kind": "KV store",
                "name": "sqlite",
                "qualified_name": "acme-kv/sqlite",
                "summary": "Extents in SQLite.",
                "facts": {
                    "lossless": False,
                    "full_history": False,
                    "directory": "kv_cache_sqlite",
                    "spill_policy": "auto",
                    "downsides": "Slow.",
                },
                "options": [{"name": "journal", "type": "bool", "default": True, "help": "Write a journal."}],
            }
        ],
        "commands": [{"name": "chat", "qualified_name": "acme-kv/chat", "summary": "Talk."}],
    }


def test_warnings_and_the_names_that_work_are_listed(installer):
    """`chunked` is core's own: a third party's is reached by its qualified name, and listed by it."""
    installer.install("acme-kv", STORE.replace('name="sqlite"', 'name="chunked"').replace("Write a journal.", ""))
    registry.cache_clear()
    text, listing = (CliRunner().invoke(app, ["plugins", *more]).stdout for more in ([], ["--json"]))
    registry.cache_clear()
    warning = "option 'journal' of 'chunked' has no help text: make it with `ollm.plugin.option`"
    assert f"loaded warning: {warning} KV store acme-kv/chunked Extents in SQLite." in squeeze(text)
    acme = next(plugin for plugin in json.loads(listing)["plugins"] if plugin["name"] == "acme")
    assert acme["warnings"] == [warning]
    assert acme["strategies"][0]["name"] == "acme-kv/chunked"


def test_a_default_that_json_does_not_know_is_listed_as_text(installer):
    installer.install("acme-kv", STORE.replace("option(True,", "option(attrs.Factory(list),"))
    registry.cache_clear()
    result = CliRunner().invoke(app, ["plugins", "--json"])
    registry.cache_clear()
    acme = next(plugin for plugin in json.loads(result.stdout)["plugins"] if plugin["name"] == "acme")
    assert acme["strategies"][0]["options"][0]["default"].startswith("Factory(")


@pytest.mark.parametrize(
    "code",
    [
        "import ollm, ollm.plugin, ollm.errors",
        "from ollm.registry import registry; assert registry().reports",
        "from ollm.cli import app; app(['plugins', '-v'], standalone_mode=False)",
    ],
)
def test_listing_imports_neither_torch_nor_transformers(code):
    check = (
        f"{code}\nimport sys\nassert not {{'torch', 'transformers', 'numpy'}} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


def test_the_command_is_installed():
    environment = {**os.environ, "OLLM_DISABLE_PLUGINS": "core"}
    result = subprocess.run(
        [sys.executable, "-c", "from ollm.cli import main; main()", "plugins"],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    assert "disabled" in result.stdout
    assert "switched off by OLLM_DISABLE_PLUGINS" in result.stdout
    assert result.stderr == ""


def test_version():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"ollm {__version__}\n"


@pytest.mark.parametrize("command", [[], ["plugins"], ["doctor"]])
def test_help_has_a_short_form(command):
    long, short = (CliRunner().invoke(app, [*command, option]) for option in ("--help", "-h"))
    assert long.exit_code == short.exit_code == 0
    assert long.stdout == short.stdout


def test_an_error_that_ollm_raises_on_purpose_is_one_line(monkeypatch, capsys):
    def fail():
        raise ConfigurationError("do this instead")

    monkeypatch.setattr("ollm.cli.app", fail)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "ollm: do this instead\n"
