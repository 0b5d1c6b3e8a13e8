"""`ollm bench weights`: what a model costs whose weights come from the disk, against what this machine could do. Only
reads and checks arguments; the work is in `ollm_bench.weights`, imported when the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer

from ollm.plugin import ConfigurationError
from ollm_bench.cli import options

if TYPE_CHECKING:
    from ollm_bench.weights.checkpoints import Llama
    from ollm_bench.weights.records import Geometry

_DEFAULTS = {
    "--layers": 16, "--hidden": 2048, "--intermediate": 8192, "--heads": 32, "--kv-heads": 8, "--vocabulary": 8192,
}  # fmt: skip
_CHECKPOINT = "checkpoint"

_Layers = Annotated[
    int | None, typer.Option(help="Layers of a Llama with random weights, written to the disk first. Default: 16.")
]
_Hidden = Annotated[int | None, typer.Option(help="Its hidden size. Default: 2048.")]
_Intermediate = Annotated[int | None, typer.Option(help="Its intermediate size. Default: 8192.")]
_Heads = Annotated[int | None, typer.Option(help="Its query heads. Default: 32.")]
_KVHeads = Annotated[int | None, typer.Option(help="Its KV heads. Default: 8.")]
_Vocabulary = Annotated[int | None, typer.Option(help="Its vocabulary. Default: 8192.")]
_Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: bfloat16.")]
_Model = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Run this checkpoint, in its own dtype, instead of random weights.")
]
_Resident = Annotated[int | None, typer.Option(help="Layers that stay in memory in one of the cases. Default: half.")]
_KVTokens = Annotated[int | None, typer.Option(help="Measure also with keys and values of so many tokens on the disk.")]
_Prompt = Annotated[int | None, typer.Option(help="Measure also a prompt of so many tokens.")]


def weights(
    layers: _Layers = None,
    hidden: _Hidden = None,
    intermediate: _Intermediate = None,
    heads: _Heads = None,
    kv_heads: _KVHeads = None,
    vocabulary: _Vocabulary = None,
    dtype: _Dtype = None,
    model: _Model = None,
    resident: _Resident = None,
    kv_tokens: _KVTokens = None,
    prompt: _Prompt = None,
    cache_dir: options.CacheDir = Path(),
    memory_limit: options.Limit = None,
    steps: options.Steps = 5,
    json_file: options.Json = None,
    plot: options.Plot = None,
) -> None:
    """Measure what weights on disk cost.

    Compares ollm with no layer, some, and what fits resident with transformers in memory, memory-mapped, and with
    accelerate's disk offload, and with the disk alone.

    Every case runs in its own process, on the CPU. A case that cannot fit is refused and the others go on. Exit code 1
    when a case was killed or failed.
    """
    sizes = {
        "--layers": layers, "--hidden": hidden, "--intermediate": intermediate, "--heads": heads,
        "--kv-heads": kv_heads, "--vocabulary": vocabulary,
    }  # fmt: skip
    named = {option: value for option, value in sizes.items() if value is not None}
    for option, value in ({"--kv-tokens": kv_tokens, "--prompt": prompt} | named).items():
        if value is not None:
            options.at_least_one(option, value)
    options.check_dtype(dtype)
    options.check_model(model, [*named, *(["--dtype"] if dtype is not None else [])])
    settings = options.Settings.checked(
        cache_dir=cache_dir, memory_limit=memory_limit, steps=steps, json_file=json_file, plot=plot
    )
    llama = None if model is not None else _llama({**_DEFAULTS, **named}, dtype or "bfloat16")

    from ollm_bench.cli.running import finish, run
    from ollm_bench.run import private_folder
    from ollm_bench.weights.benchmark import BENCHMARK
    from ollm_bench.weights.checkpoints import checkpoint_geometry, generated_geometry
    from ollm_bench.weights.plan import plan_cases

    if llama is None:
        assert model is not None
        geometry = checkpoint_geometry(model.absolute(), fillable=kv_tokens is not None)
    else:
        geometry = generated_geometry(llama)
    _check_resident(resident, geometry)
    if llama is not None:
        _check_room(geometry, cache_dir)
    cases = plan_cases(geometry, resident=resident, kv_tokens=kv_tokens or 0, prompt=prompt or 0)
    with private_folder(cache_dir) as folder:
        if llama is not None:
            geometry = attrs.evolve(geometry, model=str(_write(llama, folder.absolute() / _CHECKPOINT)))
        outcomes = run(BENCHMARK, cases, geometry, folder, settings)
    finish(BENCHMARK, outcomes, geometry, settings, subject=geometry.text, disk=model or cache_dir)


def _llama(sizes: dict[str, int], dtype: str) -> Llama:
    hidden, heads, kv_heads = (sizes[option] for option in ("--hidden", "--heads", "--kv-heads"))
    if hidden % (2 * heads):
        raise ConfigurationError(
            f"--hidden {hidden} and --heads {heads}: give a multiple of the heads, so that heads have an even size."
        )
    if heads % kv_heads:
        raise ConfigurationError(f"--heads {heads} and --kv-heads {kv_heads}: each KV head serves as many query heads.")
    from ollm_bench.weights.checkpoints import Llama

    return Llama(**{option.removeprefix("--").replace("-", "_"): size for option, size in sizes.items()}, dtype=dtype)


def _check_resident(resident: int | None, geometry: Geometry) -> None:
    layers = len(geometry.layer_bytes)
    if resident is not None and not 0 <= resident <= layers:
        raise ConfigurationError(f"--resident {resident}: the model has {layers} layers, give 0 to {layers}.")


def _check_room(geometry: Geometry, cache_dir: Path) -> None:
    from ollm_bench.run import LEAST_FREE_DISK, free_now

    free = free_now(cache_dir, None)
    refused = free.why_refused(0, geometry.model_bytes + LEAST_FREE_DISK)
    if refused:
        raise ConfigurationError(
            f"--cache-dir {cache_dir}: the checkpoint {refused}. Name a folder on a larger disk, or ask for less."
        )


def _write(llama: Llama, folder: Path) -> Path:
    from rich.console import Console

    from ollm_bench.progress import show_progress
    from ollm_bench.weights.checkpoints import write_checkpoint

    with show_progress(Console(stderr=True)) as tell:
        write_checkpoint(llama, folder, lambda share: tell(f"writing a checkpoint of random weights: {share:.0%}"))
    return folder
