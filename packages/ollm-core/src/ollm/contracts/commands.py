"""`Command`: the record of a subcommand of `ollm` that a plugin offers. Imports nothing of what it names."""

from __future__ import annotations

import re
from typing import Any

import attrs

from ollm.contracts.strategy import check_name, is_text

_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def _check_target(_: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, str) or not _TARGET.fullmatch(value):
        raise ValueError(f"{attribute.name}={value!r}: write 'module:function', such as 'acme.commands:app'")


@attrs.frozen(kw_only=True)
class Command:
    """One command that a plugin offers: `ollm <name>`.

    Attributes:
        name: lower-case words joined by `-`. Names of ollm's own commands are reserved.
        summary: one line for `ollm --help` and `ollm plugins`.
        target: `"module:function"`, imported when the command is run: a typer app, or a function for typer to take.

    Raises:
        ValueError, TypeError: from the constructor, when a field breaks its rule.
    """

    name: str = attrs.field(validator=check_name)
    summary: str = attrs.field(validator=attrs.validators.and_(is_text, attrs.validators.min_len(1)))
    target: str = attrs.field(validator=_check_target)
