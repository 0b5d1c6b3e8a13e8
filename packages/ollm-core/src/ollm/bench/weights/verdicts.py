"""What numbers mean: what memory and disk would allow, and which bars a case is over. Pure; measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import attrs

from ollm.bench.records import Verdict, at_most
from ollm.bench.weights.plan import most_memory, streamed_bytes
from ollm.bench.weights.records import Case, Geometry, Measured, Outcome

_MOST_TIMES = 1.15
_MOST_OF_ACCELERATE = 1.0
_MOST_OF_NOTHING_RESIDENT = 0.6
_MOST_OF_WEIGHTS = 1.01
"""A prompt reads each weight once, and disks are read in whole blocks."""


def judge(outcomes: Sequence[Outcome], geometry: Geometry) -> list[Outcome]:
    """The same outcomes of a whole run with what was possible, and with verdicts."""
    return [_judge_one(outcome, outcomes, geometry) for outcome in outcomes]


def _judge_one(outcome: Outcome, outcomes: Sequence[Outcome], geometry: Geometry) -> Outcome:
    measured = outcome.measured
    if measured is None or not measured.step_seconds:
        return outcome
    computing = _computing(outcome.case, outcomes)
    achievable = max(computing, _reading(measured, measured.bytes_per_step))
    verdicts = _verdicts(outcome.case, measured, computing, outcomes, geometry) if outcome.case.kind == "ollm" else []
    possible = measured.seconds / achievable if achievable else None
    return attrs.evolve(outcome, achievable_seconds=achievable or None, possible=possible, verdicts=verdicts)


def _verdicts(
    case: Case, measured: Measured, computing: float, outcomes: Sequence[Outcome], geometry: Geometry
) -> list[Verdict]:
    if case.resident is None:
        return []
    weights = streamed_bytes(case, geometry)
    if case.prompt:
        once = (measured.bytes_per_step - measured.kv_bytes_per_step) / weights
        return [at_most("once", "weights read, of one reading of each", once, _MOST_OF_WEIGHTS)]
    found = []
    # bytes that are read beyond those that are needed are no excuse for being slow
    needed = min(weights + geometry.kv_bytes_per_token * case.kv_tokens, measured.bytes_per_step)
    reading = _reading(measured, needed)
    times = measured.seconds / max(computing, reading) if max(computing, reading) else float("inf")
    if case.kv_tokens:
        found.append(at_most("P13", "seconds, of what is possible", times, _MOST_TIMES))
    elif not case.resident:
        found.append(at_most("P9", "seconds, of what is possible", times, _MOST_TIMES))
        offloaded = _seconds(outcomes, Case(kind="accelerate"))
        if offloaded is not None:
            share = measured.seconds / offloaded
            found.append(at_most("P9", "seconds, of accelerate's disk offload", share, _MOST_OF_ACCELERATE))
    elif case.resident == len(geometry.layer_bytes) // 2 and reading >= computing:
        everything = _seconds(outcomes, Case(kind="ollm", resident=0))
        if everything is not None:
            share = measured.seconds / everything
            found.append(at_most("P10", "seconds, of those with nothing resident", share, _MOST_OF_NOTHING_RESIDENT))
    most = most_memory(case, geometry)
    found.append(at_most("memory", "above the process before loading", measured.peak / 1e6, most / 1e6, "MB"))
    return found


def _computing(case: Case, outcomes: Sequence[Outcome]) -> float:
    """Seconds of the same work with all weights in memory; 0 where that could not be measured."""
    return _seconds(outcomes, Case(kind="memory", kv_tokens=case.kv_tokens, prompt=case.prompt)) or 0.0


def _reading(measured: Measured, nbytes: int) -> float:
    """Seconds of reading so much raw, at the rate around this case's steps."""
    return nbytes / measured.rates.read if measured.rates else 0.0


def _seconds(outcomes: Sequence[Outcome], case: Case) -> float | None:
    """The mean over all turns of a case; `None` if it was not measured."""
    found = [outcome.measured.seconds for outcome in outcomes if outcome.case == case and outcome.measured is not None]
    return statistics.mean(found) if found else None
