"""Commands of plugins as people call them: found, imported when they are run, told apart, and missing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ollm.cli import app, main
from ollm.errors import AmbiguousStrategyError, PluginError, UnknownStrategyError
from ollm.plugin import Command
from ollm.registry import registry

FUNCTION = """
def greet(name: str = "you", loud: bool = False):
    \"""Say hello.\"""
    print(f"hello {name}" + "!" * loud)


@hookimpl
def ollm_commands():
    yield Command(name="greet", summary="Say hello to somebody.", target="MODULE:greet")
"""
APP = """
import typer

app = typer.Typer(add_completion=False)


@app.callback()
def both():
    \"""Two things.\"""


@app.command()
def one(count: int = 1):
    print(f"one {count}")


@app.command()
def two():
    from ollm.plugin import ConfigurationError

    raise ConfigurationError("do this instead")


@hookimpl
def ollm_commands():
    yield Command(name="things", summary="Do things.", target="acme_kv:app")
"""


def function(module):
    return FUNCTION.replace("MODULE", module)


@pytest.fixture
def ollm(installer, monkeypatch):
    """`ollm("greet", ...)` runs a command among what is installed, ollm-bench apart."""
    monkeypatch.setenv("OLLM_DISABLE_PLUGINS", "ollm-bench")

    def run(*arguments):
        registry.cache_clear()
        return CliRunner().invoke(app, arguments)

    yield run
    registry.cache_clear()


def test_a_function_is_a_command(installer, ollm):
    installer.install("acme-kv", function("acme_kv"))
    assert ollm("greet").stdout == "hello you\n"
    assert ollm("greet", "--name", "Ann", "--loud").stdout == "hello Ann!\n"
    assert "--loud" in ollm("greet", "--help").stdout
    assert ollm("greet", "--lout").exit_code == 2
    assert "greet    Say hello to somebody." in ollm("--help").stdout


def test_an_app_is_a_command_with_commands(installer, ollm):
    installer.install("acme-kv", APP)
    assert ollm("things", "one", "--count", "3").stdout == "one 3\n"
    assert "Two things." in ollm("things", "--help").stdout
    assert str(ollm("things", "two").exception) == "do this instead"


def test_what_a_command_names_is_imported_when_it_is_run(installer, ollm):
    code = function("no_such_module_anywhere")
    installer.install("acme-kv", code)
    assert "greet" in ollm("--help").stdout
    assert ollm("plugins").exit_code == 0
    error = ollm("greet").exception
    assert isinstance(error, PluginError)
    assert "command 'greet': no_such_module_anywhere:greet cannot be imported: ModuleNotFoundError" in str(error)


@pytest.mark.parametrize(
    ("target", "reason"),
    [("acme_kv:missing", "cannot be imported: AttributeError"), ("acme_kv:LOSSLESS", "neither a typer app nor a func")],
)
def test_a_target_that_is_none_is_an_error_of_the_plugin(installer, ollm, target, reason):
    installer.install("acme-kv", function("acme_kv").replace("acme_kv:greet", target))
    error = ollm("greet").exception
    assert isinstance(error, PluginError)
    assert reason in str(error)


def test_a_name_that_two_offer_is_nobodys(installer, ollm):
    for distribution, module in (("acme-kv", "acme_kv"), ("beta-kv", "beta_kv")):
        installer.install(distribution, function(module))
    error = ollm("greet").exception
    assert isinstance(error, AmbiguousStrategyError)
    assert "command 'greet' is offered by several" in str(error)
    assert "Use one of: acme-kv/greet, beta-kv/greet" in str(error)
    assert ollm("beta-kv/greet").stdout == "hello you\n"
    assert {"acme-kv/greet", "beta-kv/greet"} <= set(ollm("--help").stdout.split())


@pytest.mark.parametrize("name", ["bench", "serve", "plugins"])
def test_a_reserved_name_is_ollms_own_or_nothing(installer, ollm, name):
    code = function("acme_kv").replace('name="greet"', f'name="{name}"')
    installer.install("acme-kv", code)
    assert ollm(f"acme-kv/{name}").stdout == "hello you\n"
    found = ollm(name)
    if name == "plugins":
        assert "plugin 'core' in ollm.builtin: loaded" in found.stdout
    else:
        assert isinstance(found.exception, UnknownStrategyError)
        assert f"The bare name is reserved; use acme-kv/{name}." in str(found.exception)
        assert ("pip install" in str(found.exception)) is (name == "bench"), "nothing else is published"


def test_bench_that_is_not_there_comes_with_the_command(ollm, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ollm", "bench", "kv", "--tokens", "8192"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "ollm: No command named 'bench'." in line
    assert "'bench' ships in ollm-bench: pip install 'ollm-core[bench]'." in line


@pytest.mark.parametrize(
    ("name", "more"), [("serve", ""), ("plugin", " Did you mean 'plugins'?"), ("gret", " Did you")]
)
def test_an_unknown_command_is_typers_own_error(installer, ollm, name, more):
    installer.install("acme-kv", function("acme_kv"))
    result = ollm(name)
    assert result.exit_code == 2
    assert f"No such command '{name}'.{more}" in result.output


def test_a_broken_plugin_has_no_commands_and_a_switched_off_one_neither(installer, ollm, monkeypatch):
    installer.install("acme-kv", function("acme_kv") + "\nraise RuntimeError('no')")
    assert ollm("greet").exit_code == 2
    installer.install("beta-kv", function("beta_kv"), point="beta")
    assert ollm("greet").exit_code == 0
    monkeypatch.setenv("OLLM_DISABLE_PLUGINS", "beta")
    assert ollm("greet").exit_code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["plugins", "--json"]])
def test_listing_imports_nothing_heavy(arguments):
    """Each of these takes more processor time than listing what there is may take in all; rich is for tables only."""
    heavy = {"torch", "transformers", "numpy", "pydantic", "cattrs", "markdown_it", "pygments", "packaging", "psutil"}
    heavy |= {"rich"} if arguments == ["--help"] else set()
    script = (
        f"import sys; sys.argv = ['ollm', *{arguments!r}]\n"
        "from ollm.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"found = sorted({heavy!r} & set(sys.modules)); assert not found, found\n"
        "found = [name for name in sys.modules if name.startswith(('ollm_bench.', 'ollm.cli.doctor'))]\n"
        "assert not found, found"
    )
    environment = {**os.environ, "OLLM_DISABLE_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_command_is_a_record_of_three_texts():
    command = Command(name="greet", summary="Say hello.", target="acme.commands:greet")
    with pytest.raises(AttributeError):
        command.name = "other"
    with pytest.raises(TypeError, match="summary"):
        Command(name="greet", summary=7, target="acme.commands:greet")
