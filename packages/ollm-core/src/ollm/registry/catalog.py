"""Which strategy a name means. First-party names are reserved; any other name offered twice belongs to nobody."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from ollm.contracts.options import structure_options
from ollm.deprecations import warn_of_methods
from ollm.errors import AmbiguousStrategyError, PluginError, UnknownStrategyError
from ollm.registry.discovery import discover
from ollm.registry.kinds import RESERVED, Home, Kind
from ollm.registry.report import Offer, PluginReport, Status


@attrs.frozen
class Registry:
    """All plugins found, and the strategies that they offer by name."""

    reports: tuple[PluginReport, ...]

    def offers(self, kind: Kind) -> tuple[Offer, ...]:
        """Everything of one kind that loaded plugins offer."""
        return tuple(offer for report in self.reports for offer in report.offers if offer.kind is kind)

    def name_of(self, offer: Offer) -> str:
        """The shortest name that means this offer: its own where it has that to itself, else the qualified one."""
        home = RESERVED[offer.kind].get(offer.strategy.name)
        if home is not None:
            mine = home.distribution == offer.distribution
        else:
            mine = len(self._named(offer.kind, offer.strategy.name)) == 1
        return offer.strategy.name if mine else offer.qualified_name

    def names(self, kind: Kind) -> tuple[str, ...]:
        """The usable names of one kind, sorted."""
        return tuple(sorted(self.name_of(offer) for offer in self.offers(kind)))

    def get(self, kind: Kind, name: str) -> Offer:
        """The offer that `name` (or `distribution/name`) means.

        Raises:
            UnknownStrategyError: nobody offers it; says what is available and what failed to load.
            AmbiguousStrategyError: several do; says the qualified names.
        """
        if not isinstance(name, str):
            raise UnknownStrategyError(f"{kind.label} {name!r}: give a name. Available: {', '.join(self.names(kind))}.")
        meant = [offer for offer in self.offers(kind) if name in (self.name_of(offer), offer.qualified_name)]
        if len(meant) == 1:
            return meant[0]
        if meant:
            raise AmbiguousStrategyError(
                f"{kind.label} '{name}' is offered twice by one distribution and means neither: upgrade or uninstall "
                f"{meant[0].distribution}."
            )
        rivals = [offer.qualified_name for offer in self._named(kind, name)]
        if len(rivals) > 1 and name not in RESERVED[kind]:
            raise AmbiguousStrategyError(
                f"{kind.label} '{name}' is offered by several distributions, so the bare name means none of them. "
                f"Use one of: {', '.join(rivals)}."
            )
        raise UnknownStrategyError(self._unknown(kind, name, rivals))

    def options(self, offer: Offer, values: Mapping[str, Any]) -> Any:
        """Options for an offer, checked; see `structure_options`."""
        return structure_options(offer.strategy.options, values, strategy=self.name_of(offer))

    def build(self, offer: Offer, context: Any, contract: type) -> Any:
        """Call the strategy's `build` and check that it returned what the contract asks for."""
        built = offer.strategy.build(context)
        if not isinstance(built, contract):
            raise PluginError(
                f"{offer.kind.label} '{self.name_of(offer)}': build() returned {type(built).__name__}, "
                f"it must return a {contract.__name__}."
            )
        warn_of_methods(built, f"{offer.kind.label} '{self.name_of(offer)}'")
        return built

    def _named(self, kind: Kind, name: str) -> Sequence[Offer]:
        return [offer for offer in self.offers(kind) if offer.strategy.name == name]

    def _unknown(self, kind: Kind, name: str, rivals: list[str]) -> str:
        available = self.names(kind)
        lines = [f"No {kind.label} named {name!r}. Available: {', '.join(available) or 'none'}."]
        home = RESERVED[kind].get(name)
        if rivals:
            lines.append(f"The bare name is reserved; use {', '.join(rivals)}.")
        if home is not None:
            lines.append(_how_to_install(name, home))
        elif close := difflib.get_close_matches(name, available, n=1):
            lines.append(f"Did you mean '{close[0]}'?")
        failed = [report for report in self.reports if report.status is not Status.LOADED]
        if failed:
            lines.append("Not loaded, so what they offer is missing: " + "; ".join(map(str, failed)) + ".")
        return " ".join(lines)


def _how_to_install(name: str, home: Home) -> str:
    if home.extra is None:
        return f"'{name}' ships in {home.distribution} itself: is its plugin switched off or broken?"
    return f"'{name}' ships in {home.distribution}: pip install 'ollm-core[{home.extra}]'."


@functools.cache
def registry() -> Registry:
    """The registry of this process, made on first use; `registry.cache_clear()` makes the next call look again."""
    return Registry(discover())
