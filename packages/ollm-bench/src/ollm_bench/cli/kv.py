"""`ollm bench kv`: what caches cost on this machine, against what it could do. Only reads and checks arguments; the
work is done by `ollm_bench.kv`, imported when the command runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ollm import CacheRequest
from ollm.plugin import ConfigurationError
from ollm_bench.cli import options

if TYPE_CHECKING:
    from ollm.plugin import KVFacts
    from ollm_bench.kv.records import Geometry

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
        metavar="SIZE",
        help="Keep this much resident, such as 512MiB, instead of nothing, half and everything.",
        show_default="OLLM_RAM_BUDGET, or ram_budget of ollm.toml",
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
    cache_dir: options.CacheDir = Path(),
    memory_limit: options.Limit = None,
    forks: _Forks = 1,
    steps: options.Steps = 5,
    json_file: options.Json = None,
    plot: options.Plot = None,
) -> None:
    """Measure what keys and values on disk cost.

    Compares each KV strategy with transformers' caches in memory and with the disk alone.

    Every case runs in its own process, on the CPU. A case that cannot fit is refused and the others go on. Exit code 1
    when a case was killed or failed.
    """
    lengths = _numbers(tokens)
    options.at_least_one("--forks", forks)
    budget = CacheRequest.from_settings(ram_budget=ram_budget).ram_budget
    settings = options.Settings.checked(
        cache_dir=cache_dir, memory_limit=memory_limit, steps=steps, json_file=json_file, plot=plot
    )
    stores = _on_disk(None if strategies is None else strategies.split(","))
    geometry = _geometry(model, {"--layers": layers, "--kv-heads": kv_heads, "--head-dim": head_dim}, dtype)

    from ollm_bench.cli.running import finish, run
    from ollm_bench.kv.benchmark import BENCHMARK
    from ollm_bench.kv.plan import plan_cases
    from ollm_bench.run import private_folder

    cases = plan_cases(
        geometry, lengths, list(stores), steps=steps, ram_budget=budget, forks=forks,
        lossy=[name for name, facts in stores.items() if not facts.lossless],
    )  # fmt: skip
    with private_folder(cache_dir) as folder:
        outcomes = run(BENCHMARK, cases, geometry, folder, settings)
    subject = f"{geometry.text}; {' and '.join(f'{count:,}' for count in lengths)} tokens"
    finish(BENCHMARK, outcomes, geometry, settings, subject=subject, disk=cache_dir)


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


def _on_disk(names: Sequence[str] | None) -> dict[str, KVFacts]:
    """KV strategies that can be compared with the disk: those named, or all that are lossless."""
    from ollm.plugin import strategies

    chosen = strategies("ollm_kv_stores", None if names is None else [name.strip() for name in names])
    facts = {name: strategy.facts for name, strategy in chosen.items()}
    fit = {name: its for name, its in facts.items() if its and its.directory is not None and its.full_history}
    if names is None:
        return {name: its for name, its in fit.items() if its.lossless}
    for name in facts.keys() - fit.keys():
        raise ConfigurationError(
            f"--strategies {name}: it does not keep every token on disk, so nothing can be compared. "
            "Leave it away; 'ollm plugins -v' says where each strategy keeps what."
        )
    return fit


def _geometry(model: Path | None, sizes: dict[str, int | None], dtype: str | None) -> Geometry:
    options.check_dtype(dtype)
    named = {option: value for option, value in sizes.items() if value is not None}
    options.check_model(model, list(named))
    layers, kv_heads, head_dim = (options.at_least_one(*size) for size in {**_DEFAULTS, **named}.items())
    if head_dim % 2:
        raise ConfigurationError(f"--head-dim {head_dim}: rotary positions need an even number.")
    from ollm_bench.kv.models import checkpoint_geometry, synthetic_geometry

    if model is not None:
        return checkpoint_geometry(model, dtype)
    return synthetic_geometry(layers, kv_heads, head_dim, dtype or "bfloat16")
