"""Where the values of a request may be written down: arguments, `OLLM_*` variables, `ollm.toml`.

A value has one name in all three, and goes through one converter: typed values and text end the same. Knows no
particular request.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs

from ollm.contracts.options import structure_field
from ollm.errors import ConfigurationError

T = TypeVar("T", bound=attrs.AttrsInstance)

FILE = "ollm.toml"
FILE_VARIABLE = "OLLM_CONFIG"
"""Names another file than the `ollm.toml` of the working directory."""
_PREFIX = "OLLM_"
_NEARLY = 0.9
"""Of `difflib`'s ratio: a slip in a long name, such as two letters that changed places."""


@attrs.frozen(kw_only=True)
class Source:
    """Values by field name, as they were found in one place."""

    values: Mapping[str, Any]
    place: str = ""
    """For messages; empty for arguments."""
    spelling: Callable[[str], str] = str
    """How a field is written there."""
    shared: bool = False
    """Whether others may have names there, too: then only what is nearly a name of ours is an error."""


def of_arguments(values: Mapping[str, Any]) -> Source:
    """Keyword arguments of a call, or options of a command."""
    return Source(values=values)


def of_environment(environment: Mapping[str, str]) -> Source:
    """The variables `OLLM_*`, some of which may be those of plugins."""
    values = {
        name.removeprefix(_PREFIX).lower(): value for name, value in environment.items() if name.startswith(_PREFIX)
    }
    return Source(values=values, place="environment", spelling=lambda name: _PREFIX + name.upper(), shared=True)


def find_file(environment: Mapping[str, str], folder: Path) -> Path | None:
    """The file that `OLLM_CONFIG` names, else `ollm.toml` in `folder` if it is there."""
    named = environment.get(FILE_VARIABLE)
    if named:
        return Path(named)
    return folder / FILE if (folder / FILE).exists() else None


def of_file(path: Path) -> Source:
    """What a TOML file says.

    Raises:
        ConfigurationError: it cannot be read, or is no TOML.
    """
    try:
        return Source(values=tomllib.loads(path.read_text(encoding="utf-8")), place=str(path))
    except OSError as error:
        raise ConfigurationError(f"Cannot read the settings in {path}: {error.strerror}.") from None
    except ValueError as error:  # no UTF-8, or no TOML
        raise ConfigurationError(f"{path} is no TOML: {error}.") from None


def structure(record: type[T], *sources: Source) -> T:
    """A record of the values of all sources; a later source goes before an earlier one.

    Raises:
        ConfigurationError: for names that the record has not (in a place that is shared, for those that nearly are
            one of its), and values that do not fit; says where they are.
    """
    known = [field.name for field in attrs.fields(record)]
    values: dict[str, Any] = {}
    for source in sources:
        where = f"{source.place}: " if source.place else ""
        for name, value in source.values.items():
            if name not in known:
                if source.shared and not difflib.get_close_matches(name, known, n=1, cutoff=_NEARLY):
                    continue
                raise ConfigurationError(
                    f"{where}there is no setting {source.spelling(name)!r}. Known: "
                    f"{', '.join(map(source.spelling, known))}."
                )
            try:
                values[name] = structure_field(record, name, value)
            except ConfigurationError as error:
                raise ConfigurationError(f"{where}{error}") from None
    return record(**values)
