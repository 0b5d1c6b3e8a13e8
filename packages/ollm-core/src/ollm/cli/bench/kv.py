"""`ollm bench kv`: what caches cost on this machine, against what it could do. Only reads and checks arguments; the
work is in `ollm.bench.kv`, imported when the command runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ollm.cli.bench.shared import (
    CacheDir,
    Json,
    Limit,
    Plot,
    Steps,
    at_least_one,
    check_dtype,
    check_model,
    check_places,
    memory_limit_of,
    report_on,
    run,
    show,
)
from ollm.errors import ConfigurationError
from ollm.units import parse_size

if TYPE_CHECKING:
    from ollm.bench.kv.records import Geometry
    from ollm.registry import Offer

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
_Forks = Annotated[
    int, typer.Option(help="Measure also a step of so many continuations of one document, which share what is stored.")
]


def kv(
    tokens: _Tokens = "32768",
    layers: _Layers = None,
    kv_heads: _KVHeads = None,
    head_dim: _HeadDim = None,
    dtype: _Dtype = None,
    model: _Model = None,
    strategies: _Strategies = None,
    ram_budget: _Budget = None,
    cache_dir: CacheDir = Path(),
    memory_limit: Limit = None,
    forks: _Forks = 1,
    steps: Steps = 5,
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Measure decoding from disk: each KV strategy, transformers' caches in memory, and the disk alone.

    Every case runs in its own process, on the CPU. A case that cannot fit is refused and the others go on. Exit code 1
    when a case was killed or failed.
    """
    lengths = _numbers(tokens)
    at_least_one("--steps", steps)
    at_least_one("--forks", forks)
    budget = None if ram_budget is None else parse_size(ram_budget, "--ram-budget")
    limit = memory_limit_of(memory_limit)
    check_places(cache_dir, json_file, plot)
    names = _strategies(strategies)
    geometry = _geometry(model, {"--layers": layers, "--kv-heads": kv_heads, "--head-dim": head_dim}, dtype)

    from ollm.bench.kv.plan import BENCHMARK, plan_cases
    from ollm.bench.kv.verdicts import judge
    from ollm.bench.run import private_folder
    from ollm.bench.table import Wording

    cases = plan_cases(geometry, lengths, names, steps=steps, ram_budget=budget, forks=forks, lossy=_lossy(names))
    with private_folder(cache_dir) as folder:
        outcomes = run(BENCHMARK, cases, geometry, folder=folder, steps=steps, memory_limit=limit)
    judged = judge(outcomes, geometry, limited=limit is not None)
    subject = f"{geometry.text}; {' and '.join(f'{count:,}' for count in lengths)} tokens"
    show(
        report_on(judged, geometry, disk=cache_dir, steps=steps, memory_limit=limit),
        Wording(subject=subject, step="token", above="the model"),
        json_file,
        plot,
    )


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
    check_dtype(dtype)
    named = {option: value for option, value in sizes.items() if value is not None}
    check_model(model, list(named))
    layers, kv_heads, head_dim = (at_least_one(*size) for size in {**_DEFAULTS, **named}.items())
    if head_dim % 2:
        raise ConfigurationError(f"--head-dim {head_dim}: rotary positions need an even number.")
    from ollm.bench.kv.models import checkpoint_geometry, synthetic_geometry

    if model is not None:
        return checkpoint_geometry(model, dtype)
    return synthetic_geometry(layers, kv_heads, head_dim, dtype or "bfloat16")
