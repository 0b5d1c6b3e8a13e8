"""What numbers mean: what disk and memory would allow, and which bars a case is over. Pure; measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import attrs

from ollm.bench.kv.plan import STRATEGY_BYTES
from ollm.bench.kv.records import Geometry, Measured, Outcome
from ollm.bench.records import Verdict, at_most

_MOST_TIMES = 1.15
_MOST_OF_DYNAMIC = 0.8
_MOST_OF_ONE = 1.5
"""What a step of many continuations of one document may cost."""
_MOST_OF_BYTES = 0.55
_MOST_OF_EXACT = 0.9
"""A strategy that stores less than this does not store what it is given."""
_FAST_DISK = 1.3e9
"""From this raw read rate on, a cache on disk must also beat DynamicCache."""
_LEAST_OF_WRITING = 0.8


def judge(outcomes: Sequence[Outcome], geometry: Geometry, *, limited: bool) -> list[Outcome]:
    """The same outcomes with what was possible, and with verdicts.

    Args:
        outcomes: of a whole run, in order; a case is compared with the baselines of the same number of tokens that ran
            next before and next after it, for machines drift.
        geometry: of the model.
        limited: whether the cases ran inside a memory limit.
    """
    return [_judge_one(outcome, outcomes, geometry, limited) for outcome in outcomes]


def _judge_one(outcome: Outcome, outcomes: Sequence[Outcome], geometry: Geometry, limited: bool) -> Outcome:
    measured = outcome.measured
    if measured is None or not measured.step_seconds:
        return outcome
    static = _baseline(outcomes, "static", outcome)
    achievable = _achievable(measured, static, measured.bytes_per_step)
    if achievable is None:
        return outcome
    verdicts: list[Verdict] = []
    if outcome.case.kind == "strategy":
        verdicts = _verdicts(outcome, measured, geometry, outcomes, limited)
    return attrs.evolve(
        outcome, achievable_seconds=achievable, possible=measured.seconds / achievable, verdicts=verdicts
    )


def _verdicts(
    outcome: Outcome, measured: Measured, geometry: Geometry, outcomes: Sequence[Outcome], limited: bool
) -> list[Verdict]:
    assert measured.rates is not None  # every strategy's case measures the disk
    static, dynamic = (_baseline(outcomes, kind, outcome) for kind in ("static", "dynamic"))
    found: list[Verdict] = []
    residency = outcome.case.residency
    exact = geometry.kv_bytes(outcome.case.tokens)
    everything = min(exact, measured.stored_bytes or exact)
    if outcome.case.forks > 1:
        alone = [other.measured for other in outcomes if other.case == attrs.evolve(outcome.case, forks=1)]
        return [
            at_most("forks", "seconds, of a step of one", measured.seconds / one.seconds, _MOST_OF_ONE)
            for one in alone
            if one is not None
        ]
    if everything < _MOST_OF_EXACT * exact:
        found += _of_fewer_bytes(outcome, measured, outcomes, everything / exact)
    if residency == "nothing":
        found.append(_times("P1", "seconds, of what is possible", measured, static, everything))
        if dynamic is not None and measured.rates.read >= _FAST_DISK:
            found.append(at_most("P1", "seconds, of DynamicCache's", measured.seconds / dynamic, _MOST_OF_DYNAMIC))
        found.append(at_most("P2", "memory above the model", measured.peak / 1e6, STRATEGY_BYTES / 1e6, "MB"))
        if limited:
            found.append(_times("P5", "seconds inside the limit, of reading raw", measured, None, everything))
    if residency == "everything" and static is not None and everything >= _MOST_OF_EXACT * exact:
        found.append(at_most("P3", "seconds, of StaticCache's", measured.seconds / static, _MOST_TIMES))
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


def _of_fewer_bytes(outcome: Outcome, measured: Measured, outcomes: Sequence[Outcome], share: float) -> list[Verdict]:
    """P7, for strategies that store less than they are given."""
    assert measured.rates is not None
    resident = [
        other.measured.seconds
        for other in outcomes
        if other.measured is not None and other.case.residency == "everything"
        and (other.case.strategy, other.case.tokens) == (outcome.case.strategy, outcome.case.tokens)
    ]  # fmt: skip
    if outcome.case.residency != "nothing" or not resident:
        return []
    possible = max(measured.stored_bytes / measured.rates.read, *resident)
    return [
        at_most("P7", "bytes, of the exact ones", share, _MOST_OF_BYTES),
        at_most("P7", "seconds, of reading raw or of its own all resident", measured.seconds / possible, _MOST_TIMES),
    ]


def _times(bar: str, what: str, measured: Measured, static: float | None, needed: int) -> Verdict:
    """Bytes that a strategy reads beyond those that it needs to are no excuse for being slow."""
    achievable = _achievable(measured, static, min(measured.bytes_per_step, needed))
    return at_most(bar, what, measured.seconds / achievable if achievable else float("inf"), _MOST_TIMES)


def _achievable(measured: Measured, static: float | None, nbytes: int) -> float | None:
    """Seconds of a step that memory and disk allow; `None` when there is nothing to compare with."""
    reading = nbytes / measured.rates.read if measured.rates else 0.0
    return max(static or 0.0, reading) or None


def _baseline(outcomes: Sequence[Outcome], kind: str, outcome: Outcome) -> float | None:
    """The mean of its cases next to an outcome of the run; `None` if none was measured at this length."""
    at = next(place for place, other in enumerate(outcomes) if other is outcome)
    found = [
        (place, other.measured.seconds)
        for place, other in enumerate(outcomes)
        if (other.case.kind, other.case.tokens) == (kind, outcome.case.tokens) and other.measured is not None
    ]
    before = [seconds for place, seconds in found if place <= at][-1:]
    after = [seconds for place, seconds in found if place >= at][:1]
    return statistics.mean(before + after) if found else None
