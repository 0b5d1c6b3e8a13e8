"""Options of a strategy: one attrs class is the source of defaults, checks, help texts and printed tables."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from ollm.errors import ConfigurationError
from ollm.units import ByteSize, parse_size

if TYPE_CHECKING:
    import cattrs


@attrs.frozen
class NoOptions:
    """The options of a strategy that has none."""


def option(default: Any, *, help: str, validator: Any = None, changes_format: bool = True) -> Any:
    """A field of an options class: `page_tokens: int = option(64, help="Tokens per page.")`.

    `help` is shown by `ollm plugins -v` and in the docs; it is required. `changes_format=False` says that a store can
    go on with a folder that was written under another value.
    """
    return attrs.field(
        default=default,
        validator=validator,
        kw_only=True,
        metadata={"help": help, "changes_format": changes_format},
    )


def format_parameters(options: attrs.AttrsInstance) -> dict[str, Any]:
    """The options, by name, that a folder must have been written under: all that may change what is in its files."""
    values = _converter().unstructure(options)
    return {
        field.name: values[field.name]
        for field in attrs.fields(type(options))
        if field.metadata.get("changes_format", True)
    }


@attrs.frozen
class OptionInfo:
    """One line of an option table."""

    name: str
    type: str
    default: object
    help: str


def describe_options(options: type) -> tuple[OptionInfo, ...]:
    """The option table of an options class, in declared order."""
    hints = typing.get_type_hints(options)
    return tuple(
        OptionInfo(
            name=field.name,
            type=_type_name(hints[field.name]),
            default=field.default,
            help=str(field.metadata.get("help", "")),
        )
        for field in attrs.fields(options)
    )


def _type_name(hint: Any) -> str:
    """`int`, `ByteSize | None`, …: as an author wrote it."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, arguments))
    if hint is type(None):
        return "None"
    return str(hint).replace("typing.", "") if arguments else str(getattr(hint, "__name__", hint))


def _structure_int(value: object, _: type) -> int:
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is not a whole number")


def _structure_bool(value: object, _: type) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise ValueError(f"{value!r} is not true or false")


def _structure_float(value: object, _: type) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def _structure_str(value: object, _: type) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


@functools.cache
def _converter() -> cattrs.Converter:
    import cattrs  # not while plugins are only listed

    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=False)
    converter.register_structure_hook(int, _structure_int)
    converter.register_structure_hook(bool, _structure_bool)
    converter.register_structure_hook(float, _structure_float)
    converter.register_structure_hook(str, _structure_str)
    converter.register_structure_hook(ByteSize, lambda value, _: parse_size(value, "value"))
    return converter


def structure_options(options: type, values: Mapping[str, Any], *, strategy: str) -> Any:
    """Check `values` against an options class and return an instance of it.

    Values may be typed (keyword arguments, TOML) or text (environment, command line): both end the same.

    Raises:
        ConfigurationError: for unknown names (the known ones are listed) and values that do not fit.
    """
    from cattrs.errors import ForbiddenExtraKeysError

    if not isinstance(values, Mapping):
        raise ConfigurationError(f"options={values!r} for '{strategy}': give a mapping of option names to values.")
    try:
        return _converter().structure(dict(values), options)
    except ForbiddenExtraKeysError as error:
        known = ", ".join(field.name for field in attrs.fields(options)) or "none"
        unknown = ", ".join(sorted(map(repr, error.extra_fields)))
        raise ConfigurationError(f"'{strategy}' has no option {unknown}. Its options: {known}.") from None
    except Exception as error:
        given = ", ".join(f"{name}={value!r}" for name, value in values.items())
        reason = error.args[0] if error.args else error  # attrs' validators add the attribute, the choices, the value
        raise ConfigurationError(
            f"'{strategy}' does not take the options {given}: {reason}. See `ollm plugins -v` for what they mean."
        ) from error


def structure_field(record: type, name: str, value: Any) -> Any:
    """The value of one field of an attrs class, by the field's own converter or by its type, as `structure_options`.

    Raises:
        ConfigurationError: it does not fit.
    """
    field = attrs.fields_dict(record)[name]
    try:
        if callable(field.converter):
            return field.converter(value)
        return _converter().structure(value, typing.get_type_hints(record)[name])
    except ConfigurationError:  # of a converter, which names the field
        raise
    except Exception as error:
        raise ConfigurationError(f"{name}={value!r}: {error.args[0] if error.args else error}.") from None
