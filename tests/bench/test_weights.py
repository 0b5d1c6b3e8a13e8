"""`ollm bench weights` without running a model: arguments, cases, what is refused, what numbers mean, how they look."""

from __future__ import annotations

import io
import json
import re

import attrs
import cattrs
import pytest
from rich.console import Console
from typer.testing import CliRunner

from ollm.cli import app
from ollm.errors import ConfigurationError
from ollm_bench.records import Rates, Sample
from ollm_bench.run import PROCESS_BYTES, Free, run_cases
from ollm_bench.table import Wording, print_report
from ollm_bench.weights.benchmark import BENCHMARK
from ollm_bench.weights.plan import memory_needed, plan_cases, sample_bytes, why_refused
from ollm_bench.weights.records import Case, Geometry, Measured, Outcome, Report
from ollm_bench.weights.verdicts import judge

MB = 10**6
GEOMETRY = Geometry(
    name="Llama", dtype="bfloat16", layer_bytes=[100 * MB] * 16, other_bytes=50 * MB, kv_bytes_per_token=65536
)
WEIGHTS = 1600 * MB
PLENTY = Free(memory=2**40, disk=2**40)
NOTHING = Case(kind="ollm", resident=0)
MEMORY = "of memory above the process"


def measured(seconds, nbytes=0, rate=1e9, **more):
    rates = Rates(direct=True, reads=[Sample(int(rate), 1.0)])
    return Measured(step_seconds=[seconds, seconds, 99.0], bytes_per_step=nbytes, rates=rates, **more)


def run_of(*pairs):
    return [Outcome(case=case, status="done", measured=one) for case, one in pairs]


def verdicts_of(case, *pairs):
    judged = judge(run_of(*pairs), GEOMETRY, False)
    (found,) = (outcome for outcome in judged if outcome.case == case)
    return {verdict.what: verdict for verdict in found.verdicts}, found


def test_cases_come_with_baselines_around_them():
    cases = plan_cases(GEOMETRY, resident=None, kv_tokens=0, prompt=0)
    assert [(case.kind, case.resident) for case in cases] == [
        ("disk", None), ("memory", None), ("mapped", None), ("accelerate", None),
        ("ollm", 0), ("ollm", 8), ("ollm", None), ("memory", None),
    ]  # fmt: skip


def test_keys_and_values_and_a_prompt_have_baselines_of_their_own():
    cases = plan_cases(GEOMETRY, resident=0, kv_tokens=2048, prompt=300)
    assert [case.label for case in cases[4:]] == [
        "ollm, nothing resident", "ollm, fit",
        "in memory, 2,048 tokens of KV", "ollm, nothing resident, 2,048 tokens of KV",
        "in memory, prompt of 300", "ollm, nothing resident, prompt of 300", "in memory",
    ]  # fmt: skip


def test_memory_that_each_case_needs():
    def needed(kind, **more):
        return memory_needed(Case(kind=kind, **more), GEOMETRY) - PROCESS_BYTES

    assert memory_needed(Case(kind="disk"), GEOMETRY) == 0
    assert needed("memory") == WEIGHTS + 50 * MB
    assert needed("memory", kv_tokens=1000) == WEIGHTS + 50 * MB + 65_536_000
    assert needed("accelerate") == 150 * MB
    assert needed("ollm", resident=0) == needed("ollm") == 550 * MB
    assert needed("ollm", resident=4) == 950 * MB
    assert needed("ollm", resident=0, kv_tokens=1000) == 850 * MB
    assert needed("ollm", resident=16) == WEIGHTS + 250 * MB, "no slots beside layers that are all resident"


def test_what_cannot_fit_is_refused_with_both_numbers():
    small = attrs.evolve(PLENTY, memory=10**9)
    assert why_refused(Case(kind="memory"), GEOMETRY, PLENTY) == ""
    assert why_refused(Case(kind="memory"), GEOMETRY, small) == "needs 1,900 MB of memory, 1,000 MB free"
    assert why_refused(Case(kind="mapped"), GEOMETRY, small) == ""
    full = attrs.evolve(PLENTY, disk=0)
    assert why_refused(Case(kind="ollm"), GEOMETRY, full) == ""
    assert "of disk, 0 MB free" in why_refused(Case(kind="ollm", kv_tokens=9), GEOMETRY, full)


def test_the_disk_is_measured_with_at_most_a_gigabyte():
    assert sample_bytes(GEOMETRY) == 2**30
    assert sample_bytes(attrs.evolve(GEOMETRY, layer_bytes=[5, 6])) == 11


