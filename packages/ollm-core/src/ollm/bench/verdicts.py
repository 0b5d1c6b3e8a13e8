"""What a case could have reached, and which of ollm's own bars it holds. Pure arithmetic.

The law: a decode step takes the larger of what it computes and what it reads; StaticCache, which reads nothing and
copies nothing, stands for what it computes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import attrs

from ollm.bench.records import Case, Measured, Outcome, Resident, Status

SLACK = 1.15
"""A step may take this times what is possible (P1, P3, P4, P5)."""
MOST_MEMORY = 300 * 10**6
"""Above the model, with nothing resident (P2)."""
LEAST_FILL = 0.8
"""Of the raw write rate (P8)."""
LEAST_GAIN = 0.8
"""Of DynamicCache's time, on disks of at least `FAST_DISK` (P1)."""
FAST_DISK = 1.3e9


@attrs.frozen(kw_only=True)
class Verdict:
    """One case against what is possible. Seconds, bytes per second; `None` where it was not measured."""

    seconds: float
    """Per token: the median."""
    possible: float | None
    read_rate: float | None
    """What the disk gives, raw, by this case's own measure."""
    achieved_rate: float | None
    peak: int
    held: list[str]
    missed: list[str]

    @property
    def ratio(self) -> float | None:
        """How many times what is possible it takes."""
        return self.seconds / self.possible if self.possible else None


def judge(outcome: Outcome, outcomes: Sequence[Outcome]) -> Verdict | None:
    """The verdict on a case that was measured, beside the others of the same run; `None` for any other."""
    measured = outcome.measured
    if measured is None:
        return None
    case, seconds = outcome.case, statistics.median(measured.seconds)
    rate = statistics.mean(measured.read_rates) if measured.read_rates else None
    static = seconds_of("StaticCache", case, outcomes)
    reading = measured.bytes_per_step / rate if rate else 0.0
    possible = max(reading, static or 0.0) or None
    verdict = Verdict(
        seconds=seconds,
        possible=possible if case.on_disk else None,
        read_rate=rate,
        achieved_rate=measured.bytes_per_step / seconds if measured.bytes_per_step else None,
        peak=max(measured.peak_fill, measured.peak_decode),
        held=[],
        missed=[],
    )
    for bar, holds in _bars(case, measured, verdict, seconds_of("DynamicCache", case, outcomes)):
        (verdict.held if holds else verdict.missed).append(bar)
    return verdict


def seconds_of(name: str, case: Case, outcomes: Sequence[Outcome]) -> float | None:
    """The median step of a baseline at the same length, if it was measured."""
    for other in outcomes:
        if (other.case.name, other.case.tokens, other.status) == (name, case.tokens, Status.DONE):
            assert other.measured is not None
            return statistics.median(other.measured.seconds)
    return None


def _bars(case: Case, measured: Measured, verdict: Verdict, dynamic: float | None) -> list[tuple[str, bool]]:
    """Every bar that is about this case, and whether it holds."""
    if not case.on_disk or case.name == "resident":
        return []
    bars = []
    limited = case.cgroup is not None
    name = {Resident.NOTHING: "P5" if limited else "P1", Resident.HALF: "P4", Resident.ALL: "P3"}.get(case.resident)
    if name and verdict.ratio is not None:
        bars.append((f"{name} {verdict.ratio:.2f} (at most {SLACK})", verdict.ratio <= SLACK))
    if case.resident is Resident.NOTHING:
        if dynamic and verdict.read_rate and verdict.read_rate >= FAST_DISK:
            gain = verdict.seconds / dynamic
            bars.append((f"P1 {gain:.2f} of DynamicCache (at most {LEAST_GAIN})", gain <= LEAST_GAIN))
        bars.append((f"P2 {verdict.peak / 1e6:.0f} MB (at most {MOST_MEMORY / 1e6:.0f})", verdict.peak <= MOST_MEMORY))
    if case.resident is Resident.NOTHING and measured.write_rate and measured.fill_seconds:
        fill = measured.fill_bytes / measured.fill_seconds / measured.write_rate
        bars.append((f"P8 {fill:.2f} of the write rate (at least {LEAST_FILL})", fill >= LEAST_FILL))
    return bars
