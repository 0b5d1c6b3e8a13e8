"""`CacheRequest`: what a user may ask of a cache. The one list of its arguments, with their defaults and texts.

`disk_cache` and `Inference.DiskCache` take their signature from here; `ollm.toml`, the environment and commands have
the same names. Knows types, not which of the values fit together: see `checks`.
"""

# Without `from __future__ import annotations`: signatures that are made from this class show types, not text.

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import attrs

from ollm.errors import ConfigurationError
from ollm.plan import settings
from ollm.units import ByteSize, parse_size


def _path(path: str | os.PathLike[str] | None) -> str | None:
    if path is None:
        return None
    text = os.fspath(path)
    if not isinstance(text, str):
        raise ConfigurationError(f"cache_dir={path!r}: give a path as text.")
    try:
        if b"\0" not in os.fsencode(text):
            return _at_home(text)
    except UnicodeEncodeError:
        pass
    raise ConfigurationError(f"cache_dir={path!r}: no path of this system has such a character in it.")


def _at_home(path: str) -> str:
    """A path that may begin with `~`, for no shell has seen what is in a file, or an argument."""
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ConfigurationError(
            f"cache_dir={path!r}: nobody knows where that home is. For a folder of that name: './{path}'."
        ) from None


def _size(size: int | str | None) -> ByteSize | None:
    return None if size is None else parse_size(size, "ram_budget")


def _options(options: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """A mapping, or the text `name=value,name=value` of a variable or a command's option."""
    if options is None:
        return {}
    if isinstance(options, str):
        pairs = [pair.partition("=") for pair in options.split(",") if pair.strip()]
        if all(equals for _, equals, _ in pairs):
            return {name.strip(): value.strip() for name, _, value in pairs}
    elif isinstance(options, Mapping):
        return dict(options)
    raise ConfigurationError(
        f"options={options!r}: give a mapping of option names to values, or text such as 'verify=always'."
    )


@attrs.frozen
class CacheRequest:
    """What a user asks of a cache. Made by `from_arguments` or `from_settings`, which check names and types."""

    cache_dir: str | None = attrs.field(
        default=None,
        converter=_path,
        metadata={
            "help": "Where the folder `kv_cache_<strategy>` goes; made if it is missing. Not used by `resident`."
        },
    )
    cache_strategy: str = attrs.field(default="chunked", metadata={"help": "A KV strategy; `ollm plugins` lists them."})
    cache_lifecycle: str = attrs.field(
        default="runtime-scoped",
        metadata={"help": "`runtime-scoped`: the folder goes with the cache. `persistent` is not built yet."},
    )
    cache_window_tokens: int | None = attrs.field(
        default=None, metadata={"help": "The newest tokens to keep, for strategies that keep a window only."}
    )
    ram_budget: ByteSize | None = attrs.field(
        default=None,
        converter=_size,
        metadata={
            "help": 'Memory for keys and values beyond the tail, in bytes or as `"512MiB"`; `0` keeps nothing '
            "resident; by default the spill policy decides from what is free. Where less is free by the time it is "
            "needed, less is kept."
        },
    )
    spill_policy: str | None = attrs.field(
        default=None, metadata={"help": "A spill policy; by default the one that the strategy names."}
    )
    options: dict[str, Any] = attrs.field(
        default=None,
        converter=_options,
        metadata={"help": "The strategy's own options, see `ollm plugins -v`."},
    )
    mode: str = attrs.field(
        default="auto",
        metadata={
            "help": "`block`: attention reads keys and values block by block, so that memory does not grow with the "
            "context; `tensor`: it gets all of one layer's at a time, which works for every model; `auto`: blocks "
            "where a trial with a few tokens shows that the model takes them."
        },
    )
    dense_projection_chunk_rows: int | None = attrs.field(
        default=None,
        metadata={
            "help": "In block mode, how many tokens of a prompt a layer takes at once; by default as many as keep its "
            "activations within a sixteenth of the free memory, at most 4096."
        },
    )

    @classmethod
    def from_arguments(cls, /, **arguments: Any) -> Self:
        """From keyword arguments alone: no file and no variable is read.

        Raises:
            ConfigurationError: for unknown names (the known ones are listed) and values of a wrong type.
        """
        return settings.structure(cls, settings.of_arguments(arguments))

    @classmethod
    def from_settings(
        cls, /, *, environment: Mapping[str, str] | None = None, folder: Path | None = None, **arguments: Any
    ) -> Self:
        """From arguments, then `OLLM_*` variables, then `ollm.toml`, then defaults: for commands.

        Args:
            environment: the process's by default.
            folder: where `ollm.toml` may be, unless `OLLM_CONFIG` names a file; the working directory by default.
            arguments: as of `from_arguments`, such as the options of a command; what is `None` was not given.

        Raises:
            ConfigurationError: for unknown names and values of a wrong type, wherever they were found; the message
                names the place, and the known names there. For a file that cannot be read.
        """
        variables = os.environ if environment is None else environment
        given = {name: value for name, value in arguments.items() if value is not None}
        file = settings.find_file(variables, Path() if folder is None else folder)
        sources = [] if file is None else [settings.of_file(file)]
        return settings.structure(cls, *sources, settings.of_environment(variables), settings.of_arguments(given))