@pytest.mark.parametrize(
    ("seconds", "computing", "reached"), [(1.8, 0.2, True), (1.9, 0.2, False), (2.2, 2.0, True), (2.4, 2.0, False)]
)
def test_nothing_resident_is_compared_with_the_longer_of_computing_and_reading(seconds, computing, reached):
    found, last = verdicts_of(
        NOTHING, (Case(kind="memory"), measured(computing)), (NOTHING, measured(seconds, WEIGHTS))
    )
    assert last.achievable_seconds == pytest.approx(max(computing, 1.6))
    assert found["of the time in memory" if computing > 1.6 else "of the disk's rate"].reached is reached


def test_reading_more_than_there_is_excuses_nothing():
    found, last = verdicts_of(NOTHING, (NOTHING, measured(3.3, 2 * WEIGHTS)))
    assert last.possible == pytest.approx(1.03, rel=0.01)
    assert not found["of the disk's rate"].reached


@pytest.mark.parametrize(("seconds", "reached"), [(1.7, True), (1.9, False)])
def test_nothing_resident_must_beat_accelerate(seconds, reached):
    offloaded = Case(kind="accelerate"), measured(1.8, WEIGHTS)
    found, _ = verdicts_of(NOTHING, offloaded, (NOTHING, measured(seconds, WEIGHTS)))
    assert found["of accelerate's time"].reached is reached


@pytest.mark.parametrize(("seconds", "reached"), [(1.0, True), (1.1, False)])
def test_half_resident_is_compared_with_nothing_resident_where_the_disk_is_the_limit(seconds, reached):
    half = Case(kind="ollm", resident=8), measured(seconds, WEIGHTS // 2)
    everything = NOTHING, measured(1.7, WEIGHTS)
    found, _ = verdicts_of(half[0], everything, half)
    assert found["of the time with nothing resident"].reached is reached
    found, _ = verdicts_of(half[0], everything, half, (Case(kind="memory"), measured(0.9)))
    assert list(found) == [MEMORY], "here computing is the limit"


def test_weights_and_keys_and_values_are_compared_with_reading_both():
    case = Case(kind="ollm", resident=0, kv_tokens=10_000)
    both = WEIGHTS + 655_360_000
    found, _ = verdicts_of(case, (case, measured(2.5, both, step_peak=849 * MB)))
    assert (found["of the disk's rate"].reached, found[MEMORY].reached) == (True, True)
    found, _ = verdicts_of(case, (case, measured(2.7, both)), (Case(kind="memory"), measured(9.0)))
    assert not found["of the disk's rate"].reached, "computing without keys and values is another case"


@pytest.mark.parametrize(("peak", "reached"), [(549, True), (551, False)])
def test_memory_is_the_higher_of_both_peaks(peak, reached):
    found, _ = verdicts_of(NOTHING, (NOTHING, measured(1.7, WEIGHTS, load_peak=peak * MB, step_peak=1)))
    verdict = found[MEMORY]
    assert (verdict.value, verdict.limit, verdict.reached) == (peak, 550, reached)


@pytest.mark.parametrize(("times", "reached"), [(1, True), (2, False)])
def test_a_prompt_reads_every_weight_once(times, reached):
    case = Case(kind="ollm", resident=0, prompt=300)
    found, _ = verdicts_of(case, (case, measured(9.0, times * WEIGHTS + 7 * MB, kv_bytes_per_step=7 * MB)))
    (verdict,) = found.values()
    assert (verdict.what, verdict.value, verdict.reached) == ("of one reading of every weight", times, reached)


def test_what_fits_has_no_bar():
    case = Case(kind="ollm")
    found, last = verdicts_of(case, (case, measured(0.3)), (Case(kind="memory"), measured(0.2)))
    assert (found, last.possible) == ({}, pytest.approx(1.5))


@pytest.fixture
def report(machine):
    outcomes = run_of(
        (Case(kind="disk"), Measured(rates=Rates(direct=True, reads=[Sample(10**9, 1.0)]))),
        (Case(kind="memory"), measured(0.2)),
        (Case(kind="accelerate"), measured(2.2, WEIGHTS, first_seconds=2.5, page_cache="not dropped: no")),
        (NOTHING, measured(1.7, WEIGHTS, first_seconds=1.9, step_peak=500 * MB)),
        (Case(kind="ollm", resident=0, prompt=300), measured(50.0, WEIGHTS, first_seconds=1.9)),
    )
    outcomes.append(Outcome(case=Case(kind="mapped"), status="refused", reason="needs 9 MB of memory, 1 MB free"))
    return Report(
        date="2026-01-01", command=["ollm"], machine=machine, versions={}, geometry=GEOMETRY, steps=3,
        memory_limit=None, notes=["page cache not dropped"], outcomes=judge(outcomes, GEOMETRY, False),
    )  # fmt: skip


def printed(report, **settings):
    console = Console(file=io.StringIO(), highlight=False, **settings)
    wording = Wording(subject=GEOMETRY.text, step="step", above="the process before loading")
    print_report(report, wording, console)
    return console.file.getvalue()


def test_plain_lines_have_no_colours_and_no_boxes(report):
    text = printed(report, force_terminal=False)
    assert text.isascii()
    assert "Llama: 16 layers, bfloat16, 1.65 GB; A CPU" in text
    assert re.search(r"^ollm, nothing +1\.700 +1\.900 +1,600 +0\.94/1\.00 +1\.06 +500 +reached$", text, re.MULTILINE)
    assert re.search(r"^memory-mapped +refused: needs 9 MB of memory, 1 MB free$", text, re.MULTILINE)
    assert "raw disk: reads 1.00 GB/s (unbuffered" in text
    assert "ollm, nothing resident, prompt of 300: 1.00 of one reading of every weight" in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_bars_within_its_width(report, width):
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed(report, force_terminal=True, width=width))
    assert max(map(len, text.splitlines())) <= width
    assert "reached" in text
    assert "█" * (15 if width == 120 else 4) in text, "the prompt's seconds do not make the steps' bars short"


