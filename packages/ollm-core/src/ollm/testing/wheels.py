"""Builds a plugin's wheel and looks into it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

_NOT_IN_A_WHEEL = {"tests", "test", "docs", "examples", "benchmarks", "build", "dist"}


def check_wheel(project: Path, target: Path, distribution: str, module: str) -> None:
    """Build `project` into `target` and check what came out.

    Args:
        project: the folder of `pyproject.toml`.
        target: an empty folder.
        distribution: the name that it must have.
        module: its entry module.
    """
    wheel = _build(project, target)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode() if f"{info}/entry_points.txt" in names else ""
    assert metadata["Name"].lower().replace("_", "-") == distribution
    assert "[ollm]" in entry_points, "no entry point in the group 'ollm'"
    assert module in entry_points
    top = {name.split("/")[0] for name in names} - {info}
    assert module.split(".")[0] in {name.removesuffix(".py") for name in top}, f"{module} is not in the wheel: {top}"
    assert not top & _NOT_IN_A_WHEEL, "what would be installed for everybody beside the plugin"
    assert not top & {"ollm"}, "the module ollm is ollm-core's"
    assert not [name for name in names if name.endswith((".pyc", ".so.lock")) or "__pycache__" in name]
    needs = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    cores = [need for need in needs if need.name == "ollm-core" and "extra" not in str(need.marker)]
    assert cores, "it must require ollm-core"
    bounds = {specifier.operator for need in cores for specifier in need.specifier}
    assert bounds & {"<", "<=", "==", "~="}, "ollm-core needs an upper bound, such as ollm-core>=0.1,<0.2"
    assert metadata["Requires-Python"], "requires-python"
    assert metadata["Summary"], "a description"


def _build(project: Path, target: Path) -> Path:
    if find_spec("build") is None:
        pytest.skip("building a wheel needs: pip install build")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}", pytrace=False)
    (wheel,) = target.glob("*.whl")
    return wheel
