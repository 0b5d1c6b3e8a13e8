"""The repository keeps its own rules: versions, pins, import contracts, docstrings, what wheels hold."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ollm
from repository.conftest import ROOT

PACKAGES = sorted(path.parent for path in (ROOT / "packages").glob("*/pyproject.toml"))
PLUGINS = [package for package in PACKAGES if package.name != "ollm-core"]
MODULES = sorted((ROOT / "packages").glob("*/src/**/*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PRIVATE_TO_CORE = {
    path.stem
    for path in (ROOT / "packages/ollm-core/src/ollm").iterdir()
    if path.suffix == ".py" or (path / "__init__.py").exists()
} - {"__init__", "plugin", "builtin"}


def project(package):
    return tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def contracts(type_):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [contract for contract in settings["tool"]["importlinter"]["contracts"] if contract["type"] == type_]


def relative(path):
    return str(path.relative_to(ROOT))


def name_of(package):
    return package.name


def test_there_is_something_to_check():
    assert len(PACKAGES) > 1
    assert len(MODULES) > 40
    assert len(PRIVATE_TO_CORE) > 15


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_all_distributions_have_one_version(package):
    assert project(package)["name"] == package.name
    assert project(package)["version"] == ollm.__version__


def test_plugins_and_extras_pin_the_minor_version():
    major, minor = map(int, ollm.__version__.split(".")[:2])
    pin = {f">={major}.{minor}", f"<{major}.{minor + 1}"}
    for plugin in PLUGINS:
        needs = {need.name: need for need in map(Requirement, project(plugin)["dependencies"])}
        assert {str(spec) for spec in needs["ollm-core"].specifier} == pin, plugin.name
    extras = project(ROOT / "packages/ollm-core")["optional-dependencies"]
    optional = {need.name: need for needs in extras.values() for need in map(Requirement, needs)}
    for plugin in PLUGINS:
        assert {str(spec) for spec in optional[plugin.name].specifier} == pin, plugin.name


def test_the_extra_all_has_every_extra_of_users():
    extras = project(ROOT / "packages/ollm-core")["optional-dependencies"]
    everything = {need.name: need.extras for need in map(Requirement, extras["all"])}
    assert everything.pop("ollm-core") == set(extras) - {"all", "testing"}
    assert everything == {
        plugin.name: set(project(plugin)["optional-dependencies"])
        for plugin in PLUGINS
        if "optional-dependencies" in project(plugin)
    }


def test_every_plugin_and_module_is_in_the_import_contracts():
    plugins = {path.name for package in PLUGINS for path in (package / "src").iterdir() if path.is_dir()}
    forbidden = {contract["name"]: contract for contract in contracts("forbidden")}
    of_plugins = forbidden["Plugins import ollm.plugin and nothing else of core"]
    of_builtin = forbidden["The built-in plugin imports ollm.plugin and nothing else of core"]
    assert set(of_plugins["source_modules"]) == plugins
    assert of_builtin["source_modules"] == ["ollm.builtin"]
    private = {f"ollm.{module}" for module in PRIVATE_TO_CORE}
    assert set(of_plugins["forbidden_modules"]) == private | {"ollm.builtin"}
    assert set(of_builtin["forbidden_modules"]) == private
    transformers = forbidden["transformers is imported in the seam only"]
    assert set(transformers["source_modules"]) == plugins | {"ollm"}
    (protected,) = contracts("protected")
    assert set(protected["protected_modules"]) == plugins | {"ollm.builtin"}


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=relative)
def test_every_module_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body


def test_no_path_of_this_machine_is_written_down():
    """Neither where this checkout lies nor the home of who made it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    places = [f"{place}/".encode() for place in (ROOT, Path.home()) if len(place.parts) > 1]
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    assert len(files) > 80
    found = [relative(file) for file in files if any(place in file.read_bytes() for place in places)]
    assert found == []


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_a_wheel_holds_what_it_must(package, tmp_path):
    pytest.importorskip("hatchling")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=package, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        description = archive.read(metadata).decode()
    (module,) = [path.name for path in (package / "src").iterdir() if path.is_dir()]
    assert f"{module}/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    assert any(name.endswith("/entry_points.txt") for name in names)
    assert (package / "README.md").read_text(encoding="utf-8").strip() in description
    modules = {str(path.relative_to(package / "src")) for path in (package / "src").rglob("*.py")}
    assert modules <= set(names)
    assert {name.split("/")[0] for name in names} == {module, metadata.split("/")[0]}
