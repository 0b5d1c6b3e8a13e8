"""The outcomes as a table for people: with bars on a terminal, in plain aligned lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ollm.bench.records import Outcome, Status
from ollm.bench.verdicts import Verdict, judge

_BAR = 16
_HEADS = ("case", "s/token", "read MB", "GB/s of raw", "x possible", "memory MB", "bars")


@attrs.frozen
class Row:
    """One case, as text, with what its bar needs."""

    cells: tuple[str, ...]
    seconds: float
    verdict: Verdict | None
    status: Status


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """All outcomes in order."""
    return [_row(outcome, judge(outcome, outcomes)) for outcome in outcomes]


def print_table(console: Console, outcomes: Sequence[Outcome]) -> None:
    """One table per context length."""
    for tokens in dict.fromkeys(outcome.case.tokens for outcome in outcomes):
        at_length = [
            row for row, outcome in zip(rows(outcomes), outcomes, strict=True) if outcome.case.tokens == tokens
        ]
        title = f"{tokens:,} tokens"
        if console.is_terminal:
            console.print(_rich(title, at_length))
        else:
            console.print("\n".join([title, *_plain(at_length)]), markup=False, highlight=False, soft_wrap=True)


def _row(outcome: Outcome, verdict: Verdict | None) -> Row:
    title = outcome.case.title
    if verdict is None or outcome.measured is None:
        return Row(
            (title, "-", "-", "-", "-", "-", f"{outcome.status.value}: {outcome.reason}"), 0.0, None, outcome.status
        )
    rates = (
        f"{verdict.achieved_rate / 1e9:.2f} of {verdict.read_rate / 1e9:.2f}"
        if verdict.achieved_rate and verdict.read_rate
        else "-"
    )
    cells = (
        title,
        f"{verdict.seconds:.3f}",
        f"{outcome.measured.bytes_per_step / 1e6:,.0f}",
        rates,
        "-" if verdict.ratio is None else f"{verdict.ratio:.2f}",
        f"{verdict.peak / 1e6:,.0f}",
        "; ".join([*(f"{bar} held" for bar in verdict.held), *(f"{bar} MISSED" for bar in verdict.missed)]),
    )
    return Row(cells, verdict.seconds, verdict, outcome.status)


def _rich(title: str, table_rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", header_style="dim", box=None, padding=(0, 1))
    slowest = max((row.seconds for row in table_rows), default=0.0)
    for head in _HEADS:
        numbers = head not in ("case", "bars")
        table.add_column(head, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
        if head == "s/token":
            table.add_column("", no_wrap=True)
    for row in table_rows:
        case, seconds, *rest, _ = row.cells
        table.add_row(Text(case), Text(seconds, style="bold"), _bar(row, slowest), *map(Text, rest), _verdict(row))
    return table


def _bar(row: Row, slowest: float) -> Text:
    """As long as the case is slow; what was possible in another colour."""
    if not row.seconds or not slowest:
        return Text("")
    length = max(round(_BAR * row.seconds / slowest), 1)
    possible = row.verdict.possible if row.verdict else None
    inner = length if not possible else min(round(_BAR * possible / slowest), length)
    bar = Text("█" * inner, style="cyan" if possible else "dim")
    bar.append("█" * (length - inner), style="yellow")
    return bar


def _verdict(row: Row) -> Text:
    if row.verdict is None:
        return Text(row.cells[-1], style="yellow" if row.status is Status.REFUSED else "bold red")
    parts = [Text(f"{bar} held", style="green") for bar in row.verdict.held]
    parts += [Text(f"{bar} missed", style="bold red") for bar in row.verdict.missed]
    return Text("\n").join(parts)


def _plain(table_rows: Sequence[Row]) -> list[str]:
    """Columns of equal width, the last as long as it is."""
    lines = [_HEADS, *(row.cells for row in table_rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADS) - 1)]
    return ["  ".join([*_aligned(line[:-1], widths), line[-1]]).rstrip() for line in lines]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Names to the left, numbers to the right."""
    numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return [cells[0].ljust(widths[0]), *numbers]
