"""`ollm bench kv` as people call it: what it refuses before any work, what it prints, and one small run of it all."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys

import attrs
import cattrs
import pytest
from rich.console import Console
from typer.testing import CliRunner

from ollm.cli import app
from ollm.errors import ConfigurationError, MissingExtraError, UnknownStrategyError
from ollm_bench import run as runner
from ollm_bench.cli import running
from ollm_bench.kv.benchmark import BENCHMARK
from ollm_bench.kv.models import synthetic_geometry
from ollm_bench.kv.records import Case, Geometry, Measured, Outcome, Report
from ollm_bench.kv.verdicts import judge
from ollm_bench.records import Rates, Sample
from ollm_bench.table import Wording, print_report

GEOMETRY = Geometry(layers=2, kv_heads=1, head_dim=16, dtype="float32", bytes_per_token=256, model_bytes=1000)
WORDING = Wording(subject=f"{GEOMETRY.text}; 100 tokens", step="token", above="the model")
TINY = ["--tokens", "200", "--layers", "2", "--kv-heads", "1", "--head-dim", "16", "--dtype", "float32"]


@pytest.fixture
def report(machine):
    rates = Rates(direct=True, reads=[Sample(10**9, 1.0)], writes=[Sample(10**9, 2.0)])
    step = {"step_seconds": [0.5], "decode_peak": 10**8}
    outcomes = [
        Outcome(case=Case(kind="disk", tokens=100), status="done", measured=Measured(rates=rates)),
        Outcome(case=Case(kind="static", tokens=100), status="done", measured=Measured(**step)),
        Outcome(case=Case(kind="dynamic", tokens=100), status="refused", reason="needs 9 MB of memory, 1 MB free"),
        Outcome(
            case=Case(kind="strategy", tokens=100, strategy="chunked", residency="nothing", ram_budget=0),
            status="done",
            measured=Measured(**step, rates=rates, bytes_per_step=25600),
        ),
    ]
    return Report(
        date="2026-01-01", command=["ollm"], machine=machine, versions={}, geometry=GEOMETRY, steps=1,
        memory_limit=None, notes=["page cache not dropped"], outcomes=judge(outcomes, GEOMETRY, limited=False),
    )  # fmt: skip


def printed(report, **settings):
    console = Console(file=io.StringIO(), highlight=False, **settings)
    print_report(report, WORDING, console)
    return console.file.getvalue()


def test_plain_lines_have_no_colours_and_no_boxes(report):
    text = printed(report, force_terminal=False)
    assert text.isascii()
    assert re.search(r"^chunked, nothing +0\.500 +0\.0 +0\.00/0\.00 +1\.00 +100 +reached$", text, re.MULTILINE)
    assert re.search(r"^DynamicCache +refused: needs 9 MB of memory, 1 MB free$", text, re.MULTILINE)
    assert "raw disk: reads 1.00 GB/s, writes 0.50 GB/s (unbuffered" in text
    assert "note: page cache not dropped" in text
    assert "chunked, nothing resident, 100 tokens: 100 MB of memory above the model, at most 300: reached" in text
    assert "chunked, nothing resident, 100 tokens: 1.00 of StaticCache's time, at most 1.15: reached" in text


def test_the_table_says_what_was_missed_and_what_is_unsure(report):
    slow = attrs.evolve(report.outcomes[-1], measured=attrs.evolve(report.outcomes[-1].measured, step_seconds=[0.7]))
    missed = judge([*report.outcomes[:-1], slow], GEOMETRY, limited=False)
    text = printed(attrs.evolve(report, outcomes=missed), force_terminal=False)
    assert re.search(r"^chunked, nothing .* missed: 1\.40 of StaticCache's time$", text, re.MULTILINE)
    assert "tokens: 1.40 of StaticCache's time, at most 1.15: missed" in text
    unsure = [*missed[:-1], attrs.evolve(missed[-1], doubts=["the moon is full"])]
    text = printed(attrs.evolve(report, outcomes=unsure), force_terminal=False)
    assert re.search(r"^chunked, nothing .* unsure$", text, re.MULTILINE)
    assert "tokens: 1.40 of StaticCache's time, at most 1.15: unsure" in text
    assert "tokens: 100 MB of memory above the model, at most 300: reached" in text
    assert "tokens: unsure, for the moon is full" in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_bars_within_its_width(report, width):
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed(report, force_terminal=True, width=width))
    assert max(map(len, text.splitlines())) <= width
    assert "reached" in text
    assert "█" * (20 if width == 120 else 6) in text


def test_several_lengths_are_told_apart(report):
    other = attrs.evolve(report.outcomes[1], case=Case(kind="static", tokens=4000))
    text = printed(attrs.evolve(report, outcomes=[*report.outcomes, other]), force_terminal=False)
    assert "StaticCache, 100 " in text and "StaticCache, 4,000 " in text


def test_a_picture(report, tmp_path):
    pytest.importorskip("matplotlib")
    from ollm_bench.plot import draw

    draw(report, WORDING, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "many"], "--tokens 'many': give numbers of 1 or more"),
        (["--tokens", "5,0"], "--tokens '5,0'"),
        (["--layers", "0"], "--layers 0: give 1 or more"),
        (["--head-dim", "7"], "--head-dim 7: rotary positions need an even number"),
        (["--dtype", "int8"], "--dtype int8: choose one of float32, bfloat16, float16"),
        (["--steps", "0"], "--steps 0: give 1 or more"),
        (["--ram-budget", "lots"], "ram_budget='lots' is not a size"),
        (["--memory-limit", "lots"], "--memory-limit='lots' is not a size"),
        (["--cache-dir", "missing"], "--cache-dir missing: there is no such folder"),
        (["--json", "missing/out.json"], "--json missing/out.json: name a file in a folder that exists"),
        (["--plot", "missing/out.png"], "--plot missing/out.png: name a file in a folder that exists"),
        (["--strategies", "resident"], "--strategies resident: it does not keep every token on disk"),
        (["--model", "missing"], "--model missing: there is no config.json"),
        (["--model", "missing", "--layers", "2"], "--model and --layers: the checkpoint has a geometry of its own"),
    ],
)
def test_every_argument_is_checked_before_work(arguments, message, refused):
    assert message in refused("kv", arguments)


@pytest.mark.parametrize(
    ("toml", "variable", "arguments", "budget"),
    [
        ("", None, [], None),
        ('ram_budget = "1MiB"', None, [], 2**20),
        ('ram_budget = "1MiB"', "2MiB", [], 2**21),
        ('ram_budget = "1MiB"', "2MiB", ["--ram-budget", "0"], 0),
    ],
)
def test_a_budget_is_written_down_where_those_of_caches_are(toml, variable, arguments, budget, monkeypatch, tmp_path):
    (tmp_path / "ollm.toml").write_text(toml)
    monkeypatch.chdir(tmp_path)
    if variable is not None:
        monkeypatch.setenv("OLLM_RAM_BUDGET", variable)
    asked = []

    def note(benchmark, cases, geometry, **more):
        asked.extend(case.ram_budget for case in cases if case.strategy)
        raise ConfigurationError("enough")

    monkeypatch.setattr(running, "run_cases", note)
    result = CliRunner().invoke(app, ["bench", "kv", *TINY, "--strategies", "chunked", *arguments])
    assert str(result.exception) == "enough"
    assert len(asked) == 3 if budget is None else asked == [budget]


def test_an_unknown_strategy_is_the_registrys_own_error():
    result = CliRunner().invoke(app, ["bench", "kv", "--strategies", "chunky"])
    assert isinstance(result.exception, UnknownStrategyError)
    assert "Did you mean 'chunked'?" in str(result.exception)


def test_a_missing_matplotlib_is_found_before_work(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["bench", "kv", "--plot", "out.png"])
    assert isinstance(result.exception, MissingExtraError)
    assert 'pip install "ollm-bench[plot]"' in str(result.exception)


def run_code(code, monkeypatch, folder):
    real = subprocess.Popen
    monkeypatch.setattr(runner.subprocess, "Popen", lambda command, **more: real([sys.executable, "-c", code], **more))
    (outcome,) = runner.run_cases(
        BENCHMARK, [Case(kind="static", tokens=10)], GEOMETRY, folder=folder, steps=1, memory_limit=None,
        progress=lambda *_: None,
    )  # fmt: skip
    return outcome


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed", "most likely for memory"),
        ("import sys; sys.stdin.read(); raise ValueError('it broke')", "failed", "ValueError: it broke"),
    ],
)
def test_a_case_that_dies_is_listed(monkeypatch, tmp_path, code, status, reason):
    outcome = run_code(code, monkeypatch, tmp_path)
    assert outcome.status == status
    assert reason in outcome.reason


@pytest.mark.timeout(60)
@pytest.mark.parametrize("before", ["", "print('a library speaks')\n"])
def test_a_long_answer_is_read_whatever_is_printed_before_it(report, before, monkeypatch, tmp_path):
    """Longer than a pipe holds, while the other end still waits for what is on stderr."""
    measured = report.outcomes[0].measured
    measured = attrs.evolve(measured, step_seconds=[0.1] * 100_000)
    (tmp_path / "answer.json").write_text(json.dumps(cattrs.unstructure(measured)))
    code = f"import sys; sys.stdin.read()\n{before}print(open({str(tmp_path / 'answer.json')!r}).read())"
    outcome = run_code(code, monkeypatch, tmp_path)
    assert (outcome.status, outcome.measured) == ("done", measured)


def test_an_answer_that_cannot_be_read_is_listed(monkeypatch, tmp_path):
    outcome = run_code("import sys; sys.stdin.read(); print('what?')", monkeypatch, tmp_path)
    assert outcome.status == "failed"
    assert "its answer cannot be read" in outcome.reason and "what?" in outcome.reason


def test_a_small_run(in_this_process, tmp_path, monkeypatch):
    """Every case, every file and the JSON, with two steps of a tiny model."""
    monkeypatch.chdir(tmp_path)
    command = ["bench", "kv", *TINY, "--strategies", "chunked", "--ram-budget", "0", "--steps", "2", "--json", "r.json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "case 4 of 5: chunked, nothing resident, 200 tokens: filling" in result.stderr
    assert "chunked, nothing" in result.stdout and "\x1b" not in result.output
    report = cattrs.structure(json.loads((tmp_path / "r.json").read_text()), Report)
    assert [outcome.status for outcome in report.outcomes] == ["done"] * 5
    measured = report.outcomes[-2].measured
    assert len(measured.step_seconds) == 2
    # 128 tokens or more are in two layers' records, and reading goes on ahead of a step's end by up to a step
    assert 0 <= measured.bytes_per_step <= 2 * 2 * 202 * 256
    assert len(measured.rates.reads) == 1  # of a file made for it: the cache's own are smaller than one read
    assert {path.name for path in tmp_path.iterdir()} <= {"r.json", "drop_caches"}


@pytest.mark.timeout(180)
def test_a_case_has_a_process_of_its_own(tmp_path):
    said = []
    case = Case(kind="strategy", tokens=200, strategy="chunked", residency="nothing", ram_budget=0)
    geometry = synthetic_geometry(2, 1, 16, "float32")
    (outcome,) = runner.run_cases(
        BENCHMARK,
        [case],
        geometry,
        folder=tmp_path,
        steps=2,
        memory_limit=None,
        progress=lambda *what: said.append(what),
    )
    assert outcome.status == "done", outcome.reason
    assert len(outcome.measured.step_seconds) == 2
    assert (0, case, "loading the model") in said
    assert list(tmp_path.iterdir()) == []
