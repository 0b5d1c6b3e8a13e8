"""What every benchmark makes of its numbers: what was possible, what is asked for, and when a run says too little.
Pure; measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import attrs

from ollm_bench.records import C, M, Measured, Outcome, Verdict

MOST_TIMES = 1.15
"""What a step may take, as a multiple of what memory and disk allow."""

_LEAST_SECONDS = 0.02
"""Steps below this are mostly what Python and the kernel take, whatever was measured."""
_MOST_SPREAD = 1.5
"""Single readings of a disk, a second apart, may differ by a third."""


def at_most(what: str, value: float, limit: float, unit: str = "x") -> Verdict:
    """What a value must not be above."""
    return Verdict(what=what, value=value, limit=limit, at_least=False, unit=unit, reached=value <= limit)


def at_least(what: str, value: float, limit: float) -> Verdict:
    """What a value must not be below."""
    return Verdict(what=what, value=value, limit=limit, at_least=True, unit="x", reached=value >= limit)


def against_possible(measured: Measured, nbytes: int, computing: float, computed: str) -> Verdict:
    """A step compared with the longer of reading and computing, whichever that is here.

    Args:
        measured: the step.
        nbytes: what it has to read.
        computing: the seconds of the same step in memory; 0 where nobody measured them.
        computed: whose those are, such as `StaticCache's time`.
    """
    reading = reading_seconds(measured, nbytes)
    if reading >= computing:
        return at_least("of the disk's rate", reading / measured.seconds, 1 / MOST_TIMES)
    return at_most(f"of {computed}", measured.seconds / computing, MOST_TIMES)


def reading_seconds(measured: Measured, nbytes: int) -> float:
    """Of reading so many bytes raw, at the rate around the steps of a case."""
    return nbytes / measured.rates.read if measured.rates else 0.0


def baseline(outcomes: Sequence[Outcome[C, M]], outcome: Outcome[C, M], alike: Callable[[C], bool]) -> float | None:
    """The seconds of a step to compare an outcome of the run with: the mean of the measured cases that are `alike`, of
    the one that ran next before and the one next after, for machines drift. `None` if none was measured."""
    at = next(place for place, other in enumerate(outcomes) if other is outcome)
    found = [
        (place, other.measured.seconds)
        for place, other in enumerate(outcomes)
        if other.measured is not None and alike(other.case)
    ]
    before = [seconds for place, seconds in found if place <= at][-1:]
    after = [seconds for place, seconds in found if place >= at][:1]
    return statistics.mean(before + after) if found else None


def judged(outcome: Outcome[C, M], computing: float, verdicts: Sequence[Verdict]) -> Outcome[C, M]:
    """An outcome with what was possible, the longer of computing and of reading what it read, and with its verdicts,
    one of each."""
    measured = outcome.measured
    assert measured is not None
    achievable = max(computing, reading_seconds(measured, measured.bytes_per_step))
    once = list({verdict.what: verdict for verdict in verdicts}.values())
    return attrs.evolve(
        outcome,
        achievable_seconds=achievable or None,
        possible=measured.seconds / achievable if achievable else None,
        verdicts=once,
        doubts=_doubts(measured) if once else [],
    )


def too_little(outcomes: Sequence[Outcome[C, M]]) -> Iterator[str]:
    """What a whole run cannot tell, and what to do: a line if it was too small, and one if it was too noisy."""
    judged = [(outcome, outcome.measured) for outcome in outcomes if outcome.verdicts and outcome.measured is not None]
    small = [measured.seconds * 1000 for _, measured in judged if _is_small(measured)]
    noisy = [outcome for outcome, measured in judged if _is_noisy(measured)]
    if small:
        yield (
            f"too small to judge: {len(small)} of {len(judged)} cases, whose steps take {_between(small)} ms; from "
            f"{_LEAST_SECONDS * 1000:.0f} ms on times say something. Ask for more tokens or a larger model."
        )
    if noisy:
        yield (
            f"too noisy to judge: {len(noisy)} of {len(judged)} cases, during which the disk's rate changed by more "
            "than half. Run nothing else meanwhile, or try again later."
        )


def _between(numbers: Sequence[float]) -> str:
    low, high = f"{min(numbers):.0f}", f"{max(numbers):.0f}"
    return low if low == high else f"{low} to {high}"


def _is_small(measured: Measured) -> bool:
    return measured.seconds < _LEAST_SECONDS


def _is_noisy(measured: Measured) -> bool:
    rates = [sample.rate for sample in measured.rates.reads] if measured.rates else []
    return bool(rates) and max(rates) > _MOST_SPREAD * min(rates)


def _doubts(measured: Measured) -> list[str]:
    found = []
    if _is_small(measured):
        found.append(f"steps of {measured.seconds * 1000:.0f} ms say little: ask for more tokens or a larger model")
    if _is_noisy(measured):
        assert measured.rates is not None
        rates = [sample.rate / 1e9 for sample in measured.rates.reads]
        found.append(f"the disk read between {min(rates):.2f} and {max(rates):.2f} GB/s meanwhile: run nothing else")
    return found
