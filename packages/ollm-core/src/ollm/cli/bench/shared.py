"""What the benchmarks' commands share: options, their checks, running the cases, and showing the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ollm.errors import ConfigurationError
from ollm.units import parse_size

if TYPE_CHECKING:
    from ollm.bench.records import C, G, M, Outcome, Report
    from ollm.bench.run import Benchmark
    from ollm.bench.table import Wording

CacheDir = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        help="Where the disk to measure is mounted; what is written is removed. /tmp may be in memory.",
        show_default="the current directory",
    ),
]
Limit = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Run each case inside a memory cgroup of this size; needs root."),
]
Steps = Annotated[int, typer.Option(help="Decode steps to measure in each case; their median counts.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all that was measured to this file.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the result; needs the extra 'plot'.")]


def at_least_one(option: str, value: int) -> int:
    """The value of an option that counts something."""
    if value < 1:
        raise ConfigurationError(f"{option} {value}: give 1 or more.")
    return value


def memory_limit_of(text: str | None) -> int | None:
    """Bytes, after making such a group once: that it can be made is found out now, not after an hour."""
    if text is None:
        return None
    limit = parse_size(text, "--memory-limit")
    from ollm.bench.limits import memory_group

    with memory_group(limit):
        return limit


def check_places(cache_dir: Path, json_file: Path | None, plot: Path | None) -> None:
    """Check all that will be written, and that a picture can be drawn."""
    if not cache_dir.is_dir():
        raise ConfigurationError(f"--cache-dir {cache_dir}: there is no such folder. Make it, or name another.")
    for option, path in (("--json", json_file), ("--plot", plot)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigurationError(f"{option} {path}: name a file in a folder that exists.")
    if plot is not None:
        from ollm.bench.plot import check_matplotlib

        check_matplotlib()


def check_dtype(dtype: str | None) -> None:
    """Check the name of a dtype."""
    from ollm.bench.records import DTYPE_BYTES

    if dtype is not None and dtype not in DTYPE_BYTES:
        raise ConfigurationError(f"--dtype {dtype}: choose one of {', '.join(DTYPE_BYTES)}.")


def check_model(model: Path | None, named: Sequence[str]) -> None:
    """Check the folder of a checkpoint, which leaves no choice of sizes: `named` are the options that would choose."""
    if model is None:
        return
    if named:
        raise ConfigurationError(
            f"--model and {named[0]}: the checkpoint has a geometry of its own. Leave one of them away."
        )
    if not (model / "config.json").is_file():
        raise ConfigurationError(f"--model {model}: there is no config.json. Give the folder of a checkpoint.")


def run(
    benchmark: Benchmark[C, G, M],
    cases: Sequence[C],
    geometry: G,
    *,
    folder: Path,
    steps: int,
    memory_limit: int | None,
) -> list[Outcome[C, M]]:
    """Run the cases, with progress on stderr."""
    from rich.console import Console

    from ollm.bench.progress import show_progress
    from ollm.bench.run import run_cases

    with show_progress(Console(stderr=True)) as tell:
        return run_cases(
            benchmark,
            cases,
            geometry,
            folder=folder,
            steps=steps,
            memory_limit=memory_limit,
            progress=lambda index, case, what: tell(f"case {index + 1} of {len(cases)}: {case.title}: {what}"),
        )


def report_on(
    outcomes: Sequence[Outcome[C, M]], geometry: G, *, disk: Path, steps: int, memory_limit: int | None
) -> Report[C, G, M]:
    """What was measured, with all that a reader must know of this machine and of `disk`, a folder on it."""
    from ollm.bench.machine import describe_machine, describe_versions, notes
    from ollm.bench.records import Report

    machine = describe_machine(disk)
    return Report(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=["ollm", *sys.argv[1:]],
        machine=machine,
        versions=describe_versions(),
        geometry=geometry,
        steps=steps,
        memory_limit=memory_limit,
        notes=notes(machine, outcomes),
        outcomes=list(outcomes),
    )


def show(report: Report[Any, Any, Any], wording: Wording, json_file: Path | None, plot: Path | None) -> None:
    """Print the report and write what was asked for.

    Raises:
        typer.Exit: with code 1 when a case was killed or failed.
    """
    import cattrs
    from rich.console import Console

    from ollm.bench.table import print_report

    if json_file is not None:
        json_file.write_text(json.dumps(cattrs.unstructure(report), indent=2) + "\n", encoding="utf-8")
    print_report(report, wording, Console(highlight=False))
    if plot is not None:
        from ollm.bench.plot import draw

        draw(report, wording, plot)
    if report.failed:
        raise typer.Exit(1)
