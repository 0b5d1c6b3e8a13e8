"""`ollm doctor` tells a sound installation from one that is not."""

from __future__ import annotations

import sys

import importlib_metadata
import pytest
from typer.testing import CliRunner

from ollm.cli import app
from ollm.registry import PluginReport, Registry, Status


def run():
    result = CliRunner().invoke(app, ["doctor"])
    return result.exit_code, result.stdout


def test_a_sound_installation():
    code, output = run()
    assert code == 0
    assert "problem" not in output
    for expected in (
        "Python 3.",
        "module ollm comes from ollm-core",
        "torch 2.",
        "transformers 5.",
        "devices: cpu",
        "core",
    ):
        assert expected in output


def test_a_second_distribution_that_provides_the_module(monkeypatch):
    """The older project on the public index has the same import name: whichever was installed last wins by chance."""
    monkeypatch.setattr(importlib_metadata, "packages_distributions", lambda: {"ollm": ["ollm-core", "ollm"]})
    code, output = run()
    assert code == 1
    assert "pip uninstall ollm ollm-core, then pip install ollm-core" in output


@pytest.mark.parametrize("version", ["4.57.0", "5.99.0"])
def test_a_transformers_out_of_range(monkeypatch, version):
    real = importlib_metadata.version
    monkeypatch.setattr(importlib_metadata, "version", lambda name: version if name == "transformers" else real(name))
    code, output = run()
    assert code == 1
    assert f"transformers {version} is outside what ollm is tested with: pip install 'transformers<" in output


def test_a_broken_plugin(monkeypatch):
    broken = PluginReport(
        name="acme", module="acme_kv", distribution="acme-kv", version="1.0", status=Status.BROKEN, reason="it broke"
    )
    monkeypatch.setattr(sys.modules["ollm.cli.doctor"], "registry", lambda: Registry((broken,)))
    code, output = run()
    assert code == 1
    assert (
        "problem  plugin acme (acme-kv 1.0): it broke. Upgrade or uninstall it, or set OLLM_DISABLE_PLUGINS=acme"
        in output
    )
