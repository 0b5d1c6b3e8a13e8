"""What numbers mean: what disk and memory would allow, and what each cache is asked for. Pure; measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from ollm_bench.kv.plan import STRATEGY_BYTES
from ollm_bench.kv.records import Case, Geometry, Measured, Outcome
from ollm_bench.records import Verdict
from ollm_bench.verdicts import MOST_TIMES, against_possible, at_least, at_most, baseline, judged

_MOST_OF_DYNAMIC = 0.8
_MOST_OF_ONE = 1.5
"""What a step of many continuations of one document may cost."""
_MOST_OF_BYTES = 0.55
_MOST_OF_EXACT = 0.9
"""A lossy strategy that stores less than this is asked for what only fewer bytes can give."""
_FAST_DISK = 1.3e9
"""From this raw read rate on, a cache on disk must also beat DynamicCache."""
_LEAST_OF_WRITING = 0.8
_STATIC = "StaticCache's time"


def judge(outcomes: Sequence[Outcome], geometry: Geometry, limited: bool) -> list[Outcome]:
    """The same outcomes with what was possible, and with verdicts.

    Args:
        outcomes: of a whole run, in order; a case is compared with baselines of the same number of tokens.
        geometry: of the model.
        limited: whether the cases ran inside a memory limit.
    """
    return [_judge_one(outcome, outcomes, geometry, limited) for outcome in outcomes]


def _judge_one(outcome: Outcome, outcomes: Sequence[Outcome], geometry: Geometry, limited: bool) -> Outcome:
    measured, case = outcome.measured, outcome.case
    if measured is None or not measured.step_seconds:
        return outcome

    def seconds(kind: str) -> float | None:
        return baseline(outcomes, outcome, lambda other: (other.kind, other.tokens) == (kind, case.tokens))

    static = seconds("static")
    verdicts: list[Verdict] = []
    if case.kind == "strategy" and (static is not None or measured.bytes_per_step):
        if case.forks > 1:
            verdicts = _of_forks(case, measured, outcomes)
        else:
            verdicts = _of_one(case, measured, geometry, outcomes, static, seconds("dynamic"), limited)
    return judged(outcome, static or 0.0, verdicts)


def _of_one(
    case: Case, measured: Measured, geometry: Geometry, outcomes: Sequence[Outcome],
    static: float | None, dynamic: float | None, limited: bool,
) -> list[Verdict]:  # fmt: skip
    assert measured.rates is not None  # every strategy's case measures the disk
    exact = geometry.kv_bytes(case.tokens)
    stored = min(exact, measured.stored_bytes or exact)
    fewer = not case.lossless and stored < _MOST_OF_EXACT * exact
    # what a lossless strategy saves by packing is its gain: it is compared with reading what it was given
    everything = stored if fewer else exact
    read = measured.bytes_per_step * everything // stored
    # bytes that a strategy reads beyond those that it needs to are no excuse for being slow
    needed = min(read, everything // 2 if case.residency == "half" else everything)
    found: list[Verdict] = []
    if case.residency in ("nothing", "half"):
        found.append(against_possible(measured, needed, static or 0.0, _STATIC))
    if case.residency == "everything" and static is not None and not fewer:
        found.append(at_most(f"of {_STATIC}", measured.seconds / static, MOST_TIMES))
    if case.residency != "nothing":
        return found
    if limited:
        found.append(against_possible(measured, needed, 0.0, ""))
    if dynamic is not None and measured.rates.read >= _FAST_DISK:
        found.append(at_most("of DynamicCache's time", measured.seconds / dynamic, _MOST_OF_DYNAMIC))
    if fewer:
        found += _of_fewer_bytes(case, measured, outcomes, stored / exact)
    found.append(at_most("of memory above the model", measured.peak / 1e6, STRATEGY_BYTES / 1e6, "MB"))
    # where a part stays resident, filling also copies that: more work than appending
    if measured.bytes_written and measured.fill_seconds:
        share = measured.bytes_written / measured.fill_seconds / measured.rates.write
        found.append(at_least("of the disk's write rate while filling", share, _LEAST_OF_WRITING))
    return found


def _of_forks(case: Case, measured: Measured, outcomes: Sequence[Outcome]) -> list[Verdict]:
    alone = [other.measured for other in outcomes if other.case == attrs.evolve(case, forks=1)]
    return [
        at_most("of the time of one alone", measured.seconds / one.seconds, _MOST_OF_ONE)
        for one in alone
        if one is not None
    ]


def _of_fewer_bytes(case: Case, measured: Measured, outcomes: Sequence[Outcome], share: float) -> list[Verdict]:
    """For strategies that store less than they are given: decoding that is work too, which is in their own step with
    everything resident."""
    resident = [
        other.measured.seconds
        for other in outcomes
        if other.measured is not None and other.case.residency == "everything"
        and (other.case.strategy, other.case.tokens) == (case.strategy, case.tokens)
    ]  # fmt: skip
    if not resident:
        return []
    return [
        at_most("of the exact bytes", share, _MOST_OF_BYTES),
        against_possible(measured, measured.stored_bytes, max(resident), "its own time with everything resident"),
    ]
