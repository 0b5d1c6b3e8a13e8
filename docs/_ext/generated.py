"""Reference pages made from the code: `python docs/_ext/generated.py` writes them, and a test fails if they differ.

What is made stands in the page, between `<!-- generated: NAME -->` and `<!-- end -->`, so that it can be read in the
repository. NAME is a key of `GENERATORS`; each returns Markdown.
"""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import attrs

import ollm.errors
import ollm.plugin
import ollm.testing
from ollm.contracts import hookspecs
from ollm.contracts.options import NoOptions, describe_options
from ollm.registry import Kind, Offer, registry
from ollm.registry.kinds import RESERVED
from ollm.units import format_size

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

_PYTHON: dict[str, tuple[str, ...]] = {
    "models": ("ollm.Inference", "ollm.AutoInference"),
    "caches": (
        "ollm.disk_cache", "ollm.KVCache", "ollm.kv.state.CacheState", "ollm.kv.state.KVCounters",
        "ollm.kv.state.PrefillProgress",
    ),
    "requests": (
        "ollm.CacheRequest", "ollm.api.cache.plan_for", "ollm.plan.plan_cache", "ollm.plan.CachePlan",
        "ollm.plan.cache.CacheMemory", "ollm.plan.ModelFacts", "ollm.plan.BlockVerdict", "ollm.api.facts.facts_of",
        "ollm.api.facts.facts_of_config", "ollm.api.opening.open_cache",
    ),
    "statistics": ("ollm.stats.Stats", "ollm.weights.counters.WeightCounters", "ollm.plan.placement.PlacementRecord"),
    "helpers": ("ollm.file_get_contents",),
}  # fmt: skip
"""What people call, and the records that they are given."""

_OF_OTHERS = (
    "held", "begin_pass", "end_pass", "undo_pass", "first_difference", "check_usable", "what_stays_in_memory",
)  # fmt: skip
"""Methods of a cache that only ollm itself calls."""

