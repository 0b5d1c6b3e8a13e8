"""`Strategy`: the record that a plugin answers with, the same for all four kinds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import attrs

from ollm.contracts.options import NoOptions

if TYPE_CHECKING:
    import torch

    from ollm.contracts.spill import KVGeometry
    from ollm.contracts.storage import Folder, Storage

T_co = TypeVar("T_co", covariant=True)

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def is_text(_: object, attribute: Any, value: Any) -> None:
    """Validator of a field."""
    if not isinstance(value, str):
        raise TypeError(f"{attribute.name}={value!r}: must be text")


def check_name(_: object, attribute: Any, value: Any) -> None:
    """Validator of what people type to choose something: lower-case words joined by `-`."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"{attribute.name}={value!r}: use lower-case words joined by '-', such as 'sliding-window'")


def _check_options(_: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, type) or not attrs.has(value):
        raise TypeError(f"{attribute.name}={value!r}: must be a class made with attrs")


@attrs.frozen(kw_only=True)
class KVFacts:
    """What planner and CLI need to know of a KV strategy without building it.

    Attributes:
        lossless: whether what is read equals what was appended, bit for bit.
        full_history: whether every token stays; `False` for strategies that keep a window and so change the model's
            semantics.
        directory: folder below `cache_dir`, such as `kv_cache_chunked`; `None` for strategies that never touch a
            disk.
        spill_policy: spill policy used when the caller names none.
        downsides: what one gives up by choosing it, in a sentence.
    """

    lossless: bool
    full_history: bool = True
    directory: str | None = None
    spill_policy: str = "auto"
    downsides: str = ""


@attrs.frozen
class BuildContext:
    """What `Strategy.build` receives: the caller's options, checked against `Strategy.options`.

    Attributes:
        options: an instance of `Strategy.options`.
    """

    options: Any


@attrs.frozen(kw_only=True)
class KVBuildContext(BuildContext):
    """What the `build` of a KV strategy receives.

    Attributes:
        geometry: shapes that core expects from the model's config, for planning; the blocks that `write` gets
            decide.
        device: where attention runs and where raw bytes are handed to `decode`.
        window_tokens: the caller's `cache_window_tokens`; for strategies that keep a window, which must set
            `KVStore.window` by it.
        storage: opens this cache's private folder and returns a `Storage` in it. Takes the keywords `write_buffers`
            (how many records of up to 8 MiB may wait to be written) and `compact_from` (see
            `docs/reference/on-disk-format.md`).
        folder: opens this cache's private folder for a store that has files of its own. A store calls this or
            `storage`, once, and closes the folder when it is closed. The folder may hold what an earlier store
            left: see `KVStore.adopt`.
    """

    geometry: KVGeometry
    device: torch.device
    window_tokens: int | None
    storage: Callable[..., Storage]
    folder: Callable[[], Folder]


@attrs.frozen(kw_only=True)
class Strategy(Generic[T_co]):
    """One named choice that a plugin offers: a KV store, a spill policy, a placement or a model adapter.

    Attributes:
        name: lower-case words joined by `-`. First-party names are reserved; see `ollm plugins`.
        summary: one line for `ollm plugins`.
        build: makes the object, importing what is heavy. Takes a `BuildContext` (`KVBuildContext` for KV stores).
        options: an attrs class: its fields are the options, with defaults, validators and `help`. For KV strategies
            only: users give a cache's options, and nothing to the other kinds.
        facts: required for KV strategies, `None` for the other kinds.

    Raises:
        ValueError, TypeError: from the constructor, when a field breaks its rule.
    """

    name: str = attrs.field(validator=check_name)
    summary: str = attrs.field(validator=attrs.validators.and_(is_text, attrs.validators.min_len(1)))
    build: Callable[[Any], T_co] = attrs.field(validator=attrs.validators.is_callable())
    options: type = attrs.field(default=NoOptions, validator=_check_options)
    facts: KVFacts | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.instance_of(KVFacts))
    )
