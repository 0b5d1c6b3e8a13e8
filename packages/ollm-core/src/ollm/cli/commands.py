"""Which commands there are, core's own and those of plugins, each imported when it is run. Knows typer, and nothing of
what a command does."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from ollm.contracts.commands import Command
from ollm.errors import PluginError
from ollm.registry import registry

_OWN = (
    Command(
        name="plugins", summary="List every plugin, what it offers or why it is broken.",
        target="ollm.cli.plugins:plugins",
    ),
    Command(name="doctor", summary="Check the installation; say what to do.", target="ollm.cli.doctor:doctor"),
)  # fmt: skip


class Commands(TyperGroup):
    """The commands of `ollm`. A plugin's goes by the shortest name that means it, as strategies do."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        offered = registry().commands
        for command in _OWN:
            self.add_command(_Lazy(command.name, command))
        for offer in offered.offers:
            self.add_command(_Lazy(offered.of(offer), offer.command))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """As typer does; of a name that is known and means nothing here, the registry says why."""
        found = super().get_command(ctx, cmd_name)
        if found is None and registry().commands.knows(cmd_name):
            registry().commands.get(cmd_name)
        return found

    def get_help_option(self, ctx: Any) -> Any:
        return _settled(super().get_help_option(ctx))


class _Lazy(TyperCommand):
    """Stands for a command until it is run: a name and a line of help."""

    def __init__(self, name: str, command: Command) -> None:
        super().__init__(name, help=command.summary)
        self._command = command

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the command itself, which is then what runs."""
        return load(self._command).make_context(info_name, args, parent=parent, **extra)


class _Function(TyperCommand):
    def get_help_option(self, ctx: Any) -> Any:
        return _settled(super().get_help_option(ctx))


def load(command: Command) -> Any:
    """What a command runs, as typer makes it.

    Raises:
        PluginError: when its target cannot be imported, or is neither a typer app nor a function.
    """
    module, _, name = command.target.partition(":")
    try:
        target = getattr(import_module(module), name)
    except Exception as error:
        raise PluginError(
            f"command '{command.name}': {command.target} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if isinstance(target, typer.Typer):
        return get_command(target)
    if not callable(target):
        raise PluginError(f"command '{command.name}': {command.target} is neither a typer app nor a function")
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(cls=_Function)(target)
    return get_command(app)


def _settled(help_option: Any) -> Any:
    """The same with a default: newer typers import pydantic, for 0.15 s, to find out what none means."""
    if help_option is not None:
        help_option.default = False
    return help_option
