"""The discovery loop: every plugin is imported, checked and asked alone, so that a broken one disturbs nothing.

pluggy's own `load_setuptools_entrypoints` aborts on the first broken import, skips duplicates in silence and leaves
misspelt hooks unnoticed; hence a loop of our own, with one `PluginManager` per plugin. It knows nothing of names that
several plugins offer: see `names`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import importlib_metadata
import pluggy

from ollm.contracts import hookspecs
from ollm.contracts.commands import Command
from ollm.contracts.options import describe_options
from ollm.contracts.strategy import Strategy
from ollm.deprecations import OllmDeprecationWarning
from ollm.errors import PluginError
from ollm.registry.kinds import COMMANDS, RESERVED, Kind, directory_of
from ollm.registry.report import CommandOffer, Offer, PluginReport, Status

DISABLE_VARIABLE = "OLLM_DISABLE_PLUGINS"
_MOST_RECORDS = 256
_HEAVY_MODULES = ("torch", "transformers")


def discover() -> tuple[PluginReport, ...]:
    """Load every plugin that is installed, in a fixed order, and report on each. Raises for no plugin's fault."""
    disabled = {_normal(name.strip()) for name in os.environ.get(DISABLE_VARIABLE, "").split(",")}
    points = [(_owner(point), point) for point in importlib_metadata.entry_points(group=hookspecs.PROJECT)]
    points.sort(key=lambda found: (found[0], found[1].name))
    return tuple(_report(point, *owner, disabled) for owner, point in points)


def _owner(point: importlib_metadata.EntryPoint) -> tuple[str, str]:
    """Normalised name and version of the distribution that a plugin came with."""
    with contextlib.suppress(Exception):  # metadata without a name, or none: what an interrupted uninstall leaves
        if point.dist is not None:
            metadata = point.dist.metadata  # read and parsed each time that it is asked for
            return _normal(metadata["Name"]), metadata["Version"]
    return "unknown", "0"


def _normal(name: str) -> str:
    """A name as pip compares it: `Acme_KV` is `acme-kv`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _report(point: importlib_metadata.EntryPoint, distribution: str, version: str, disabled: set[str]) -> PluginReport:
    def report(status: Status, **more: Any) -> PluginReport:
        return PluginReport(
            name=point.name, module=point.value, distribution=distribution, version=version, status=status, **more
        )

    if disabled & {_normal(point.name), distribution}:
        return report(Status.DISABLED, reason=f"switched off by {DISABLE_VARIABLE}")
    before = {module for module in _HEAVY_MODULES if module in sys.modules}
    try:
        with warnings.catch_warnings(record=True, action="always", category=OllmDeprecationWarning) as caught:
            offers, commands = _load(point, distribution)
        options = [*_doubtful_options(offers)]
    except KeyboardInterrupt:  # the user's own Ctrl-C
        raise
    except BaseException as error:  # a plugin may raise anything, SystemExit and MemoryError included
        return report(Status.BROKEN, reason=_describe(error))
    heavy = [module for module in _HEAVY_MODULES if module in sys.modules and module not in before]
    notes = [f"its entry module imports {module}: move that import into `build`" for module in heavy]
    for warning in caught:
        if issubclass(warning.category, OllmDeprecationWarning):
            notes.append(str(warning.message))
        else:  # the plugin's own business
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return report(Status.LOADED, offers=offers, commands=commands, warnings=(*notes, *options))


def _load(
    point: importlib_metadata.EntryPoint, distribution: str
) -> tuple[tuple[Offer, ...], tuple[CommandOffer, ...]]:
    """Import one plugin, register it with a manager of its own, and return what it offers, checked."""
    plugin = point.load()
    version = getattr(plugin, "ollm_api_version", None)
    if version != hookspecs.API_VERSION:
        cure = "upgrade ollm-core" if isinstance(version, int) and version > hookspecs.API_VERSION else "upgrade it"
        stated = "states no `ollm_api_version`" if version is None else f"was written for API version {version!r}"
        raise PluginError(f"{stated}, this ollm-core speaks {hookspecs.API_VERSION}: {cure}")
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name=point.name)
    manager.check_pending()
    if not manager.get_hookcallers(plugin):
        known = ", ".join((*(kind.value for kind in Kind), COMMANDS))
        raise PluginError(f"has no function marked with `ollm.plugin.hookimpl`. The hooks: {known}")
    strategies = [(kind, strategy) for kind in Kind for strategy in _answers(manager, kind.value, Strategy)]
    for kind, strategy in strategies:
        _check(kind, strategy, distribution)
    commands = _answers(manager, COMMANDS, Command)
    return (
        tuple(Offer(kind=kind, strategy=strategy, distribution=distribution) for kind, strategy in strategies),
        tuple(CommandOffer(command=command, distribution=distribution) for command in commands),
    )


def _answers(manager: pluggy.PluginManager, hook: str, record: type[Any]) -> list[Any]:
    """All that a plugin's implementations of a hook answer with: records, no two of one name."""
    caller = getattr(manager.hook, hook)
    found: list[Any] = []
    for answer in caller() or [None] * len(caller.get_hookimpls()):  # pluggy leaves answers of `None` out
        found += _records(hook, record, answer)
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise PluginError(f"{hook}() offers '{name}' twice")
    return found


def _records(hook: str, record: type[Any], answer: object) -> list[Any]:
    """The answer of a hook as a list; a generator that fails late fails here."""
    if not isinstance(answer, Iterable) or isinstance(answer, (str, bytes)):
        raise PluginError(f"{hook}() returned {answer!r}: it must return an iterable of `{record.__name__}`")
    records = list(itertools.islice(answer, _MOST_RECORDS + 1))
    if len(records) > _MOST_RECORDS:
        raise PluginError(f"{hook}() offers more than {_MOST_RECORDS}: does it ever end?")
    for one in records:
        if not isinstance(one, record):
            raise PluginError(f"{hook}() offers {one!r}: it must be an `ollm.plugin.{record.__name__}`")
    return records


def _check(kind: Kind, strategy: Strategy[Any], distribution: str) -> None:
    """Everything about a strategy of a kind that can be known without building it."""
    if kind is not Kind.KV_STORE:
        if strategy.facts is not None:
            raise PluginError(f"{kind.label} '{strategy.name}': `facts` are for KV stores only")
        return
    if strategy.facts is None:
        raise PluginError(f"KV store '{strategy.name}' has no `facts`: give it `KVFacts(lossless=...)`")
    directory = strategy.facts.directory
    if directory is None:
        return
    if not directory.startswith("kv_cache_") or not directory.replace("_", "").isalnum() or not directory.isascii():
        raise PluginError(f"'{strategy.name}': directory={directory!r} must look like '{directory_of('my-store')}'")
    reserved = {directory_of(name): home.distribution for name, home in RESERVED[Kind.KV_STORE].items()}
    if reserved.get(directory, distribution) != distribution:
        raise PluginError(
            f"'{strategy.name}': directory {directory!r} belongs to {reserved[directory]}; choose another"
        )


def _doubtful_options(offers: Iterable[Offer]) -> Iterator[str]:
    for offer in offers:
        for info in describe_options(offer.strategy.options):
            which = f"option '{info.name}' of '{offer.strategy.name}'"
            if offer.kind is not Kind.KV_STORE:
                yield f"{which} keeps its default: only options of KV stores can be set"
            elif not info.help:
                yield f"{which} has no help text: make it with `ollm.plugin.option`"


def _describe(error: BaseException) -> str:
    """What was raised and where, in one line; even from an exception that cannot be printed."""
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = "(its message cannot be printed)"
    if isinstance(error, PluginError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"
