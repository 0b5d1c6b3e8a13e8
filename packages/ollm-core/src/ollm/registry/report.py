"""What became of each plugin: the records that `ollm plugins` prints and that errors quote."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from typing import Any

import attrs

from ollm.contracts.commands import Command
from ollm.contracts.strategy import Strategy
from ollm.registry.kinds import Kind


class Status(enum.Enum):
    """The outcome of loading a plugin."""

    LOADED = "loaded"
    BROKEN = "broken"
    DISABLED = "disabled"


@attrs.frozen(kw_only=True)
class Named(ABC):
    """Something that a loaded plugin offers under a name."""

    distribution: str

    @property
    @abstractmethod
    def name(self) -> str:
        """As the plugin calls it."""

    @property
    def qualified_name(self) -> str:
        """`distribution/name`: always unambiguous."""
        return f"{self.distribution}/{self.name}"


@attrs.frozen(kw_only=True)
class Offer(Named):
    """One strategy that a loaded plugin offers."""

    kind: Kind
    strategy: Strategy[Any]

    @property
    def name(self) -> str:
        return self.strategy.name


@attrs.frozen(kw_only=True)
class CommandOffer(Named):
    """One command that a loaded plugin offers."""

    command: Command

    @property
    def name(self) -> str:
        return self.command.name


@attrs.frozen(kw_only=True)
class PluginReport:
    """One entry point of the group `ollm` and what became of it."""

    name: str
    """The entry point's name."""
    module: str
    """What the entry point names."""
    distribution: str
    version: str
    status: Status
    reason: str = ""
    """Why it is broken or disabled."""
    warnings: tuple[str, ...] = ()
    offers: tuple[Offer, ...] = ()
    """Its strategies."""
    commands: tuple[CommandOffer, ...] = ()

    def __str__(self) -> str:
        head = f"{self.name} ({self.distribution} {self.version})"
        return f"{head}: {self.reason}" if self.reason else head
