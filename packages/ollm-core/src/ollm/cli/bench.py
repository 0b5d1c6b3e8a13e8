"""`ollm bench`: measure what ollm does on this machine. Importing it imports no torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ollm.errors import ConfigurationError
from ollm.units import parse_size

bench = typer.Typer(help="Measure what ollm does on this machine.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Measure what ollm does on this machine."""


@bench.command()
def kv(
    tokens: Annotated[str, typer.Option(help="Context lengths, separated by commas.")] = "32768",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 16,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key and value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=2, help="Size of a head.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    model: Annotated[Path | None, typer.Option(help="A checkpoint instead of random weights.")] = None,
    strategies: Annotated[
        str | None, typer.Option(help="KV strategies, separated by commas. Default: all lossless ones on disk.")
    ] = None,
    ram_budget: Annotated[
        str | None, typer.Option(help="Resident bytes, such as 512MiB, instead of nothing, half and everything.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps to measure.")] = 5,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Folder on the disk to measure. Default: the current one; /tmp is often in memory."),
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="Run every case inside a memory control group of this size, such as 2GiB.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Also draw it (needs ollm-core[plot]).")] = None,
) -> None:
    """How fast keys and values come from this disk, against what the disk and memory can do.

    Measures, each in a process of its own: DynamicCache and StaticCache in memory, and every strategy with nothing,
    half and everything resident, beside the raw rates of the disk. Exit code 1 when a case failed.
    """
    from ollm.bench.plot import check_plot, plot
    from ollm.bench.records import Request, Status

    if plot_file is not None:
        check_plot()
    for file in (json_file, plot_file):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigurationError(f"{file}: there is no folder {file.absolute().parent}. Make it first.")
    lengths = _lengths(tokens)
    names = _strategies(strategies)
    budget = None if ram_budget is None else parse_size(ram_budget, "--ram-budget")
    limit = None if memory_limit is None else parse_size(memory_limit, "--memory-limit")
    if cache_dir is not None and not cache_dir.is_dir():
        raise ConfigurationError(f"--cache-dir {cache_dir}: there is no such folder. Make it first.")

    from ollm.bench.machine import describe_machine
    from ollm.bench.run import run
    from ollm.bench.table import print_table

    geometry = _geometry(layers, kv_heads, head_dim, dtype, model)
    with tempfile.TemporaryDirectory(dir=cache_dir or Path.cwd(), prefix="ollm-bench-") as folder:
        request = Request(
            tokens=lengths, geometry=geometry, strategies=names, ram_budget=budget, steps=steps,
            folder=Path(folder), memory_limit=limit,
        )  # fmt: skip
        machine = describe_machine(Path(folder))
        with _progress() as say:
            outcomes = run(request, say)
    print_table(Console(), outcomes)
    if json_file is not None:
        json_file.write_text(json.dumps(_as_json(machine, geometry, outcomes), indent=2) + "\n")
    if plot_file is not None:
        plot(outcomes, geometry, machine, plot_file)
    if any(outcome.status in (Status.KILLED, Status.FAILED) for outcome in outcomes):
        raise typer.Exit(1)


def _lengths(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.replace("_", "").split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1:
        raise ConfigurationError(f"--tokens {text}: give context lengths such as 32768, or 8192,65536.")
    return lengths


def _strategies(text: str | None) -> tuple[str, ...]:
    """The names, each of an installed strategy."""
    from ollm.registry import Kind, registry

    found = registry()
    if text is not None:
        return tuple(found.name_of(found.get(Kind.KV_STORE, name.strip())) for name in text.split(","))
    offers = [offer for offer in found.offers(Kind.KV_STORE) if offer.strategy.facts is not None]
    return tuple(
        found.name_of(offer)
        for offer in offers
        if (facts := offer.strategy.facts) and facts.lossless and facts.full_history and facts.directory
    )


def _geometry(layers: int, kv_heads: int, head_dim: int, dtype: str, model: Path | None) -> Any:
    from ollm.bench.records import ITEM_BYTES, Geometry

    if dtype not in ITEM_BYTES:
        raise ConfigurationError(f"--dtype {dtype}: choose one of {', '.join(ITEM_BYTES)}.")
    if model is None:
        # attention and MLP of a Llama whose hidden size is that of its key heads
        weights = layers * (kv_heads * head_dim) ** 2 * 15 * ITEM_BYTES[dtype]
        return Geometry(layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, model_bytes=weights)
    from ollm.bench.models import checkpoint_geometry

    return checkpoint_geometry(model, dtype)


def _as_json(machine: dict[str, Any], geometry: Any, outcomes: Any) -> dict[str, Any]:
    import cattrs

    from ollm.bench.verdicts import judge

    return {
        **machine,
        "geometry": cattrs.unstructure(geometry),
        "cases": [
            {
                "name": outcome.case.name,
                "tokens": outcome.case.tokens,
                "resident": outcome.case.resident.value,
                "ram_budget": outcome.case.ram_budget,
                "status": outcome.status.value,
                "reason": outcome.reason,
                "measured": cattrs.unstructure(outcome.measured),
                "verdict": cattrs.unstructure(judge(outcome, outcomes)),
            }
            for outcome in outcomes
        ],
    }


@contextmanager
def _progress() -> Iterator[Any]:
    """Says how far it is, on stderr: in one line that changes on a terminal, in a line each elsewhere."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda text: console.print(text, markup=False, soft_wrap=True)
        return
    with console.status("starting") as status:
        yield lambda text: status.update(text.replace("[", "\\["))
