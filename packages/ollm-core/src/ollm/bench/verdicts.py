"""What numbers mean: what disk and memory would allow, and which bars a case is over. Pure; measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import attrs

from ollm.bench.plan import STRATEGY_BYTES
from ollm.bench.records import Geometry, Measured, Outcome, Verdict

_MOST_TIMES = 1.15
_MOST_OF_DYNAMIC = 0.8
_FAST_DISK = 1.3e9
"""From this raw read rate on, a cache on disk must also beat DynamicCache."""
_LEAST_OF_WRITING = 0.8


def judge(outcomes: Sequence[Outcome], geometry: Geometry, *, limited: bool) -> list[Outcome]:
    """The same outcomes with what was possible, and with verdicts.

    Args:
        outcomes: of a whole run; cases are compared with the baselines of the same number of tokens.
        geometry: of the model.
        limited: whether the cases ran inside a memory limit.
    """
    return [_judge_one(outcome, outcomes, geometry, limited) for outcome in outcomes]


def _judge_one(outcome: Outcome, outcomes: Sequence[Outcome], geometry: Geometry, limited: bool) -> Outcome:
    measured = outcome.measured
    if measured is None or not measured.step_seconds:
        return outcome
    static = _baseline(outcomes, "static", outcome.case.tokens)
    achievable = _achievable(measured, static, measured.bytes_per_step)
    if achievable is None:
        return outcome
    verdicts: list[Verdict] = []
    if outcome.case.kind == "strategy":
        dynamic = _baseline(outcomes, "dynamic", outcome.case.tokens)
        verdicts = _verdicts(outcome, measured, geometry, static, dynamic, limited)
    return attrs.evolve(
        outcome, achievable_seconds=achievable, possible=measured.seconds / achievable, verdicts=verdicts
    )


def _verdicts(
    outcome: Outcome, measured: Measured, geometry: Geometry, static: float | None, dynamic: float | None, limited: bool
) -> list[Verdict]:
    assert measured.rates is not None  # every strategy's case measures the disk
    found = []
    residency = outcome.case.residency
    everything = geometry.kv_bytes(outcome.case.tokens)
    if residency == "nothing":
        found.append(_times("P1", "seconds, of what is possible", measured, static, everything))
        if dynamic is not None and measured.rates.read >= _FAST_DISK:
            found.append(_most("P1", "seconds, of DynamicCache's", measured.seconds / dynamic, _MOST_OF_DYNAMIC))
        found.append(_most("P2", "memory above the model", measured.peak / 1e6, STRATEGY_BYTES / 1e6, "MB"))
        if limited:
            found.append(_times("P5", "seconds inside the limit, of reading raw", measured, None, everything))
    if residency == "everything" and static is not None:
        found.append(_most("P3", "seconds, of StaticCache's", measured.seconds / static, _MOST_TIMES))
    if residency == "half":
        found.append(_times("P4", "seconds, of what is possible", measured, static, everything // 2))
    # where a part stays resident, filling also copies that: more work than appending
    if residency == "nothing" and measured.bytes_written and measured.fill_seconds:
        share = measured.bytes_written / measured.fill_seconds / measured.rates.write
        found.append(
            Verdict(
                bar="P8",
                what="filling, of the raw write rate",
                value=share,
                limit=_LEAST_OF_WRITING,
                at_least=True,
                unit="x",
                reached=share >= _LEAST_OF_WRITING,
            )
        )
    return found


def _times(bar: str, what: str, measured: Measured, static: float | None, needed: int) -> Verdict:
    """Bytes that a strategy reads beyond those that it needs to are no excuse for being slow."""
    achievable = _achievable(measured, static, min(measured.bytes_per_step, needed))
    return _most(bar, what, measured.seconds / achievable if achievable else float("inf"), _MOST_TIMES)


def _most(bar: str, what: str, value: float, limit: float, unit: str = "x") -> Verdict:
    return Verdict(bar=bar, what=what, value=value, limit=limit, at_least=False, unit=unit, reached=value <= limit)


def _achievable(measured: Measured, static: float | None, nbytes: int) -> float | None:
    """Seconds of a step that memory and disk allow; `None` when there is nothing to compare with."""
    reading = nbytes / measured.rates.read if measured.rates else 0.0
    return max(static or 0.0, reading) or None


def _baseline(outcomes: Sequence[Outcome], kind: str, tokens: int) -> float | None:
    """The mean over all its cases at this length; `None` if none was measured."""
    found = [
        outcome.measured.seconds
        for outcome in outcomes
        if (outcome.case.kind, outcome.case.tokens) == (kind, tokens) and outcome.measured is not None
    ]
    return statistics.mean(found) if found else None
