"""Reference pages made from the code while the documentation is built, so that they cannot differ from it.

A page asks for its content with the line `<!-- generated: NAME -->`, where NAME is a key of `GENERATORS`. Each
generator returns MyST Markdown and can be called without Sphinx.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from sphinx.ext.napoleon import Config, GoogleDocstring

import ollm.errors
import ollm.plugin
import ollm.testing
from ollm.contracts import hookspecs
from ollm.contracts.options import NoOptions, describe_options
from ollm.registry import Kind, Offer, registry
from ollm.registry.kinds import RESERVED
from ollm.units import format_size

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_PLUGIN_GROUPS: dict[str, tuple[str, ...]] = {
    "Entry modules": ("API_VERSION", "hookimpl", "Strategy", "KVFacts", "BuildContext", "KVBuildContext"),
    "Options and sizes": ("option", "NoOptions", "StorageOptions", "ByteSize", "parse_size", "format_size"),
    "KV stores": ("KVStore", "KVBlock", "BlockKey", "Location", "Extent", "KVLayout", "StoreStats", "pack", "unpack"),
    "Stores on disk": ("SegmentedStore", "Storage", "Folder"),
    "Spill policies": ("SpillPolicy", "SpillPlan", "KVGeometry", "LayerGeometry", "MemorySnapshot"),
    "Offload placements": ("OffloadPlacement",),
    "Model adapters": ("ModelAdapter", "ModelParts"),
    "Commands": ("Command", "strategies", "kv_geometry", "measure_memory"),
    "Errors": (
        "OllmError", "ConfigurationError", "StorageError", "CorruptDataError", "DiskFullError", "NonFiniteError",
        "StoreContractError", "UnsupportedOperationError", "MissingExtraError",
    ),
}  # fmt: skip
"""Every name of `ollm.plugin.__all__`, in the order in which an author of a plugin meets it."""

_DATA = {
    "API_VERSION": "The version of hooks and contracts. A plugin states it as `ollm_api_version`.",
    "hookimpl": "Decorator that marks a function as the implementation of a hook. The function has the hook's name.",
    "ByteSize": "A number of bytes. As the type of an option, it also takes text such as `512MiB`, `2GB` or `1.5 GiB`.",
}
"""Names that are neither classes nor functions, which autodoc can say little about."""

_HEADINGS = {
    Kind.KV_STORE: "KV stores",
    Kind.SPILL_POLICY: "Spill policies",
    Kind.OFFLOAD_PLACEMENT: "Offload placements",
    Kind.MODEL_ADAPTER: "Model adapters",
}

_FENCE = re.compile(r"```(\w+)")


def hooks() -> str:
    """Every hook specification: its signature, its docstring, and the contract that it serves."""
    specs = [(name, spec) for name, spec in vars(hookspecs).items() if _is_hookspec(spec)]
    parts = []
    for name, spec in specs:
        signature = str(inspect.signature(spec)).replace("collections.abc.", "").replace("ollm.contracts.", "")
        signature = re.sub(r"\b(?:strategy|kv|spill|offload|models|commands)\.(?=[A-Z])", "", signature)
        parts.append(f"## `{name}`\n\n```python\ndef {name}{signature}: ...\n```\n\n{inspect.getdoc(spec)}\n")
    return "\n".join(parts).replace("```python\ndef", "<!-- not run: a signature -->\n```python\ndef")


def strategies() -> str:
    """The strategies and options of the first-party plugins that are installed, asked of the live registry."""
    first_party = {home.distribution for names in RESERVED.values() for home in names.values()}
    parts = []
    for kind in Kind:
        offers = [offer for offer in registry().offers(kind) if offer.distribution in first_party]
        parts.append(f"## {_HEADINGS[kind]}\n\nOffered through `{kind.value}`.\n")
        parts += [_strategy(offer) for offer in offers]
    return "\n".join(parts)


def errors() -> str:
    """Every error class, as a tree by base class."""
    classes = [value for value in vars(ollm.errors).values() if inspect.isclass(value)]
    lines: list[str] = []

    def add(error: type, depth: int) -> None:
        also = [base.__name__ for base in error.__bases__ if base.__module__ == "builtins" and base is not Exception]
        note = f" Built-in base: `{'`, `'.join(also)}`." if also else ""
        summary = " ".join((inspect.getdoc(error) or "").split())
        lines.append(f"{'  ' * depth}- **`{error.__name__}`**: {summary}{note}")
        for child in classes:
            if child.__bases__[0] is error:
                add(child, depth + 1)

    add(ollm.errors.OllmError, 0)
    return "\n".join(lines) + "\n"


def plugin_api() -> str:
    """Every public name of `ollm.plugin`, through autodoc.

    Raises:
        ValueError: when a name is in `ollm.plugin.__all__` but in no group here, or the other way round.
    """
    grouped = [name for names in _PLUGIN_GROUPS.values() for name in names]
    if sorted(grouped) != sorted(ollm.plugin.__all__):
        raise ValueError(f"docs/_ext/generated.py groups {sorted(set(grouped) ^ set(ollm.plugin.__all__))} wrongly")
    parts = []
    for group, names in _PLUGIN_GROUPS.items():
        body = "\n\n".join(_autodoc(name) for name in names)
        parts.append(f"## {group}\n\n```{{eval-rst}}\n{body}\n```\n")
    return "\n".join(parts)


def testing_api() -> str:
    """Every public name of `ollm.testing`: what a class asks of its author, and each of its tests."""
    parts = []
    for name in ollm.testing.__all__:
        value = getattr(ollm.testing, name)
        if not inspect.isclass(value):
            parts.append(f"```{{eval-rst}}\n.. autofunction:: ollm.testing.{name}\n```\n")
            continue
        own = [key for key in ("open", "plan", "place", "adapter", "config") if hasattr(value, key)]
        own += sorted(key for base in value.__mro__[:-1] for key in vars(base).get("__annotations__", {}))
        members = f"   :members: {', '.join(own)}\n   :inherited-members:"
        head = f".. autoclass:: ollm.testing.{name}\n{members}" if own else f".. autoclass:: ollm.testing.{name}"
        parts.append(f"## {name}\n\n```{{eval-rst}}\n{head}\n```\n\nIts tests:\n")
        tests = [(key, getattr(value, key)) for key in dir(value) if key.startswith("test_")]
        rows = [(f"`{key}`", " ".join((inspect.getdoc(test) or "").split())) for key, test in tests]
        parts += _table(("test", "what it is about"), rows)
    return "\n".join(parts)


GENERATORS: dict[str, Callable[[], str]] = {
    "testing-api": testing_api,
    "hooks": hooks,
    "strategies": strategies,
    "errors": errors,
    "plugin-api": plugin_api,
}


def _is_hookspec(value: object) -> bool:
    return inspect.isfunction(value) and hasattr(value, f"{hookspecs.PROJECT}_spec")


def _strategy(offer: Offer) -> str:
    strategy, facts = offer.strategy, offer.strategy.facts
    lines = [f"### `{strategy.name}`\n", f"{strategy.summary} Ships in `{offer.distribution}`.\n"]
    if facts is not None:
        lines += _table(
            ("fact", "value"),
            [
                ("lossless", "yes" if facts.lossless else "no"),
                ("full history", "yes" if facts.full_history else "no: it keeps a window and changes semantics"),
                ("folder below `cache_dir`", f"`{facts.directory}`" if facts.directory else "none"),
                ("default spill policy", f"`{facts.spill_policy}`"),
                ("downsides", facts.downsides or "none stated"),
            ],
        )
    if strategy.options is not NoOptions:
        rows = [
            (f"`{info.name}`", f"`{info.type}`", _default(info.type, info.default), info.help)
            for info in describe_options(strategy.options)
        ]
        lines += _table(("option", "type", "default", "meaning"), rows)
    return "\n".join(lines)


def _default(kind: str, value: object) -> str:
    return f"`{format_size(value)}`" if kind.startswith("ByteSize") and isinstance(value, int) else f"`{value!r}`"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells), ""]


def _autodoc(name: str) -> str:
    value = getattr(ollm.plugin, name)
    if name in _DATA:
        shown = f"\n   :value: {value}" if isinstance(value, int) else ""
        return f".. py:data:: ollm.plugin.{name}{shown}\n\n   {_DATA[name]}"
    if not inspect.isclass(value):
        return f".. autofunction:: ollm.plugin.{name}"
    if issubclass(value, Exception):
        return f".. autoexception:: ollm.plugin.{name}"
    options = attrs.has(value) and any("help" in field.metadata for field in attrs.fields(value))
    return f".. autoclass:: ollm.plugin.{name}\n   :members:" + "\n   :undoc-members:" * options


def _insert(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = re.sub(r"^<!-- generated: ([a-z-]+) -->$", lambda match: GENERATORS[match[1]](), source[0], flags=re.M)


def _docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make sections such as `Args:` and Markdown code fences what reStructuredText understands."""
    inside = False
    for index, line in enumerate(lines):
        fence = _FENCE.fullmatch(line.strip())
        if fence and not inside:
            lines[index], inside = f".. code-block:: {fence[1]}", True
        elif inside and line.strip() == "```":
            lines[index], inside = "", False
        elif inside:
            lines[index] = f"   {line}"
    for index in reversed([i for i, line in enumerate(lines) if line.startswith(".. code-block::")]):
        lines.insert(index + 1, "")
    if what not in ("attribute", "property"):  # in which napoleon would take what stands before a colon for a type
        lines[:] = GoogleDocstring(lines, Config(napoleon_use_ivar=True), app, what, name, obj, options).lines()


def _signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Classes as defaults and qualified names, as an author would write them."""

    def short(text: str | None) -> str | None:
        return text and re.sub(r"~[\w.]+\.(?=\w)", "", re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text))

    return short(signature), short(returns)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("source-read", _insert)
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
