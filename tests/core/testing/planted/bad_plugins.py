"""Distributions with one fault each, and the test of `PluginTests` that is named for it.

`make_site` puts them into a folder, as if they were installed; `make_projects` writes what they are built from.
"""

from __future__ import annotations

import os
from pathlib import Path

from ollm.testing import PluginTests

CAUGHT = {}
PROJECTS = Path(os.environ.get("PLANTED_PROJECTS", "nowhere"))

_SOUND = """
import attrs

from ollm.plugin import Command, KVFacts, NoOptions, OffloadPlacement, StorageOptions, Strategy, hookimpl, option

ollm_api_version = 1


@attrs.frozen(kw_only=True)
class Options:
    level: int = option(1, help="How much.", validator=attrs.validators.ge(0))


@attrs.frozen(kw_only=True)
class Trusting(StorageOptions):
    verify: str = option("never", help="When hashes are checked.")


class First(OffloadPlacement):
    def place(self, layer_bytes, *, count, budget):
        return ()


def build_store(context):
    from core.testing.planted.sound import {store}

    return {store}({argument})


def greet(name: str = "you"):
    print("hello", name)


@hookimpl
def ollm_commands():
    return [Command(name="{module}-greet", summary="Say hello.", target="{entry}:greet")]


@hookimpl
def ollm_offload_placements():
    return [Strategy(name="{module}-first", summary="None.", build=lambda context: First())]


@hookimpl
def ollm_kv_stores():
    facts = KVFacts(lossless={lossless}, directory={directory}, full_history={full_history})
    return [Strategy(name="{name}", summary="In memory.", build=build_store, facts=facts, options={options})]
"""
_USUAL = {
    "store": "MemoryStore", "argument": "context.window_tokens", "lossless": True, "directory": None,
    "full_history": True, "options": "Options",
}  # fmt: skip
_PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "1.0"
description = "Planted."
requires-python = ">=3.11"
dependencies = [{needs}]

{entry_points}

[tool.hatch.build.targets.wheel]
{packages}
"""
_ENTRY = '[project.entry-points.ollm]\nacme = "{module}"'

CODE = {}
"""The entry module of each distribution."""
PROJECT = {}
"""What is unusual about how each is built."""


def plugin(test, says, *, change=(), project=None, **facts):
    """Marks a test class, whose distribution is named after it; `change` is a pair of texts in its entry module."""

    def mark(case):
        module = case.__name__.lower()
        case.distribution = f"planted-{module.removeprefix('test')}"
        usual = {**_USUAL, "module": module, "entry": module_of(case.distribution), "name": f"{module}-store"}
        code = _SOUND.format(**{**usual, **facts})
        if change:
            assert change[0] in code
            code = code.replace(*change)
        CODE[case.distribution], PROJECT[case.distribution] = code, project or {}
        case.project = PROJECTS / case.distribution
        if test:
            CAUGHT[case.__name__] = (test, says)
        return case

    return mark


def module_of(distribution):
    return distribution.replace("-", "_")


def make_site(folder: Path) -> None:
    """Every distribution as an installer leaves it."""
    for distribution, code in CODE.items():
        module = module_of(distribution)
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ollm]\n{distribution} = {module}\n")


def make_projects(folder: Path) -> None:
    """What each is built from."""
    for distribution, code in CODE.items():
        module, more = module_of(distribution), PROJECT[distribution]
        project = folder / distribution
        (project / "tests").mkdir(parents=True)
        (project / f"{module}.py").write_text(code)
        (project / "tests" / "test_it.py").write_text("")
        settings = {
            "distribution": distribution, "needs": '"ollm-core>=0.1,<0.2"',
            "entry_points": _ENTRY.format(module=module), "packages": f'only-include = ["{module}.py"]', **more,
        }  # fmt: skip
        (project / "pyproject.toml").write_text(_PROJECT.format(**settings))


@plugin(None, "")
class TestSoundPlugin(PluginTests):
    """Passes everything."""


@plugin("test_it_is_found_and_loads", "states no `ollm_api_version`", change=("ollm_api_version = 1", ""))
class TestNoVersion(PluginTests):
    """It forgot to say what it was written for."""


@plugin("test_it_is_found_and_loads", "no entry point in the group 'ollm' belongs to 'planted-notinstalled'")
class TestNotInstalled(PluginTests):
    """`test_kit.py` takes its entry point away."""


@plugin(
    "test_its_entry_module_is_light", "import what is heavy in `build`", change=("import attrs", "import attrs, torch")
)
class TestHeavy(PluginTests):
    """Its entry module imports torch."""


@plugin("test_nothing_is_warned_of", "no help text", change=('help="How much."', 'help=""'))
class TestOptionWithoutHelp(PluginTests):
    """Nobody knows what it does."""


@plugin("test_options_have_defaults_that_are_valid", "level.*'>= 0'|must be >= 0", change=("option(1,", "option(-1,"))
class TestDefaultThatIsRefused(PluginTests):
    """By its own validator."""


@plugin("test_its_names_are_its_own", "names that belong to ollm itself", name="chunked")
class TestReservedName(PluginTests):
    """Of a store."""


@plugin(
    "test_its_commands_have_names_of_their_own", "belong to ollm itself", change=("testreservedcommand-greet", "serve")
)
class TestReservedCommand(PluginTests):
    """Of a command."""


@plugin("test_its_commands_show_their_help", "cannot be imported: AttributeError", change=(":greet", ":gret"))
class TestCommandThatIsNotThere(PluginTests):
    """Its target is misspelt."""


@plugin(
    "test_build_makes_what_the_hook_promises", r"build\(\) of", change=("build=lambda context: First()", "build=repr")
)
class TestBuildMakesSomethingElse(PluginTests):
    """Text in place of a placement."""


@plugin("test_facts_are_true", "bytes differ", store="RoundingStore")
class TestNotLossless(PluginTests):
    """Though its facts say so."""


@plugin("test_facts_are_true", "directory", directory='"kv_cache_planted"')
class TestNoDirectory(PluginTests):
    """Its facts name one."""


@plugin("test_facts_are_true", "full_history", argument="16")
class TestHasAWindow(PluginTests):
    """Its facts say that it keeps everything."""


@plugin(
    "test_damage_is_noticed_with_the_default_options", "other (keys|values) of .* and no error", store="PlainStore",
    argument="context.storage()", directory='"kv_cache_trusting"', options="Trusting",
)  # fmt: skip
class TestTrustsTheDiskByDefault(PluginTests):
    """Its options, which are those of storage, say that nothing is checked."""


@plugin("test_the_wheel_is_complete", "needs an upper bound", project={"needs": '"ollm-core>=0.1"'})
class TestWheelWithoutABound(PluginTests):
    """It takes any later ollm-core."""


@plugin("test_the_wheel_is_complete", "it must require ollm-core", project={"needs": ""})
class TestWheelWithoutCore(PluginTests):
    """It requires nothing."""


@plugin("test_the_wheel_is_complete", "beside the plugin", project={"packages": 'include = ["*.py", "tests"]'})
class TestWheelWithTests(PluginTests):
    """They would be installed for everybody."""


@plugin("test_the_wheel_is_complete", "no entry point", project={"entry_points": ""})
class TestWheelWithoutEntryPoint(PluginTests):
    """So nobody finds it."""
