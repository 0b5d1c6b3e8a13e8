"""A report for people: a table with bars on a terminal, plain lines elsewhere. Computes nothing but text."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ollm.bench.records import Geometry, Outcome, Report, Verdict

_COLUMNS = ("case", "s per token", "MB per token", "GB/s of possible", "times possible", "peak MB", "verdict")
_WIDE = 110
"""From this many columns on there is room for long bars."""
_PARTS = " ▏▎▍▌▋▊▉█"


def print_report(report: Report, console: Console) -> None:
    """To the console: with colours and bars if it is a terminal, else without anything but text."""
    show = _print_rich if console.is_terminal else _print_plain
    show(report, console)


def headline(report: Report) -> str:
    """Geometry, machine and date."""
    machine = report.machine
    lengths = " and ".join(f"{tokens:,}" for tokens in _lengths(report))
    return (
        f"{describe(report.geometry)}; {lengths} tokens; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['file_system']}; {report.date}"
    )


def describe(geometry: Geometry) -> str:
    """The model in a line."""
    name = geometry.model or "Llama with random weights"
    return (
        f"{name}: {geometry.layers} layers, {geometry.kv_heads} KV heads of {geometry.head_dim}, {geometry.dtype}, "
        f"{geometry.bytes_per_token / 1024:g} KiB per token"
    )


def _print_plain(report: Report, console: Console) -> None:
    rows = [_COLUMNS, *(_cells(outcome, report) for outcome in _cached(report))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [headline(report), *_disk_lines(report), *(f"note: {note}" for note in report.notes), ""]
    for row in rows:
        cells = [
            text.ljust(width) if column in (0, len(row) - 1) else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines += ["", *(f"{where}: {_sentence(verdict)}" for where, verdict in _all_verdicts(report))]
    for line in lines:
        console.out(line, highlight=False)


def _print_rich(report: Report, console: Console) -> None:
    console.print(Text(headline(report), style="bold"))
    for line in _disk_lines(report):
        console.print(Text(line))
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    console.print()
    console.print(_table(report, bar_width=20 if console.width >= _WIDE else 6))
    console.print()
    for where, verdict in _all_verdicts(report):
        console.print(Text(f"{where}: {_sentence(verdict)}", style="green" if verdict.reached else "red"))


def _table(report: Report, bar_width: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column(_COLUMNS[0])
    table.add_column(_in_two_lines(_COLUMNS[1]), justify="right")
    table.add_column("", width=bar_width, no_wrap=True)
    for name in _COLUMNS[2:-1]:
        table.add_column(_in_two_lines(name), justify="right")
    table.add_column(_COLUMNS[-1])
    outcomes = _cached(report)
    longest = max((_seconds(outcome) for outcome in outcomes), default=0.0)
    for outcome in outcomes:
        name, seconds, *middle, verdict = _cells(outcome, report)
        bar = Text(_bar(_seconds(outcome), longest, bar_width), style=_colour(outcome))
        last = _marks(outcome) if outcome.verdicts else Text(verdict, style="" if outcome.measured else "yellow")
        table.add_row(Text(name), seconds, bar, *middle, last)
    return table


def _cells(outcome: Outcome, report: Report) -> tuple[str, ...]:
    """One text for each column, in the order of `_COLUMNS`."""
    name = outcome.case.label.removesuffix(" resident")
    if len(_lengths(report)) > 1:
        name += f", {outcome.case.tokens:,}"
    measured = outcome.measured
    if measured is None:
        return (name, *[""] * (len(_COLUMNS) - 2), f"{outcome.status}: {outcome.reason}")
    megabytes = measured.bytes_per_step / 1e6
    reading, times = "", f"{outcome.possible:.2f}" if outcome.possible else ""
    if measured.bytes_per_step and outcome.achievable_seconds:
        achieved, achievable = (
            measured.bytes_per_step / seconds / 1e9 for seconds in (measured.seconds, outcome.achievable_seconds)
        )
        reading = f"{achieved:.2f}/{achievable:.2f}"
    return (
        name,
        f"{measured.seconds:.3f}",
        f"{megabytes:,.{1 if 0 < megabytes < 10 else 0}f}",
        reading,
        times,
        f"{measured.peak / 1e6:,.0f}",
        _verdict_text(outcome),
    )


def _lengths(report: Report) -> list[int]:
    return list(dict.fromkeys(outcome.case.tokens for outcome in _cached(report)))


def _in_two_lines(name: str) -> str:
    """A heading as narrow as its numbers."""
    head, _, last = name.rpartition(" ")
    return f"{head}\n{last}"


def _verdict_text(outcome: Outcome) -> str:
    if outcome.case.kind != "strategy":
        return "baseline"
    return " ".join(f"{verdict.bar} {'ok' if verdict.reached else 'missed'}" for verdict in outcome.verdicts)


def _marks(outcome: Outcome) -> Text:
    text = Text()
    for verdict in outcome.verdicts:
        text.append(f"{verdict.bar}{'✓' if verdict.reached else '✗'} ", style="green" if verdict.reached else "red")
    text.rstrip()
    return text


def _sentence(verdict: Verdict) -> str:
    unit, digits = (" MB", 0) if verdict.unit == "MB" else (" x", 2)
    bound = "at least" if verdict.at_least else "at most"
    return (
        f"{verdict.bar} {verdict.what}: {verdict.value:,.{digits}f}{unit}, {bound} {verdict.limit:,.{digits}f}: "
        f"{'reached' if verdict.reached else 'missed'}"
    )


def _all_verdicts(report: Report) -> Iterator[tuple[str, Verdict]]:
    for outcome in report.outcomes:
        for verdict in outcome.verdicts:
            yield f"{outcome.case.label}, {outcome.case.tokens:,}", verdict


def _disk_lines(report: Report) -> Iterator[str]:
    for outcome in report.outcomes:
        if outcome.case.kind != "disk":
            continue
        if outcome.measured is None or outcome.measured.rates is None:
            yield f"raw disk: {outcome.status}: {outcome.reason}"
            continue
        rates = outcome.measured.rates
        how = "unbuffered" if rates.direct else "through the kernel's cache: O_DIRECT is refused here"
        yield (
            f"raw disk: reads {rates.read / 1e9:.2f} GB/s, writes {rates.write / 1e9:.2f} GB/s "
            f"({how}; measured again around each case)"
        )


def _cached(report: Report) -> list[Outcome]:
    """All but the disk alone."""
    return [outcome for outcome in report.outcomes if outcome.case.kind != "disk"]


def _seconds(outcome: Outcome) -> float:
    return outcome.measured.seconds if outcome.measured else 0.0


def _colour(outcome: Outcome) -> str:
    if outcome.case.kind != "strategy":
        return "bright_black"
    return "green" if all(verdict.reached for verdict in outcome.verdicts) else "red"


def _bar(value: float, longest: float, width: int) -> str:
    eighths = round(value / longest * width * 8) if longest else 0
    whole, part = divmod(eighths, 8)
    return "█" * whole + (_PARTS[part] if part else "")
