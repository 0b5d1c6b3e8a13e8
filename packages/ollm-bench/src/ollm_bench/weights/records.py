"""The records of `ollm bench weights`: models by the bytes of their layers, ways to run them as cases. Data only."""

from __future__ import annotations

from typing import TypeAlias

import attrs

from ollm_bench import records


@attrs.frozen(kw_only=True)
class Geometry:
    """The model that runs, and how many bytes its parts take."""

    name: str
    """As people read it: the folder of a checkpoint, or what was generated."""
    model: str = ""
    """The folder that it is loaded from; empty until it is written."""
    dtype: str
    layer_bytes: list[int]
    """Weights of each decoder layer."""
    other_bytes: int
    """All other weights: embeddings, the last norm, the head."""
    kv_bytes_per_token: int
    """Keys and values of one token in all layers with full attention."""

    @property
    def model_bytes(self) -> int:
        return sum(self.layer_bytes) + self.other_bytes

    @property
    def text(self) -> str:
        """The model in a line."""
        return f"{self.name}: {len(self.layer_bytes)} layers, {self.dtype}, {self.model_bytes / 1e9:.2f} GB"


@attrs.frozen(kw_only=True)
class Case(records.Case):
    """One way to run the model. Its `kind` is `disk`, `memory`, `mapped`, `accelerate` or `ollm`."""

    resident: int | None = None
    """With ollm: how many layers stay in memory; `None` for what ollm does by itself, the placement `fit`."""
    kv_tokens: int = 0
    """How many tokens there are before the one that is measured; with ollm their keys and values are on the disk."""
    prompt: int = 0
    """How many tokens to take at once; 0 for steps of one token."""

    @property
    def label(self) -> str:
        kinds = {
            "disk": "raw disk",
            "memory": "in memory",
            "mapped": "memory-mapped",
            "accelerate": "accelerate, disk offload",
            "ollm": f"ollm, {self._placed}",
        }
        parts = [kinds[self.kind]]
        if self.kv_tokens:
            parts.append(f"{self.kv_tokens:,} tokens of KV")
        if self.prompt:
            parts.append(f"prompt of {self.prompt:,}")
        return ", ".join(parts)

    @property
    def _placed(self) -> str:
        if self.resident is None:
            return "fit"
        return f"{self.resident} layers resident" if self.resident else "nothing resident"

    @property
    def is_baseline(self) -> bool:
        return self.kind != "ollm"

    @property
    def is_step(self) -> bool:
        return not self.prompt


@attrs.frozen(kw_only=True)
class Measured(records.Measured):
    """Bytes of memory are above the process before it loads, which has imported everything; pages of mapped files
    count. `bytes_per_step` is what ollm counted, weights with keys and values; for others, what the kernel says."""

    kernel_bytes_per_step: int = 0
    """What the kernel says that this process caused to be read from disks. 0 where it does not say."""
    kv_bytes_per_step: int = 0
    """Keys and values among the bytes of a step."""
    load_seconds: float = 0.0
    load_peak: int = 0
    step_peak: int = 0

    @property
    def peak(self) -> int:
        """Of loading and of all steps."""
        return max(self.load_peak, self.step_peak)


Outcome: TypeAlias = records.Outcome[Case, Measured]
Report: TypeAlias = records.Report[Case, Geometry, Measured]
Request: TypeAlias = records.Request[Case, Geometry]
