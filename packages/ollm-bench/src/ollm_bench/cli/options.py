"""What the benchmarks' commands are told alike: options and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import attrs
import typer

from ollm.plugin import ConfigurationError, parse_size
from ollm_bench.records import DTYPE_BYTES

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
Plot = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the result; needs matplotlib.")]


@attrs.frozen(kw_only=True)
class Settings:
    """How to run and where to write: options that every benchmark has, checked."""

    cache_dir: Path
    memory_limit: int | None
    steps: int
    json_file: Path | None
    plot: Path | None

    @classmethod
    def checked(
        cls, *, cache_dir: Path, memory_limit: str | None, steps: int, json_file: Path | None, plot: Path | None
    ) -> Settings:
        """The options as given on a command line, after a check of all that can go wrong later.

        Raises:
            ConfigurationError: names the option.
            MissingExtraError: a picture is wanted and cannot be drawn.
        """
        at_least_one("--steps", steps)
        limit = None if memory_limit is None else _memory_limit(memory_limit)
        if not cache_dir.is_dir():
            raise ConfigurationError(f"--cache-dir {cache_dir}: there is no such folder. Make it, or name another.")
        for option, path in (("--json", json_file), ("--plot", plot)):
            if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
                raise ConfigurationError(f"{option} {path}: name a file in a folder that exists.")
        if plot is not None:
            from ollm_bench.plot import check_matplotlib

            check_matplotlib()
        return cls(cache_dir=cache_dir, memory_limit=limit, steps=steps, json_file=json_file, plot=plot)


def _memory_limit(text: str) -> int:
    """Bytes, after making such a group once: that it can be made is found out now, not after an hour."""
    limit = parse_size(text, "--memory-limit")
    from ollm_bench.limits import memory_group

    with memory_group(limit):
        return limit


def at_least_one(option: str, value: int) -> int:
    """The value of an option that counts something."""
    if value < 1:
        raise ConfigurationError(f"{option} {value}: give 1 or more.")
    return value


def check_dtype(dtype: str | None) -> None:
    """Check the name of a dtype."""
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
