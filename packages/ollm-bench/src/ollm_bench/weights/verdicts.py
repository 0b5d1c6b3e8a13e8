"""What numbers mean: what memory and disk would allow, and what streaming is asked for. Pure; measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

from ollm_bench.records import Verdict
from ollm_bench.verdicts import against_possible, at_most, baseline, judged, reading_seconds
from ollm_bench.weights.plan import most_memory, streamed_bytes
from ollm_bench.weights.records import Case, Geometry, Measured, Outcome

_MOST_OF_ACCELERATE = 1.0
_MOST_OF_NOTHING_RESIDENT = 0.6
_MOST_OF_WEIGHTS = 1.01
"""A prompt reads each weight once, and disks are read in whole blocks."""


def judge(outcomes: Sequence[Outcome], geometry: Geometry, limited: bool) -> list[Outcome]:
    """The same outcomes of a whole run with what was possible, and with verdicts; `limited` changes none of them."""
    return [_judge_one(outcome, outcomes, geometry) for outcome in outcomes]


def _judge_one(outcome: Outcome, outcomes: Sequence[Outcome], geometry: Geometry) -> Outcome:
    measured, case = outcome.measured, outcome.case
    if measured is None or not measured.step_seconds:
        return outcome

    def seconds(other: Case) -> float | None:
        return baseline(outcomes, outcome, lambda one: one == other)

    # of the same work with all weights in memory; 0 where that could not be measured
    computing = seconds(Case(kind="memory", kv_tokens=case.kv_tokens, prompt=case.prompt)) or 0.0
    verdicts: list[Verdict] = []
    if case.kind == "ollm" and case.resident is not None:
        if case.prompt:
            verdicts = [_once(case, measured, geometry)]
        else:
            offloaded, unplaced = seconds(Case(kind="accelerate")), seconds(Case(kind="ollm", resident=0))
            verdicts = _of_steps(case, measured, geometry, computing, offloaded, unplaced)
    return judged(outcome, computing, verdicts)


def _once(case: Case, measured: Measured, geometry: Geometry) -> Verdict:
    read = measured.bytes_per_step - measured.kv_bytes_per_step
    return at_most("of one reading of every weight", read / streamed_bytes(case, geometry), _MOST_OF_WEIGHTS)


def _of_steps(
    case: Case, measured: Measured, geometry: Geometry, computing: float, offloaded: float | None,
    unplaced: float | None,
) -> list[Verdict]:  # fmt: skip
    # bytes that are read beyond those that are needed are no excuse for being slow
    weights = streamed_bytes(case, geometry)
    needed = min(weights + geometry.kv_bytes_per_token * case.kv_tokens, measured.bytes_per_step)
    found = []
    if case.kv_tokens or not case.resident:
        found.append(against_possible(measured, needed, computing, "the time in memory"))
    if not case.kv_tokens and not case.resident and offloaded is not None:
        found.append(at_most("of accelerate's time", measured.seconds / offloaded, _MOST_OF_ACCELERATE))
    half = not case.kv_tokens and case.resident and case.resident == len(geometry.layer_bytes) // 2
    if half and unplaced is not None and reading_seconds(measured, needed) >= computing:
        share = measured.seconds / unplaced
        found.append(at_most("of the time with nothing resident", share, _MOST_OF_NOTHING_RESIDENT))
    most = most_memory(case, geometry)
    found.append(at_most("of memory above the process", measured.peak / 1e6, most / 1e6, "MB"))
    return found
