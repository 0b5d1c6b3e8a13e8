"""`ollm doctor`: is this installation sound? Says what is wrong and what to do; changes nothing."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import importlib_metadata
import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from ollm.registry import Status, registry

_DISTRIBUTION = "ollm-core"
_CHECKED = ("torch", "transformers")


def doctor() -> None:
    """Check the installation: versions, devices, plugins, and other distributions that provide the module `ollm`.

    Exit code 1 when something is wrong.
    """
    console = Console(soft_wrap=True, highlight=False)
    sound = True
    for check in (_python(), _module(), *_dependencies(), _devices(), *_plugins()):
        good, text = check
        sound &= good
        console.print(Text("ok       " if good else "problem  ", style="green" if good else "bold red"), end="")
        console.print(Text(text))
    if not sound:
        raise typer.Exit(1)


def _python() -> tuple[bool, str]:
    system = platform.system()
    note = "" if system == "Linux" else f" on {system}, where ollm is not tested"
    return True, f"Python {platform.python_version()}{note}"


def _module() -> tuple[bool, str]:
    """The name `ollm` on the public index is another project's, with the same import name."""
    providers = sorted(set(importlib_metadata.packages_distributions().get("ollm", [])))
    others = [name for name in providers if name != _DISTRIBUTION]
    if others:
        return False, (
            f"the module ollm is provided by {', '.join(providers)}, which overwrite each other: "
            f"pip uninstall {' '.join(providers)}, then pip install {_DISTRIBUTION}"
        )
    return True, f"module ollm comes from {_DISTRIBUTION} {importlib_metadata.version(_DISTRIBUTION)}"


def _dependencies() -> Iterator[tuple[bool, str]]:
    wanted = {need.name: need for need in map(Requirement, importlib_metadata.requires(_DISTRIBUTION) or [])}
    for name in _CHECKED:
        try:
            version = importlib_metadata.version(name)
        except importlib_metadata.PackageNotFoundError:
            yield False, f"{name} is not installed: pip install '{wanted[name]}'"
            continue
        if wanted[name].specifier.contains(version, prereleases=True):
            yield True, f"{name} {version}"
        else:
            yield False, f"{name} {version} is outside what ollm is tested with: pip install '{wanted[name]}'"


def _devices() -> tuple[bool, str]:
    try:
        import torch
    except ImportError as error:
        return False, f"torch cannot be imported: {error}"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return True, f"devices: cpu{''.join(f', cuda:{index} ({name})' for index, name in enumerate(names))}"


def _plugins() -> Iterator[tuple[bool, str]]:
    for report in registry().reports:
        if report.status is Status.BROKEN:
            yield False, f"plugin {report}. Upgrade or uninstall it, or set OLLM_DISABLE_PLUGINS={report.name}"
        else:
            yield True, f"plugin {report}"
        for warning in report.warnings:
            yield True, f"plugin {report.name}: {warning}"
