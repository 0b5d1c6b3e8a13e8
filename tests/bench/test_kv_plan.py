"""Which cases a benchmark has, what cannot fit, and what its numbers mean: arithmetic, nothing is measured."""

from __future__ import annotations

import json

import attrs
import cattrs
import pytest

from ollm_bench.kv.plan import disk_needed, memory_needed, plan_cases, sample_bytes, why_refused
from ollm_bench.kv.records import Case, Geometry, Measured, Outcome, Report
from ollm_bench.kv.verdicts import judge
from ollm_bench.records import Rates, Sample
from ollm_bench.run import PROCESS_BYTES, Free
from ollm_bench.verdicts import too_little

GEOMETRY = Geometry(
    layers=16, kv_heads=8, head_dim=128, dtype="bfloat16", bytes_per_token=65536, model_bytes=400_000_000
)
TOKENS = 32768
EVERYTHING = TOKENS * 65536
PLENTY = Free(memory=2**40, disk=2**40)


def strategy(residency, budget=0):
    return Case(kind="strategy", tokens=TOKENS, strategy="chunked", residency=residency, ram_budget=budget)


def measured(seconds, nbytes=0, rate=1e9, **more):
    samples = [Sample(int(rate), 1.0)]
    return Measured(
        step_seconds=[seconds, seconds, 99.0], bytes_per_step=nbytes,
        rates=Rates(direct=True, reads=samples, writes=samples), **more,
    )  # fmt: skip


def outcomes(*, static=0.4, dynamic=2.5, **cases):
    found = [
        Outcome(case=Case(kind=kind, tokens=TOKENS), status="done", measured=Measured(step_seconds=[seconds]))
        for kind, seconds in (("static", static), ("dynamic", dynamic))
        if seconds
    ]
    return found + [Outcome(case=strategy(name), status="done", measured=one) for name, one in cases.items()]


def verdicts(found, *, limited=False):
    last = judge(found, GEOMETRY, limited=limited)[-1]
    assert len({verdict.what for verdict in last.verdicts}) == len(last.verdicts)
    return {verdict.what: verdict for verdict in last.verdicts}, last