def test_a_picture_leaves_the_prompt_out(report, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    from ollm_bench.plot import draw

    names = []
    real = pyplot.Axes.set_yticks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pyplot.Axes, "set_yticks", lambda self, at, labels: names.extend(labels) or real(self, at, labels)
        )
        draw(report, Wording(subject="Llama", step="step", above="nothing"), tmp_path / "out.png")
    assert names == ["in memory", "accelerate, disk offload", "ollm, nothing resident"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_survives_json(report):
    assert cattrs.structure(json.loads(json.dumps(cattrs.unstructure(report))), Report) == report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0"], "--layers 0: give 1 or more"),
        (["--hidden", "100"], "--hidden 100 and --heads 32: give a multiple of the heads"),
        (["--heads", "8", "--kv-heads", "3"], "--heads 8 and --kv-heads 3: each KV head serves as many"),
        (["--dtype", "int8"], "--dtype int8: choose one of float32, bfloat16, float16"),
        (["--steps", "0"], "--steps 0: give 1 or more"),
        (["--kv-tokens", "0"], "--kv-tokens 0: give 1 or more"),
        (["--prompt", "-1"], "--prompt -1: give 1 or more"),
        (["--resident", "17"], "--resident 17: the model has 16 layers, give 0 to 16"),
        (["--resident", "-1"], "--resident -1: the model has 16 layers"),
        (["--memory-limit", "lots"], "--memory-limit='lots' is not a size"),
        (["--cache-dir", "missing"], "--cache-dir missing: there is no such folder"),
        (["--vocabulary", "9000000000000"], "--cache-dir .: the checkpoint needs"),
        (["--json", "missing/out.json"], "--json missing/out.json: name a file in a folder that exists"),
        (["--plot", "missing/out.png"], "--plot missing/out.png: name a file in a folder that exists"),
        (["--model", "missing"], "--model missing: there is no config.json"),
        (["--model", "missing", "--hidden", "64"], "--model and --hidden: the checkpoint has a geometry of its own"),
        (["--model", "missing", "--dtype", "float32"], "--model and --dtype: the checkpoint has a geometry of its"),
    ],
)
def test_every_argument_is_checked_before_work(arguments, message, refused):
    assert message in refused("weights", arguments)


def test_an_incomplete_checkpoint_is_refused_before_work(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    result = CliRunner().invoke(app, ["bench", "weights", "--model", str(tmp_path)])
    assert isinstance(result.exception, ConfigurationError)
    assert "missing: model.safetensors" in str(result.exception)


def test_a_process_measures_the_checkpoint_itself(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20 + 5))
    geometry = attrs.evolve(GEOMETRY, model=str(tmp_path))
    (outcome,) = run_cases(
        BENCHMARK, [Case(kind="disk")], geometry, folder=tmp_path, steps=1, memory_limit=None, progress=lambda *_: None
    )
    assert outcome.status == "done", outcome.reason
    assert [sample.nbytes for sample in outcome.measured.rates.reads] == [3 * 2**20 + 5]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
