"""What a name means among offers of one sort. First-party names are reserved; any other name offered twice belongs to
nobody. Knows nothing of what is offered but its name and whose it is."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Generic, TypeVar

import attrs

from ollm.errors import AmbiguousStrategyError, UnknownStrategyError
from ollm.registry.kinds import Home
from ollm.registry.report import Named, PluginReport, Status

T = TypeVar("T", bound=Named)


@attrs.frozen(kw_only=True)
class Names(Generic[T]):
    """Offers of one sort, by name."""

    label: str
    """The sort, as people write it."""
    offers: tuple[T, ...]
    """Everything of the sort that loaded plugins offer."""
    reserved: Mapping[str, Home]
    reports: tuple[PluginReport, ...]
    """Of all plugins: an error says which of them are missing."""

    def of(self, offer: T) -> str:
        """The shortest name that means this offer: its own where it has that to itself, else the qualified one."""
        home = self.reserved.get(offer.name)
        mine = home.distribution == offer.distribution if home is not None else len(self._named(offer.name)) == 1
        return offer.name if mine else offer.qualified_name

    def all(self) -> tuple[str, ...]:
        """The usable names, sorted."""
        return tuple(sorted(map(self.of, self.offers)))

    def knows(self, name: str) -> bool:
        """Whether somebody offers this name, or would if it were installed; it may still mean nothing."""
        return bool(self._named(name)) or (name in self.reserved and self.reserved[name].extra is not None)

    def get(self, name: str) -> T:
        """The offer that `name` (or `distribution/name`) means.

        Raises:
            UnknownStrategyError: nobody offers it; says what is available and what failed to load.
            AmbiguousStrategyError: several do; says the qualified names.
        """
        if not isinstance(name, str):
            raise UnknownStrategyError(f"{self.label} {name!r}: give a name. Available: {', '.join(self.all())}.")
        meant = [offer for offer in self.offers if name in (self.of(offer), offer.qualified_name)]
        if len(meant) == 1:
            return meant[0]
        if meant:
            raise AmbiguousStrategyError(
                f"{self.label} '{name}' is offered twice by one distribution and means neither: upgrade or uninstall "
                f"{meant[0].distribution}."
            )
        rivals = [offer.qualified_name for offer in self._named(name)]
        if len(rivals) > 1 and name not in self.reserved:
            raise AmbiguousStrategyError(
                f"{self.label} '{name}' is offered by several distributions, so the bare name means none of them. "
                f"Use one of: {', '.join(rivals)}."
            )
        raise UnknownStrategyError(self._unknown(name, rivals))

    def _named(self, name: str) -> list[T]:
        return [offer for offer in self.offers if offer.name == name]

    def _unknown(self, name: str, rivals: list[str]) -> str:
        available = self.all()
        lines = [f"No {self.label} named {name!r}. Available: {', '.join(available) or 'none'}."]
        home = self.reserved.get(name)
        if rivals:
            lines.append(f"The bare name is reserved; use {', '.join(rivals)}.")
        if home is not None:
            lines += _how_to_install(name, home)
        elif close := difflib.get_close_matches(name, available, n=1):
            lines.append(f"Did you mean '{close[0]}'?")
        failed = [report for report in self.reports if report.status is not Status.LOADED]
        if failed:
            lines.append("Not loaded, so what they offer is missing: " + "; ".join(map(str, failed)) + ".")
        return " ".join(lines)


def _how_to_install(name: str, home: Home) -> list[str]:
    if home.extra is not None:
        return [f"'{name}' ships in {home.distribution}: pip install 'ollm-core[{home.extra}]'."]
    if home.distribution == "ollm-core":
        return [f"'{name}' ships in {home.distribution} itself: is its plugin switched off or broken?"]
    return []
