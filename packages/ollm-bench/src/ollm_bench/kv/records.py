"""The records of `ollm bench kv`: models by their keys and values, caches as cases. Data only."""

from __future__ import annotations

from typing import TypeAlias

import attrs

from ollm.plugin import format_size
from ollm_bench import records


@attrs.frozen(kw_only=True)
class Geometry:
    """The model that decodes, and how many bytes its keys and values take."""

    layers: int
    """Layers whose keys and values are stored, so those with full attention."""
    kv_heads: int
    head_dim: int
    dtype: str
    bytes_per_token: int
    """Keys and values of one token in all stored layers."""
    model_bytes: int
    model: str | None = None
    """The folder of a checkpoint; `None` for a Llama with random weights."""

    @property
    def text(self) -> str:
        """The model in a line."""
        return (
            f"{self.model or 'Llama with random weights'}: {self.layers} layers, {self.kv_heads} KV heads of "
            f"{self.head_dim}, {self.dtype}, {self.bytes_per_token / 1024:g} KiB per token"
        )

    def kv_bytes(self, tokens: int) -> int:
        return self.bytes_per_token * tokens

    def layer_bytes(self, tokens: int) -> int:
        """Keys and values of one layer."""
        return self.kv_bytes(tokens) // self.layers


@attrs.frozen(kw_only=True)
class Case(records.Case):
    """Decoding with one cache. Its `kind` is `disk`, `static`, `dynamic` or `strategy`."""

    tokens: int
    strategy: str | None = None
    residency: str | None = None
    """`nothing`, `half`, `everything`, or `budget` for a size that the user chose."""
    ram_budget: int | None = None
    forks: int = 1
    """How many continuations of what the cache is filled with decode at once."""
    lossless: bool = True
    """Whether the strategy gives back what it is given."""

    @property
    def label(self) -> str:
        """Without the number of tokens."""
        names = {"disk": "raw disk", "static": "StaticCache", "dynamic": "DynamicCache"}
        if self.kind != "strategy":
            return names[self.kind]
        if self.residency == "budget":
            return f"{self.strategy}, {format_size(self.ram_budget or 0)} resident"
        return f"{self.strategy}, {self.residency} resident" + (f", {self.forks} forks" if self.forks > 1 else "")

    @property
    def title(self) -> str:
        return f"{self.label}, {self.tokens:,} tokens"

    @property
    def is_baseline(self) -> bool:
        return self.kind != "strategy"


@attrs.frozen(kw_only=True)
class Measured(records.Measured):
    """Bytes of memory are above the loaded model."""

    fill_seconds: float = 0.0
    """Of `cache.update`, and of waiting until the disk has what it was given."""
    bytes_written: int = 0
    stored_bytes: int = 0
    """What the cache takes on disk in the end."""
    fill_peak: int = 0
    decode_peak: int = 0

    @property
    def peak(self) -> int:
        """Of filling and decoding."""
        return max(self.fill_peak, self.decode_peak)


Outcome: TypeAlias = records.Outcome[Case, Measured]
Report: TypeAlias = records.Report[Case, Geometry, Measured]
Request: TypeAlias = records.Request[Case, Geometry]