_MARK = re.compile(r"(?<=^<!-- generated: )([a-z-]+)( -->\n)(?:.*?^<!-- end -->\n)?", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^(Args|Raises|Returns|Attributes):\n((?:[ ]+.*\n?|\n)+)", re.MULTILINE)
_QUALIFIED = re.compile(r"~?\b(?:[a-z_]\w*\.)+(?=[A-Z])|collections\.abc\.|typing\.")


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
    """Every public name of `ollm.plugin`.

    Raises:
        ValueError: when a name is in `ollm.plugin.__all__` but in no group here, or the other way round.
    """
    grouped = [name for names in _PLUGIN_GROUPS.values() for name in names]
    if sorted(grouped) != sorted(ollm.plugin.__all__):
        raise ValueError(f"docs/_ext/generated.py groups {sorted(set(grouped) ^ set(ollm.plugin.__all__))} wrongly")
    parts = []
    for group, names in _PLUGIN_GROUPS.items():
        parts.append(f"## {group}\n")
        parts += [
            f"### `{name}`\n\n{_DATA[name]}\n" if name in _DATA else _entry(f"ollm.plugin.{name}") for name in names
        ]
    return "\n".join(parts)


def testing_api() -> str:
    """Every public name of `ollm.testing`: what a class asks of its author, and each of its tests."""
    parts = []
    for name in ollm.testing.__all__:
        value = getattr(ollm.testing, name)
        if not inspect.isclass(value):
            parts.append(_entry(f"ollm.testing.{name}", head="##"))
            continue
        asked = ("open", "plan", "place", "adapter", "config")
        methods = [key for key in asked if hasattr(value, key)]
        parts += [_entry(f"ollm.testing.{name}", methods, head="##"), "Its tests:\n"]
        tests = [(key, getattr(value, key)) for key in dir(value) if key.startswith("test_")]
        rows = [(f"`{key}`", " ".join((inspect.getdoc(test) or "").split())) for key, test in tests]
        parts += _table(("test", "what it is about"), rows)
    return "\n".join(parts)


def python_api(group: str) -> str:
    """Some of what people call."""
    return "\n".join(map(_entry, _PYTHON[group]))


GENERATORS: dict[str, Callable[[], str]] = {
    "testing-api": testing_api,
    "hooks": hooks,
    "strategies": strategies,
    "errors": errors,
    "plugin-api": plugin_api,
    **{group: partial(python_api, group) for group in _PYTHON},
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


def _entry(path: str, methods: Sequence[str] | None = None, head: str = "###") -> str:
    """A class or a function; of a class the methods that are named, or all that are its own and public."""
    value: Any = pydoc.locate(path)
    name = path.rpartition(".")[2]
    if not inspect.isclass(value):
        return f"{head} `{name}`\n\n{_signature(name, value)}\n\n{_doc(value)}\n"
    parts = [f"{head} `{name}`\n"]
    if not issubclass(value, Exception) and not inspect.isabstract(value):
        parts.append(f"{_signature(name, value)}\n")
    parts.append(f"{_doc(value)}\n")
    source = _Source(value)
    helps = {field.name: field.metadata.get("help", "") for field in attrs.fields(value)} if attrs.has(value) else {}
    fields = []
    for field, text in () if "\nAttributes:\n" in parts[-1] else source.fields:  # they are explained already
        said = " ".join((text or helps.get(field.partition(":")[0], "")).split())
        fields.append(f"- `{field}`: {said}" if said else f"- `{field}`")
    parts += ["Fields:\n", *fields, ""] if fields else []
    for key in [key for key in source.methods if key not in _OF_OTHERS] if methods is None else methods:
        member = inspect.getattr_static(value, key)
        if isinstance(member, (property, cached_property)):
            parts.append(f"**`{key}`**\n\n{_doc(member)}\n")
        else:
            parts.append(f"{_signature(key, getattr(value, key))}\n\n{_doc(getattr(value, key))}\n")
    return "\n".join(parts)


def _signature(name: str, value: Any) -> str:
    try:
        signature = str(inspect.signature(value))
    except (TypeError, ValueError):  # as of types that are only names
        return f"**`{name}`**"
    signature = re.sub(r"\(self(?:, )?", "(", signature)
    signature = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", _QUALIFIED.sub("", signature))
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)  # annotations are text, defaults stay what they are
    if inspect.isclass(value):
        signature = signature.removesuffix(" -> None")
    return f"**`{name}{signature}`**"


def _doc(value: Any) -> str:
    """A docstring as Markdown: its sections become lists, its examples are marked as not run."""

    def listed(match: re.Match[str]) -> str:
        items: list[str] = []
        for line in textwrap.dedent(match[2]).splitlines():
            if line.startswith(" ") and items:
                items[-1] += f" {line.strip()}"
            elif line.strip():
                items.append(line.strip())
        named = [re.sub(r"^([\w, ]+?): ", lambda head: f"`{head[1].replace(', ', '`, `')}`: ", item) for item in items]
        return f"{match[1]}:\n\n" + "".join(f"- {item}\n" for item in named) + "\n"

    text = _SECTION.sub(listed, f"{inspect.getdoc(value) or ''}\n").strip()
    return re.sub(r"^```python$", "<!-- not run: an example -->\n```python", text, flags=re.MULTILINE)


class _Source:
    """What a class of ours says of itself in its source, bases first."""

    def __init__(self, value: type) -> None:
        self.fields: list[tuple[str, str]] = []
        """Attributes with their types and defaults, and what is said of each."""
        self.methods: list[str] = []
        for base in reversed(value.__mro__):
            if base.__module__.split(".")[0] == "ollm" and (base is value or not issubclass(base, Exception)):
                (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
                assert isinstance(tree, ast.ClassDef)
                self._read(tree)

    def _read(self, tree: ast.ClassDef) -> None:
        for node, text in _documented(tree.body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and not node.target.id.startswith("_")
            ):
                self._note(node.target.id, node, text)
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith(("_", "test_")):
                self.methods += [node.name] if node.name not in self.methods and ast.get_docstring(node) else []
            elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
                for inner, said in _documented(node.body):
                    target = getattr(inner, "target", None) or next(iter(getattr(inner, "targets", [])), None)
                    if said and isinstance(target, ast.Attribute) and not target.attr.startswith("_"):
                        self.fields.append((target.attr, said))

    def _note(self, name: str, node: ast.AnnAssign, text: str) -> None:
        if name.startswith("_"):
            return
        shown = f"{name}: {ast.unparse(node.annotation)}"
        if isinstance(node.value, ast.Constant):
            shown += f" = {ast.unparse(node.value)}"
        self.fields = [field for field in self.fields if not field[0].startswith(f"{name}:")] + [(shown, text)]


def _documented(body: Sequence[ast.stmt]) -> Iterator[tuple[ast.stmt, str]]:
    """Statements, each with the text behind it, if there is one."""
    for node, following in zip(body, [*body[1:], None], strict=True):
        said = following.value if isinstance(following, ast.Expr) else None
        yield node, str(said.value) if isinstance(said, ast.Constant) and isinstance(said.value, str) else ""


def fill(page: str) -> str:
    """The text of a page with what is generated put in, in place of what was."""
    return _MARK.sub(lambda mark: f"{mark[1]}{mark[2]}\n{GENERATORS[mark[1]]().strip()}\n\n<!-- end -->\n", page)


if __name__ == "__main__":
    for file in sorted(Path(__file__).parents[1].rglob("*.md")):
        before = file.read_text(encoding="utf-8")
        after = fill(before)
        if after != before:
            file.write_text(after, encoding="utf-8")
            print(f"written: {file}", file=sys.stderr)
