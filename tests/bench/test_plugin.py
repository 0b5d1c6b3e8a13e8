"""ollm-bench as a plugin: what every plugin must be, the wheel included, and its one command."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from ollm.cli import app
from ollm.registry import registry
from ollm.testing import PluginTests


class TestPlugin(PluginTests):
    distribution = "ollm-bench"
    project = Path(__file__).parents[2] / "packages" / "ollm-bench"


def test_it_is_at_home_in_its_name():
    offer = registry().commands.get("bench")
    assert (offer.distribution, registry().commands.of(offer)) == ("ollm-bench", "bench")


def test_help_has_a_short_form():
    long, short = (CliRunner().invoke(app, ["bench", option]) for option in ("--help", "-h"))
    assert long.exit_code == short.exit_code == 0
    assert long.output == short.output
