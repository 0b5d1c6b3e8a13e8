"""From cases to a report, alike for every benchmark: runs them with progress on stderr, judges, prints and writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import cattrs
import typer
from rich.console import Console

from ollm_bench.cli.options import Settings
from ollm_bench.machine import describe_machine, describe_versions, notes
from ollm_bench.progress import show_progress
from ollm_bench.records import C, G, M, Outcome, Report
from ollm_bench.run import Benchmark, run_cases
from ollm_bench.table import Wording, print_report


def run(
    benchmark: Benchmark[C, G, M], cases: Sequence[C], geometry: G, folder: Path, settings: Settings
) -> list[Outcome[C, M]]:
    """Run the cases, which write to `folder` only."""
    with show_progress(Console(stderr=True)) as tell:
        return run_cases(
            benchmark,
            cases,
            geometry,
            folder=folder,
            steps=settings.steps,
            memory_limit=settings.memory_limit,
            progress=lambda index, case, what: tell(f"case {index + 1} of {len(cases)}: {case.title}: {what}"),
        )


def finish(
    benchmark: Benchmark[C, G, M],
    outcomes: Sequence[Outcome[C, M]],
    geometry: G,
    settings: Settings,
    *,
    subject: str,
    disk: Path,
) -> None:
    """Say what the outcomes mean: on stdout, and in the files that were asked for.

    Args:
        benchmark, outcomes, geometry, settings: what was run, and how.
        subject: the model, and what it was given.
        disk: a folder on the disk that was measured.

    Raises:
        typer.Exit: with code 1 when a case was killed or failed.
    """
    judged = benchmark.judge(outcomes, geometry, settings.memory_limit is not None)
    machine = describe_machine(disk)
    report = Report(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=["ollm", *sys.argv[1:]],
        machine=machine,
        versions=describe_versions(),
        geometry=geometry,
        steps=settings.steps,
        memory_limit=settings.memory_limit,
        notes=notes(machine, judged),
        outcomes=judged,
    )
    if settings.json_file is not None:
        settings.json_file.write_text(json.dumps(cattrs.unstructure(report), indent=2) + "\n", encoding="utf-8")
    wording = Wording(subject=subject, step=benchmark.step, above=benchmark.above)
    print_report(report, wording, Console(highlight=False))
    if settings.plot is not None:
        from ollm_bench.plot import draw

        draw(report, wording, settings.plot)
    if report.failed:
        raise typer.Exit(1)
