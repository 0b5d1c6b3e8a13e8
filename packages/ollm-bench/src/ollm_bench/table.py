"""A report for people: a table with bars on a terminal, plain lines elsewhere. Computes nothing but text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import attrs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ollm_bench.records import Outcome, Report, Verdict
from ollm_bench.verdicts import too_little

_WIDE = 110
"""From this many columns on there is room for long bars."""
_PARTS = " ▏▎▍▌▋▊▉█"

AnyOutcome: TypeAlias = Outcome[Any, Any]
AnyReport: TypeAlias = Report[Any, Any, Any]


@attrs.frozen(kw_only=True)
class Wording:
    """What a benchmark calls what it measured."""

    subject: str
    """The model, and what it was given."""
    step: str
    """What is done once in the seconds that are shown: `token` or `step`."""
    above: str
    """What the memory that is shown comes on top of."""


def print_report(report: AnyReport, wording: Wording, console: Console) -> None:
    """To the console: with colours and bars if it is a terminal, else without anything but text."""
    show = _print_rich if console.is_terminal else _print_plain
    show(report, wording, console)


def headline(report: AnyReport, wording: Wording) -> str:
    """Model, machine and date."""
    machine = report.machine
    return (
        f"{wording.subject}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['file_system']}; {report.date}"
    )


def _print_plain(report: AnyReport, wording: Wording, console: Console) -> None:
    rows = [_columns(report, wording), *(_cells(outcome, report) for outcome in _but_disk(report))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [headline(report, wording), *_disk_lines(report), *(f"note: {note}" for note in report.notes), ""]
    for row in rows:
        cells = [
            text.ljust(width) if column in (0, len(row) - 1) else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines += ["", *(text for text, _ in _verdict_lines(report))]
    for line in lines:
        console.out(line, highlight=False)


def _print_rich(report: AnyReport, wording: Wording, console: Console) -> None:
    console.print(Text(headline(report, wording), style="bold"))
    for line in _disk_lines(report):
        console.print(Text(line))
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    console.print()
    console.print(_table(report, wording, bar_width=20 if console.width >= _WIDE else 6))
    console.print()
    for text, colour in _verdict_lines(report):
        console.print(Text(text, style=colour))


def _table(report: AnyReport, wording: Wording, bar_width: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    first, seconds, *middle, last = _columns(report, wording)
    table.add_column(first)
    table.add_column(_in_two_lines(seconds), justify="right")
    table.add_column("", width=bar_width, no_wrap=True)
    for name in middle:
        table.add_column(_in_two_lines(name), justify="right")
    table.add_column(last)
    outcomes = _but_disk(report)
    longest = max(map(_step_seconds, outcomes), default=0.0)
    for outcome in outcomes:
        first, seconds, *middle, last = _cells(outcome, report)
        bar = Text(_bar(_step_seconds(outcome), longest, bar_width), style=_colour(outcome))
        style = _colour(outcome) if outcome.verdicts else "" if outcome.measured else "yellow"
        table.add_row(Text(first), seconds, bar, *middle, Text(last, style=style))
    return table


def _columns(report: AnyReport, wording: Wording) -> tuple[str, ...]:
    first = [f"first {wording.step}"] if _has_first(report) else []
    return (
        "case", f"s per {wording.step}", *first, f"MB per {wording.step}", "GB/s of possible", "times possible",
        "peak MB", "verdict",
    )  # fmt: skip


def _cells(outcome: AnyOutcome, report: AnyReport) -> tuple[str, ...]:
    """One text for each column, in the order of `_columns`."""
    name = _name(outcome, report)
    measured = outcome.measured
    has_first = _has_first(report)
    if measured is None:
        return (name, *[""] * (6 if has_first else 5), f"{outcome.status}: {outcome.reason}")
    megabytes = measured.bytes_per_step / 1e6
    reading, times = "", f"{outcome.possible:.2f}" if outcome.possible else ""
    if measured.bytes_per_step and outcome.achievable_seconds:
        achieved, achievable = (
            measured.bytes_per_step / seconds / 1e9 for seconds in (measured.seconds, outcome.achievable_seconds)
        )
        reading = f"{achieved:.2f}/{achievable:.2f}"
    first = "" if measured.first_seconds is None else f"{measured.first_seconds:.3f}"
    return (
        name,
        f"{measured.seconds:.3f}",
        *([first] if has_first else []),
        f"{megabytes:,.{1 if 0 < megabytes < 10 else 0}f}",
        reading,
        times,
        f"{measured.peak / 1e6:,.0f}",
        _verdict_text(outcome),
    )


def _name(outcome: AnyOutcome, report: AnyReport) -> str:
    """As short as the other cases allow."""
    case = outcome.case
    alike = {other.case.title for other in report.outcomes if other.case.label == case.label}
    name: str = case.label if len(alike) == 1 else case.title
    return name.replace(" resident", "")


def _has_first(report: AnyReport) -> bool:
    return any(outcome.measured and outcome.measured.first_seconds is not None for outcome in report.outcomes)


def _in_two_lines(name: str) -> str:
    """A heading as narrow as its numbers."""
    head, _, last = name.rpartition(" ")
    return f"{head}\n{last}"


def _verdict_text(outcome: AnyOutcome) -> str:
    """What the lines below the table say, in short."""
    if outcome.case.is_baseline:
        return "baseline"
    if not outcome.verdicts:
        return outcome.measured.remark if outcome.measured else ""
    if outcome.doubts:
        return "unsure"
    missed = [_number(verdict) for verdict in outcome.verdicts if not verdict.reached]
    return f"missed: {'; '.join(missed)}" if missed else "reached"


def _number(verdict: Verdict) -> str:
    amount = f"{verdict.value:,.0f} MB" if verdict.unit == "MB" else f"{verdict.value:,.2f}"
    return f"{amount} {verdict.what}"


def _sentence(verdict: Verdict, judgement: str) -> str:
    bound = "at least" if verdict.at_least else "at most"
    limit = f"{verdict.limit:,.0f}" if verdict.unit == "MB" else f"{verdict.limit:,.2f}"
    return f"{_number(verdict)}, {bound} {limit}: {judgement}"


def _verdict_lines(report: AnyReport) -> Iterator[tuple[str, str]]:
    """A line for each verdict and each doubt, and what the run as a whole cannot tell, with their colours."""
    for outcome in report.outcomes:
        for verdict in outcome.verdicts:
            judgement, colour = ("reached", "green") if verdict.reached else ("missed", "red")
            if outcome.doubts and verdict.unit == "x":  # seconds; memory can be told all the same
                judgement, colour = "unsure", "yellow"
            yield f"{outcome.case.title}: {_sentence(verdict, judgement)}", colour
        for doubt in outcome.doubts:
            yield f"{outcome.case.title}: unsure, for {doubt}", "yellow"
    for line in too_little(report.outcomes):
        yield line, "bold yellow"


def _disk_lines(report: AnyReport) -> Iterator[str]:
    for outcome in report.outcomes:
        if outcome.case.kind != "disk":
            continue
        if outcome.measured is None or outcome.measured.rates is None:
            yield f"raw disk: {outcome.status}: {outcome.reason}"
            continue
        rates = outcome.measured.rates
        writes = f", writes {rates.write / 1e9:.2f} GB/s" if rates.writes else ""
        how = "unbuffered" if rates.direct else "through the kernel's cache: O_DIRECT is refused here"
        yield (f"raw disk: reads {rates.read / 1e9:.2f} GB/s{writes} ({how}; measured again around each case)")


def _but_disk(report: AnyReport) -> list[AnyOutcome]:
    """All but the disk alone."""
    return [outcome for outcome in report.outcomes if outcome.case.kind != "disk"]


def _step_seconds(outcome: AnyOutcome) -> float:
    return outcome.measured.seconds if outcome.measured and outcome.case.is_step else 0.0


def _colour(outcome: AnyOutcome) -> str:
    if outcome.case.is_baseline:
        return "bright_black"
    if outcome.doubts:
        return "yellow"
    return "green" if all(verdict.reached for verdict in outcome.verdicts) else "red"


def _bar(value: float, longest: float, width: int) -> str:
    eighths = round(value / longest * width * 8) if longest else 0
    whole, part = divmod(eighths, 8)
    return "█" * whole + (_PARTS[part] if part else "")