def test_baselines_come_first_and_every_strategy_has_three_residencies():
    cases = plan_cases(GEOMETRY, [1000, TOKENS], ["chunked", "paged"], steps=5, ram_budget=None)
    assert [case.kind for case in cases[:3]] == ["disk", "static", "dynamic"]
    assert len(cases) == 1 + 2 * (2 + 2 * (3 + 1))
    after = [cases[at + 1].kind for at, case in enumerate(cases) if case.residency == "everything"]
    assert after == ["static"] * 4
    last = [case for case in cases if case.tokens == TOKENS and case.strategy == "paged"]
    assert [case.residency for case in last] == ["nothing", "half", "everything"]
    nothing, half, everything = (case.ram_budget for case in last)
    assert (nothing, half) == (0, EVERYTHING // 2)
    assert everything >= EVERYTHING + 65536 * 7


@pytest.mark.parametrize(("budget", "residency"), [(0, "nothing"), (2**20, "budget")])
def test_a_budget_replaces_the_series(budget, residency):
    cases = plan_cases(GEOMETRY, [1000], ["chunked"], steps=5, ram_budget=budget)
    assert [(case.residency, case.ram_budget) for case in cases if case.strategy] == [(residency, budget)]


def test_memory_that_each_case_needs():
    model = GEOMETRY.model_bytes + PROCESS_BYTES
    assert memory_needed(Case(kind="disk", tokens=TOKENS), GEOMETRY) == 0
    assert memory_needed(Case(kind="static", tokens=TOKENS), GEOMETRY) == EVERYTHING + model
    assert memory_needed(Case(kind="dynamic", tokens=TOKENS), GEOMETRY) == EVERYTHING * 18 // 16 + model
    assert memory_needed(strategy("half", 10**9), GEOMETRY) == 1_300_000_000 + model


def test_what_cannot_fit_is_refused_with_both_numbers():
    static = Case(kind="static", tokens=TOKENS)
    assert why_refused(static, GEOMETRY, PLENTY) == ""
    assert (
        why_refused(static, GEOMETRY, attrs.evolve(PLENTY, memory=10**9)) == "needs 2,797 MB of memory, 1,000 MB free"
    )
    assert why_refused(static, GEOMETRY, attrs.evolve(PLENTY, disk=0)) == ""
    assert "of disk, 1,000 MB free" in why_refused(strategy("nothing"), GEOMETRY, attrs.evolve(PLENTY, disk=10**9))
    assert disk_needed(strategy("nothing"), GEOMETRY) > EVERYTHING + sample_bytes(GEOMETRY, TOKENS)


def test_raw_rates_are_measured_with_a_file_of_bounded_size():
    assert sample_bytes(GEOMETRY, 10) == 64 * 2**20
    assert sample_bytes(GEOMETRY, TOKENS) == 2**30
    assert sample_bytes(GEOMETRY, 2001) % (4 * 2**20) == 0


def test_nothing_resident_is_compared_with_the_longer_of_computing_and_reading():
    found, last = verdicts(outcomes(nothing=measured(2.3, EVERYTHING)))
    assert last.achievable_seconds == pytest.approx(EVERYTHING / 1e9)
    assert last.possible == pytest.approx(2.3 / 2.147, rel=0.01)
    assert found["of the disk's rate"].reached
    assert found["of the disk's rate"].value == pytest.approx(2.147 / 2.3, rel=0.01)
    assert "of DynamicCache's time" not in found  # the disk is too slow for that
    found, last = verdicts(outcomes(static=3.0, nothing=measured(3.6, EVERYTHING)))
    assert last.achievable_seconds == 3.0
    assert found["of StaticCache's time"].value == pytest.approx(1.2)
    assert not found["of StaticCache's time"].reached
    assert "of the disk's rate" not in found


def test_reading_more_than_there_is_excuses_nothing():
    found, last = verdicts(outcomes(nothing=measured(4.4, 2 * EVERYTHING)))
    assert last.possible == pytest.approx(1.02, rel=0.01)
    assert not found["of the disk's rate"].reached


@pytest.mark.parametrize(("seconds", "reached"), [(2.46, True), (2.48, False)])
def test_a_step_may_take_fifteen_hundredths_longer_than_the_disk(seconds, reached):
    found, _ = verdicts(outcomes(nothing=measured(seconds, EVERYTHING)))
    assert found["of the disk's rate"].reached is reached


@pytest.mark.parametrize(("seconds", "reached"), [(1.9, True), (2.1, False)])
def test_on_a_fast_disk_it_must_beat_dynamic_cache(seconds, reached):
    found, _ = verdicts(outcomes(nothing=measured(seconds, EVERYTHING, rate=2e9)))
    assert found["of DynamicCache's time"].reached is reached


def test_memory_is_the_higher_of_both_peaks():
    found, _ = verdicts(outcomes(nothing=measured(2.3, EVERYTHING, fill_peak=310_000_000, decode_peak=100)))
    verdict = found["of memory above the model"]
    assert (verdict.value, verdict.reached) == (310, False)


def test_inside_a_limit_without_static_cache():
    found, last = verdicts(outcomes(static=None, dynamic=None, nothing=measured(2.4, EVERYTHING)), limited=True)
    assert last.achievable_seconds == pytest.approx(EVERYTHING / 1e9)
    assert found["of the disk's rate"].reached


def test_inside_a_limit_computing_is_no_excuse():
    found, _ = verdicts(outcomes(static=3.0, nothing=measured(3.0, EVERYTHING)), limited=True)
    assert (found["of StaticCache's time"].reached, found["of the disk's rate"].reached) == (True, False)


def test_half_everything_and_filling():
    found, _ = verdicts(outcomes(half=measured(1.2, EVERYTHING // 2, bytes_written=10**9, fill_seconds=2.0)))
    assert list(found) == ["of the disk's rate"], "filling also copies what stays resident"
    assert found["of the disk's rate"].reached
    found, _ = verdicts(outcomes(nothing=measured(2.2, EVERYTHING, bytes_written=10**9, fill_seconds=2.0)))
    filling = found["of the disk's write rate while filling"]
    assert (filling.value, filling.reached) == (0.5, False)
    found, _ = verdicts(outcomes(everything=measured(0.5)))
    assert not found["of StaticCache's time"].reached


def test_the_baselines_next_to_a_case_count():
    found = outcomes(static=0.5, everything=measured(0.6))
    slow = attrs.evolve(found[0], measured=Measured(step_seconds=[3.0]))
    fast = attrs.evolve(found[0], measured=Measured(step_seconds=[0.7]))
    run = [slow, found[0], found[-1], fast, slow]
    judged = judge(run, GEOMETRY, limited=False)
    assert [one.achievable_seconds for one in judged] == pytest.approx([3.0, 0.5, 0.6, 0.7, 3.0])
    assert judged[2].verdicts[0].value == pytest.approx(1.0)


def test_nothing_to_compare_with():
    (alone,) = judge(outcomes(static=None, dynamic=None, everything=measured(0.5)), GEOMETRY, limited=False)
    assert (alone.possible, alone.verdicts) == (None, [])


def test_a_report_survives_json():
    found = judge(outcomes(nothing=measured(2.3, EVERYTHING)), GEOMETRY, limited=False)
    found.append(Outcome(case=strategy("half"), status="killed", reason="for memory"))
    report = Report(
        date="2026-01-01", command=["ollm"], machine={"cores": 2}, versions={}, geometry=GEOMETRY, steps=3,
        memory_limit=None, notes=["one"], outcomes=found,
    )  # fmt: skip
    assert cattrs.structure(json.loads(json.dumps(cattrs.unstructure(report))), Report) == report
    assert report.failed
    assert not attrs.evolve(report, outcomes=found[:-1]).failed


def test_forks_are_one_more_case_and_lossy_strategies_have_no_half():
    cases = plan_cases(
        GEOMETRY, [1000], ["chunked", "rounding"], steps=5, ram_budget=None, forks=16, lossy=["rounding"]
    )  # fmt: skip
    found = [(case.strategy, case.residency, case.forks) for case in cases if case.kind == "strategy"]
    assert found == [
        ("chunked", "nothing", 1), ("chunked", "half", 1), ("chunked", "everything", 1), ("chunked", "nothing", 16),
        ("rounding", "nothing", 1), ("rounding", "everything", 1), ("rounding", "nothing", 16),
    ]  # fmt: skip
    assert cases[7].label == "chunked, nothing resident, 16 forks"


@pytest.mark.parametrize(("seconds", "reached"), [(3.4, True), (3.5, False)])
def test_a_step_of_many_forks_is_compared_with_a_step_of_one(seconds, reached):
    found = outcomes(nothing=measured(2.3, EVERYTHING))
    forks = attrs.evolve(found[-1].case, forks=16)
    found.append(Outcome(case=forks, status="done", measured=measured(seconds, EVERYTHING)))
    judged, _ = verdicts(found)
    assert list(judged) == ["of the time of one alone"]
    assert judged["of the time of one alone"].reached is reached


@pytest.mark.parametrize(
    ("share", "seconds", "resident", "bytes_ok", "seconds_ok"),
    [(0.5, 1.2, 0.4, 1, 1), (0.5, 1.3, 0.4, 1, 0), (0.5, 1.3, 1.2, 1, 1), (0.6, 1.2, 0.4, 0, 1)],
)
def test_fewer_bytes_are_judged_by_their_own_number(share, seconds, resident, bytes_ok, seconds_ok):
    """By reading them raw (1 GB/s here), or by the strategy's own step with everything resident."""
    stored = int(share * EVERYTHING)
    found = outcomes(everything=measured(resident), nothing=measured(seconds, stored, stored_bytes=stored))
    found = [attrs.evolve(one, case=attrs.evolve(one.case, lossless=False)) for one in found]
    judged, _ = verdicts(found)
    slower = "its own time with everything resident" if resident > stored / 1e9 else "the disk's rate"
    assert (judged["of the exact bytes"].reached, judged[f"of {slower}"].reached) == (bytes_ok, seconds_ok)


@pytest.mark.parametrize(("seconds", "reached"), [(2.4, True), (2.5, False)])
def test_a_lossless_strategy_that_packs_is_compared_with_reading_what_it_was_given(seconds, reached):
    """And is asked for no number of bytes: those are its gain."""
    stored = int(0.8 * EVERYTHING)
    found = outcomes(everything=measured(0.4), nothing=measured(seconds, stored, stored_bytes=stored))
    judged, _ = verdicts(found)
    assert judged["of the disk's rate"].reached is reached
    assert not {"of the exact bytes", "of its own time with everything resident"} & {*judged}
    everything, _ = verdicts(found[:-1])
    assert "of StaticCache's time" in everything


def test_whether_a_strategy_is_lossless_is_in_its_cases():
    cases = plan_cases(GEOMETRY, [1000], ["chunked", "rounding"], steps=5, ram_budget=None, forks=2, lossy=["rounding"])
    assert {(case.strategy, case.lossless) for case in cases if case.strategy} == {
        ("chunked", True),
        ("rounding", False),
    }


def test_a_run_that_was_too_small_or_too_noisy_says_so_in_words():
    samples = [Sample(10**9, 1.0), Sample(2 * 10**9, 1.0)]
    noisy = Rates(direct=True, reads=samples, writes=samples)
    found = outcomes(nothing=measured(0.004, 1000), half=attrs.evolve(measured(0.009, 1000), rates=noisy))
    small, noise = too_little(judge(found, GEOMETRY, limited=False))
    assert small.startswith("too small to judge: 2 of 2 cases, whose steps take 4 to 9 ms; from 20 ms on")
    assert noise.startswith("too noisy to judge: 1 of 2 cases, during which the disk's rate changed by more than half")
    assert list(too_little(judge(outcomes(nothing=measured(2.3, EVERYTHING)), GEOMETRY, limited=False))) == []


@pytest.mark.parametrize(
    ("seconds", "rates", "doubt"),
    [
        (0.019, [1e9], "steps of 19 ms say little"),
        (2.3, [1e9, 1.49e9], None),
        (2.3, [1e9, 1.51e9], "the disk read between 1.00 and 1.51 GB/s meanwhile"),
    ],
)
def test_what_is_too_small_or_too_noisy_is_said(seconds, rates, doubt):
    one = measured(seconds, EVERYTHING)
    reads = [Sample(int(rate), 1.0) for rate in rates]
    _, last = verdicts(outcomes(nothing=attrs.evolve(one, rates=attrs.evolve(one.rates, reads=reads))))
    assert last.verdicts
    assert [text.startswith(doubt or "") for text in last.doubts] == [True] * (doubt is not None)
