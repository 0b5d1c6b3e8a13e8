"""What is installed: every plugin, and what each name means, of strategies by kind and of commands."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs

from ollm.contracts.options import structure_options
from ollm.contracts.strategy import Strategy
from ollm.deprecations import warn_of_methods
from ollm.errors import ConfigurationError, OllmError, PluginError
from ollm.registry.discovery import DISABLE_VARIABLE, discover
from ollm.registry.kinds import RESERVED, RESERVED_COMMANDS, Kind
from ollm.registry.names import Names
from ollm.registry.report import CommandOffer, Offer, PluginReport


@attrs.frozen
class Registry:
    """All plugins found, and what they offer by name."""

    reports: tuple[PluginReport, ...]

    @property
    def commands(self) -> Names[CommandOffer]:
        """Everything that loaded plugins add to the command `ollm`."""
        found = tuple(offer for report in self.reports for offer in report.commands)
        return Names(label="command", offers=found, reserved=RESERVED_COMMANDS, reports=self.reports)

    def offers(self, kind: Kind) -> tuple[Offer, ...]:
        """Everything of one kind that loaded plugins offer."""
        return tuple(offer for report in self.reports for offer in report.offers if offer.kind is kind)

    def name_of(self, offer: Offer) -> str:
        """The shortest name that means this offer: its own where it has that to itself, else the qualified one."""
        return self._names(offer.kind).of(offer)

    def names(self, kind: Kind) -> tuple[str, ...]:
        """The usable names of one kind, sorted."""
        return self._names(kind).all()

    def get(self, kind: Kind, name: str) -> Offer:
        """The offer that `name` (or `distribution/name`) means.

        Raises:
            UnknownStrategyError: nobody offers it; says what is available and what failed to load.
            AmbiguousStrategyError: several do; says the qualified names.
        """
        return self._names(kind).get(name)

    def options(self, offer: Offer, values: Mapping[str, Any]) -> Any:
        """Options for an offer, checked; see `structure_options`."""
        return structure_options(offer.strategy.options, values, strategy=self.name_of(offer))

    def build(self, offer: Offer, context: Any, contract: type) -> Any:
        """Call the strategy's `build` and check that it returned what the contract asks for.

        Raises:
            PluginError: it did not, or as `blaming`.
        """
        with self.blaming(offer, "build()"):
            built = offer.strategy.build(context)
        if not isinstance(built, contract):
            raise PluginError(
                f"{offer.kind.label} '{self.name_of(offer)}': build() returned {type(built).__name__}, "
                f"it must return a {contract.__name__}."
            )
        warn_of_methods(built, f"{offer.kind.label} '{self.name_of(offer)}'")
        return built

    @contextmanager
    def blaming(self, offer: Offer, call: str) -> Iterator[None]:
        """Within it, a plugin's own code runs.

        Raises:
            PluginError: for an error that is none of ollm's; names the strategy and `call`. Running out of memory is
                nobody's fault, and stays what it is.
        """
        try:
            yield
        except (OllmError, MemoryError):
            raise
        except Exception as error:
            raise PluginError(
                f"{offer.kind.label} '{self.name_of(offer)}': {call} failed with {type(error).__name__}: {error}. "
                f"Tell who made {offer.distribution}, or switch it off with {DISABLE_VARIABLE}."
            ) from error

    def _names(self, kind: Kind) -> Names[Offer]:
        return Names(label=kind.label, offers=self.offers(kind), reserved=RESERVED[kind], reports=self.reports)


@functools.cache
def registry() -> Registry:
    """The registry of this process, made on first use; `registry.cache_clear()` makes the next call look again."""
    return Registry(discover())


def strategies(hook: str, names: Iterable[str] | None = None) -> dict[str, Strategy[Any]]:
    """Strategies that are installed, each under the shortest name that means it.

    Args:
        hook: what they are offered through, such as `ollm_kv_stores`.
        names: those that are wanted, qualified or not; `None` for all.

    Raises:
        ConfigurationError: there is no such hook.
        UnknownStrategyError: nobody offers one of the names; says what is available and what failed to load.
        AmbiguousStrategyError: several do; says the qualified names.
    """
    kinds = {kind.value: kind for kind in Kind}
    if hook not in kinds:
        raise ConfigurationError(f"hook={hook!r}: choose one of {', '.join(kinds)}.")
    found = registry()
    kind = kinds[hook]
    offers = found.offers(kind) if names is None else [found.get(kind, name) for name in names]
    return {found.name_of(offer): offer.strategy for offer in offers}
