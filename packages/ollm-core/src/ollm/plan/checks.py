"""What of a request fits together, checked before anything is made. Knows the strategies, makes nothing."""

from __future__ import annotations

from pathlib import Path

from ollm.contracts.strategy import KVFacts
from ollm.errors import ConfigurationError
from ollm.registry import Kind, registry

LIFECYCLES = ("runtime-scoped", "persistent")
MODES = ("auto", "block", "tensor")


def check_mode(mode: str, dense_projection_chunk_rows: int | None) -> None:
    """What `mode` and `dense_projection_chunk_rows` may be.

    Raises:
        ConfigurationError: they do not fit.
    """
    rows = dense_projection_chunk_rows
    if rows is not None and rows < 1:
        raise ConfigurationError(f"dense_projection_chunk_rows={rows!r}: give 1 or more tokens.")
    if mode not in MODES:
        raise ConfigurationError(f"mode={mode!r}: choose one of {', '.join(MODES)}.")


def check_lifecycle(lifecycle: str, name: str, facts: KVFacts) -> None:
    """What `cache_lifecycle` may be for a strategy.

    Raises:
        ConfigurationError: it does not fit.
    """
    if lifecycle not in LIFECYCLES:
        raise ConfigurationError(f"cache_lifecycle={lifecycle!r}: choose one of {', '.join(LIFECYCLES)}.")
    if lifecycle == "persistent":
        if facts.directory is None:
            raise ConfigurationError(
                f"cache_lifecycle='persistent' with cache_strategy={name!r}: that strategy keeps nothing on disk."
            )
        raise ConfigurationError(
            "cache_lifecycle='persistent' is not built yet: use 'runtime-scoped'. "
            "(Its folder layout is fixed in docs/reference/on-disk-format.md.)"
        )


def check_window(window: int | None, name: str, facts: KVFacts) -> None:
    """What `cache_window_tokens` may be for a strategy.

    Raises:
        ConfigurationError: it does not fit.
    """
    if facts.full_history and window is not None:
        windowed = [
            registry().name_of(offer)
            for offer in registry().offers(Kind.KV_STORE)
            if offer.strategy.facts and not offer.strategy.facts.full_history
        ]
        raise ConfigurationError(
            f"cache_window_tokens={window!r} with cache_strategy={name!r}: that strategy keeps the full history. "
            f"Strategies that keep a window: {', '.join(windowed) or 'none is installed'}."
        )
    if not facts.full_history and (window is None or window < 1):
        raise ConfigurationError(
            f"cache_window_tokens={window!r} with cache_strategy={name!r}: give the number of newest tokens to keep, "
            "1 or more."
        )


def check_budget(ram_budget: int | None, name: str, facts: KVFacts) -> None:
    """What `ram_budget` may be for a strategy.

    Raises:
        ConfigurationError: it does not fit.
    """
    if ram_budget is not None and facts.directory is None:
        raise ConfigurationError(
            f"ram_budget={ram_budget!r} with cache_strategy={name!r}: that strategy keeps everything in memory. "
            "Choose one that uses the disk, such as 'chunked'."
        )


def check_cache_dir(cache_dir: str | None, name: str, facts: KVFacts) -> Path | None:
    """The folder of a strategy below `cache_dir`, as an absolute path; `None` for strategies that need none.

    Raises:
        ConfigurationError: it does not fit.
    """
    if facts.directory is None:
        return None
    if not cache_dir:
        raise ConfigurationError(
            f"cache_dir={cache_dir!r}: cache_strategy={name!r} keeps keys and values on disk, so name a folder for "
            "them, such as './kv_cache/'."
        )
    try:
        return Path(cache_dir).absolute() / facts.directory
    except FileNotFoundError:  # the working directory was removed
        raise ConfigurationError(
            f"cache_dir={cache_dir!r}: there is no working directory any more that this could be in. Give an absolute "
            "path."
        ) from None
