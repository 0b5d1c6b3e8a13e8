"""What the tests of both benchmarks need: a machine for reports, commands that are refused before any work, and cases
that run in this process, so that their imports are paid once."""

from __future__ import annotations

import importlib
import json

import cattrs
import pytest
from typer.testing import CliRunner

from ollm.cli import app
from ollm.errors import ConfigurationError
from ollm_bench import limits
from ollm_bench import run as runner
from ollm_bench.cli import running
from ollm_bench.records import Outcome


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


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    """Cases run here; every record goes through JSON as if they did not, and what a case says is said. Returns the
    requests."""
    requests = []

    def run(benchmark, request, memory_limit, say):
        requests.append(request)
        module = importlib.import_module(benchmark.module)
        monkeypatch.setattr(module, "say", say)
        types = type(request)[type(request.case), type(request.geometry)]
        asked = cattrs.structure(json.loads(json.dumps(cattrs.unstructure(request))), types)
        answer = json.loads(json.dumps(cattrs.unstructure(module.run(asked))))
        return Outcome(case=request.case, status="done", measured=cattrs.structure(answer, benchmark.measured))

    monkeypatch.setattr(runner, "_run", run)
    monkeypatch.setattr(limits, "DROP_CACHES", tmp_path / "drop_caches")
    return requests
