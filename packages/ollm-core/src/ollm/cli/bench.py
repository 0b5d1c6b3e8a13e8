"""`ollm bench kv`: what caches cost on this machine, against what it could do. Only reads and checks arguments; the
work is in `ollm.bench`, imported when the command runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ollm.errors import ConfigurationError
from ollm.units import parse_size

if TYPE_CHECKING:
    from ollm.bench.records import Geometry, Report
    from ollm.registry import Offer

bench = typer.Typer(help="Measure ollm on this machine.", no_args_is_help=True)

_DEFAULTS = {"--layers": 16, "--kv-heads": 8, "--head-dim": 128}

# the options of `kv`, with the texts of its help
_Tokens = Annotated[str, typer.Option(help="Context lengths, separated by commas.")]
_Layers = Annotated[int | None, typer.Option(help="Layers of a Llama with random weights. Default: 16.")]
_KVHeads = Annotated[int | None, typer.Option(help="Its KV heads; query heads are twice as many. Default: 8.")]
_HeadDim = Annotated[int | None, typer.Option(help="The size of a head. Default: 128.")]
_Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: bfloat16, or the checkpoint's own.")
]
_Model = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Decode with this checkpoint instead of random weights.")
]
_Strategies = Annotated[
    str | None,
    typer.Option(help="KV strategies, separated by commas. Default: all lossless ones that keep every token on disk."),
]
_Budget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Keep this much resident, such as 512MiB, instead of nothing, half and everything."
    ),
]
_CacheDir = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        help="Where the disk to measure is mounted; what is written is removed. /tmp may be in memory.",
        show_default="the current directory",
    ),
]
_Limit = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Run each case inside a memory cgroup of this size; needs root."),
]
_Forks = Annotated[
    int, typer.Option(help="Measure also a step of so many continuations of one document, which share what is stored.")
]
_Steps = Annotated[int, typer.Option(help="Decode steps to measure in each case; their median counts.")]
_Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all that was measured to this file.")]
_Plot = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the result; needs the extra 'plot'.")]


@bench.callback()
def _bench() -> None:
    """Measure ollm on this machine."""


@bench.command()
def kv(
    tokens: _Tokens = "32768",
    layers: _Layers = None,
    kv_heads: _KVHeads = None,
    head_dim: _HeadDim = None,
    dtype: _Dtype = None,
    model: _Model = None,
    strategies: _Strategies = None,
    ram_budget: _Budget = None,
    cache_dir: _CacheDir = Path(),
    memory_limit: _Limit = None,
    forks: _Forks = 1,
    steps: _Steps = 5,
    json_file: _Json = None,
    plot: _Plot = None,
) -> None:
    """Measure decoding from disk: each KV strategy, transformers' caches in memory, and the disk alone.

    Every case runs in its own process, on the CPU. A case that cannot fit is refused and the others go on. Exit code 1
    when a case was killed or failed.
    """
    lengths = _numbers(tokens)
    _at_least_one("--steps", steps)
    _at_least_one("--forks", forks)
    budget = None if ram_budget is None else parse_size(ram_budget, "--ram-budget")
    limit = _memory_limit(memory_limit)
    if not cache_dir.is_dir():
        raise ConfigurationError(f"--cache-dir {cache_dir}: there is no such folder. Make it, or name another.")
    _check_target("--json", json_file)
    _check_target("--plot", plot)
    if plot is not None:
        from ollm.bench.plot import check_matplotlib

        check_matplotlib()
    names = _strategies(strategies)
    geometry = _geometry(model, {"--layers": layers, "--kv-heads": kv_heads, "--head-dim": head_dim}, dtype)

    report = _run(lengths, geometry, names, budget=budget, cache_dir=cache_dir, limit=limit, steps=steps, forks=forks)
    _show(report, json_file, plot)
    if report.failed:
        raise typer.Exit(1)


def _run(
    tokens: Sequence[int],
    geometry: Geometry,
    strategies: Sequence[str],
    *,
    budget: int | None,
    cache_dir: Path,
    limit: int | None,
    steps: int,
    forks: int,
) -> Report:
    from rich.console import Console

    from ollm.bench.machine import describe_machine, describe_versions, notes
    from ollm.bench.plan import plan_cases
    from ollm.bench.progress import show_progress
    from ollm.bench.records import Report
    from ollm.bench.run import private_folder, run_cases
    from ollm.bench.verdicts import judge

    cases = plan_cases(
        geometry, tokens, strategies, steps=steps, ram_budget=budget, forks=forks, lossy=_lossy(strategies)
    )  # fmt: skip
    with private_folder(cache_dir) as folder, show_progress(len(cases), Console(stderr=True)) as progress:
        outcomes = run_cases(cases, geometry, folder=folder, steps=steps, memory_limit=limit, progress=progress)
    machine = describe_machine(cache_dir)
    return Report(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=["ollm", *sys.argv[1:]],
        machine=machine,
        versions=describe_versions(),
        geometry=geometry,
        steps=steps,
        memory_limit=limit,
        notes=notes(machine, outcomes),
        outcomes=judge(outcomes, geometry, limited=limit is not None),
    )


def _show(report: Report, json_file: Path | None, plot: Path | None) -> None:
    import cattrs
    from rich.console import Console

    from ollm.bench.table import print_report

    if json_file is not None:
        json_file.write_text(json.dumps(cattrs.unstructure(report), indent=2) + "\n", encoding="utf-8")
    print_report(report, Console(highlight=False))
    if plot is not None:
        from ollm.bench.plot import draw

        draw(report, plot)


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigurationError(
            f"--tokens {text!r}: give numbers of 1 or more, separated by commas, such as 8192,32768."
        )
    return list(dict.fromkeys(found))


def _at_least_one(option: str, value: int) -> int:
    if value < 1:
        raise ConfigurationError(f"{option} {value}: give 1 or more.")
    return value


def _memory_limit(text: str | None) -> int | None:
    if text is None:
        return None
    limit = parse_size(text, "--memory-limit")
    from ollm.bench.limits import memory_group

    with memory_group(limit):  # that it can be made is found out now, not after an hour
        return limit


def _check_target(option: str, path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigurationError(f"{option} {path}: name a file in a folder that exists.")


def _strategies(text: str | None) -> list[str]:
    from ollm.registry import Kind, registry

    names = registry()
    if text is None:
        facts = {names.name_of(offer): offer.strategy.facts for offer in names.offers(Kind.KV_STORE)}
        return [name for name, its in facts.items() if its and its.lossless and its.full_history and its.directory]
    chosen = [_on_disk(names.get(Kind.KV_STORE, part.strip())) for part in text.split(",")]
    return list(dict.fromkeys(map(names.name_of, chosen)))


def _lossy(strategies: Sequence[str]) -> list[str]:
    from ollm.registry import Kind, registry

    names = registry()
    facts = {name: names.get(Kind.KV_STORE, name).strategy.facts for name in strategies}
    return [name for name, its in facts.items() if its and not its.lossless]


def _on_disk(offer: Offer) -> Offer:
    """The same, if it can be compared with the disk."""
    facts = offer.strategy.facts
    if facts is None or facts.directory is None or not facts.full_history:
        raise ConfigurationError(
            f"--strategies {offer.strategy.name}: it does not keep every token on disk, so nothing can be compared. "
            "Leave it away; 'ollm plugins -v' says where each strategy keeps what."
        )
    return offer


def _geometry(model: Path | None, sizes: dict[str, int | None], dtype: str | None) -> Geometry:
    from ollm.bench.records import DTYPE_BYTES

    if dtype is not None and dtype not in DTYPE_BYTES:
        raise ConfigurationError(f"--dtype {dtype}: choose one of {', '.join(DTYPE_BYTES)}.")
    named = {option: value for option, value in sizes.items() if value is not None}
    if model is not None and named:
        raise ConfigurationError(
            f"--model and {next(iter(named))}: the checkpoint has a geometry of its own. Leave one of them away."
        )
    if model is not None and not (model / "config.json").is_file():
        raise ConfigurationError(f"--model {model}: there is no config.json. Give the folder of a checkpoint.")
    layers, kv_heads, head_dim = (_at_least_one(*size) for size in {**_DEFAULTS, **named}.items())
    if head_dim % 2:
        raise ConfigurationError(f"--head-dim {head_dim}: rotary positions need an even number.")
    from ollm.bench.models import checkpoint_geometry, synthetic_geometry

    if model is not None:
        return checkpoint_geometry(model, dtype)
    return synthetic_geometry(layers, kv_heads, head_dim, dtype or "bfloat16")
