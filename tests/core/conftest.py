"""Distributions that are really installed, as far as Python can tell: a folder on the path with a `.dist-info`."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

import pytest

from ollm.registry import Registry
from ollm.registry.discovery import discover

PRELUDE = """
from ollm.plugin import Command, KVFacts, Strategy, hookimpl

ollm_api_version = 1
LOSSLESS = KVFacts(lossless=True)


def build(context):
    return context


"""


class Installer:
    """Installs fake distributions on `sys.path` and discovers what is there."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.paths: list[Path] = []
        self._modules: list[str] = []

    def install(self, distribution: str, code: str, *, point: str = "acme") -> None:
        """Install version 1.0 of a distribution with one module and one entry point."""
        module = re.sub(r"[-.]", "_", distribution)
        site = self._root / distribution
        info = site / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(PRELUDE + textwrap.dedent(code))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ollm]\n{point} = {module}\n")
        sys.path.insert(0, str(site))
        self.paths.append(site)
        self._modules.append(module)

    def registry(self) -> Registry:
        """What discovery makes of core, of `ollm-offload` if it is there, and of what was installed here."""
        return Registry(
            tuple(report for report in discover() if not report.distribution.startswith(("ollm-kv-", "ollm-bench")))
        )

    def report(self, distribution: str):
        """The report on one distribution; the rest must be sound."""
        reports = {report.distribution: report for report in self.registry().reports}
        assert {name for name, report in reports.items() if report.status.value == "loaded"} >= {"ollm-core"}
        return reports[distribution]

    def remove(self) -> None:
        for path in self.paths:
            sys.path.remove(str(path))
        for module in self._modules:
            sys.modules.pop(module, None)


@pytest.fixture
def installer(tmp_path):
    """Installs distributions for the length of a test."""
    installer = Installer(tmp_path)
    yield installer
    installer.remove()
