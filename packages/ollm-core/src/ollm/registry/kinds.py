"""The four kinds of strategy, the hook that asks for each, and the names that belong to ollm itself, those of commands
included."""

from __future__ import annotations

import enum

import attrs


class Kind(enum.Enum):
    """What a strategy is for. The value is the hook that asks for it."""

    KV_STORE = "ollm_kv_stores"
    SPILL_POLICY = "ollm_spill_policies"
    OFFLOAD_PLACEMENT = "ollm_offload_placements"
    MODEL_ADAPTER = "ollm_model_adapters"

    @property
    def label(self) -> str:
        """The kind as people write it: `KV store`, `spill policy`, …"""
        return _LABELS[self]


_LABELS = {
    Kind.KV_STORE: "KV store",
    Kind.SPILL_POLICY: "spill policy",
    Kind.OFFLOAD_PLACEMENT: "offload placement",
    Kind.MODEL_ADAPTER: "model adapter",
}


@attrs.frozen
class Home:
    """The first-party distribution of a reserved name, and the extra of `ollm-core` that installs it."""

    distribution: str
    extra: str | None
    """`None` for core, and for what is not published yet."""


_CORE = Home("ollm-core", None)
_PAGED = Home("ollm-kv-paged", "paged")
_JOURNAL = Home("ollm-kv-journal", "journal")
_QUANT = Home("ollm-kv-quant", "quant")
_OFFLOAD = Home("ollm-offload", "offload")
_BENCH = Home("ollm-bench", "bench")

RESERVED: dict[Kind, dict[str, Home]] = {
    Kind.KV_STORE: {
        "resident": _CORE,
        "chunked": _CORE,
        "paged": _PAGED,
        "streamed-segmented": _PAGED,
        "sliding-window-ring-buffer": _PAGED,
        "log-structured-journal": _JOURNAL,
        "tiered-write-back": _JOURNAL,
        "quantized-cold-tier": _QUANT,
    },
    Kind.SPILL_POLICY: {"auto": _CORE, "write-through": _OFFLOAD, "fixed-budget": _OFFLOAD, "hot-tail": _JOURNAL},
    Kind.OFFLOAD_PLACEMENT: {
        "fit": _CORE,
        **dict.fromkeys(("prefix", "suffix", "middle-band", "interleaved", "auto"), _OFFLOAD),
    },
    Kind.MODEL_ADAPTER: {"llama": _CORE, "generic": _CORE},
}
"""Names that only their home distribution can offer unqualified, whatever else is installed and in whatever order."""

COMMANDS = "ollm_commands"
"""The hook that asks for commands, which are no strategies: nobody builds or configures them."""

RESERVED_COMMANDS: dict[str, Home] = {
    **dict.fromkeys(("doctor", "plugins"), _CORE),
    "bench": _BENCH,
    "serve": Home("ollm-server", None),
    "batch": Home("ollm-batch", None),
}
"""The same of commands. Core's own are in no plugin: `ollm plugins` works whatever is switched off."""


def directory_of(name: str) -> str:
    """The folder name that a first-party KV strategy of this name uses below `cache_dir`."""
    return "kv_cache_" + name.replace("-", "_")
