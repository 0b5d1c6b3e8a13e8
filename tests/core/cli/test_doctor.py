"""`ollm doctor` tells a sound installation from one that is not."""

from __future__ import annotations

import re
import sys

import importlib_metadata
import pytest
from typer.testing import CliRunner

from ollm.cli import app
from ollm.registry import PluginReport, Registry, Status


@pytest.fixture(autouse=True)
def small_sample(monkeypatch):
    from ollm.cli import doctor

    monkeypatch.setattr(doctor, "_SAMPLE", 2**22)


def run(*arguments):
    result = CliRunner().invoke(app, ["doctor", *arguments])
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


def test_it_says_what_memory_and_disk_would_take(tmp_path):
    code, output = run("--cache-dir", str(tmp_path))
    assert code == 0
    assert re.search(r"memory: [\d.]+ \wiB free of [\d.]+ \wiB", output)
    assert re.search(r"weights of about .*, such as [\d.]+ billion parameters in bfloat16", output)
    assert re.search(rf"disk at {tmp_path}: [\d.]+ \wiB free, reads [\d.]+ GB/s", output)
    assert re.search(r"keys and values of [\d,]+ tokens of a model like Llama 3 8B \(128.0 KiB each\)", output)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_measured(tmp_path):
    code, output = run("--cache-dir", str(tmp_path / "missing"))
    assert code == 1
    assert "missing cannot be measured: No such file or directory. Name another folder with --cache-dir" in output


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
