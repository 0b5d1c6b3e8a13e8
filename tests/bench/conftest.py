"""What the tests of both benchmarks need: a machine for reports, and commands that are refused before any work."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from ollm.cli import app
from ollm.errors import ConfigurationError
from ollm_bench.cli import running


@pytest.fixture
def machine():
    """As reports describe one."""
    return {"cpu": "A CPU", "cores": 2, "memory_bytes": 2**30, "file_system": "ext4", "kernel": "Linux"}


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """`refused("kv", [...])`: what `ollm bench kv ...` says, which does no work and leaves nothing."""

    def run(benchmark, arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(running, "run_cases", lambda *_, **__: pytest.fail("work began"))
        result = CliRunner().invoke(app, ["bench", benchmark, *arguments])
        assert isinstance(result.exception, ConfigurationError), result.output
        assert list(tmp_path.iterdir()) == []
        return str(result.exception)

    return run
