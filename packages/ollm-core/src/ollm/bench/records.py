"""What is asked for and what came out: plain records that become JSON."""

from __future__ import annotations

import enum
from pathlib import Path

import attrs

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@attrs.frozen(kw_only=True)
class Geometry:
    """Of the model whose keys and values are read: a Llama with random weights, or a checkpoint."""

    layers: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    model: str | None = None
    """Directory of a checkpoint; the other fields are then what its config says."""
    model_bytes: int = 0
    """Of its weights, about."""

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * ITEM_BYTES[self.dtype]


class Resident(enum.Enum):
    """How much of a store stays in memory."""

    NOTHING = "nothing"
    HALF = "half"
    ALL = "everything"
    BUDGET = "budget"
    """As much as the user said."""
    POINTLESS = "in memory"
    """The case has no disk."""


@attrs.frozen(kw_only=True)
class Case:
    """One thing to measure, in a process of its own."""

    name: str
    """`DynamicCache`, `StaticCache`, or a KV strategy."""
    tokens: int
    resident: Resident
    ram_budget: int = 0
    geometry: Geometry
    steps: int
    folder: str
    """On the disk that is measured."""
    cgroup: str | None = None
    """A memory control group that the process joins before anything else."""

    @property
    def on_disk(self) -> bool:
        """Whether it reads from the disk."""
        return self.resident is not Resident.POINTLESS

    @property
    def title(self) -> str:
        """The case in words."""
        kept = {
            Resident.POINTLESS: "in memory",
            Resident.BUDGET: f"{self.ram_budget / 2**20:,.0f} MiB resident",
        }.get(self.resident, f"{self.resident.value} resident")
        return f"{self.name}, {kept}"


@attrs.frozen(kw_only=True)
class Measured:
    """What one case gave. Seconds, bytes, bytes per second."""

    seconds: list[float]
    """Of every measured step."""
    bytes_per_step: int = 0
    """Read from the disk."""
    read_rates: list[float] = attrs.field(factory=list)
    """Raw, of the case's own files, before and after every step."""
    write_rate: float | None = None
    """Raw, of as many bytes."""
    fill_seconds: float = 0.0
    """Appending all tokens, without making them."""
    fill_bytes: int = 0
    """Written meanwhile."""
    peak_fill: int = 0
    peak_decode: int = 0
    """The process above the loaded model."""
    cache_dropped: bool = False
    """Whether the page cache was dropped before every step, where it holds what is read."""
    unbuffered: bool = False
    """Whether the raw rates, and the cache, went past the page cache."""


class Status(enum.Enum):
    """How a case ended."""

    DONE = "done"
    REFUSED = "refused"
    """It could not fit."""
    KILLED = "killed"
    FAILED = "failed"


@attrs.frozen(kw_only=True)
class Outcome:
    """A case and how it ended."""

    case: Case
    status: Status
    reason: str = ""
    measured: Measured | None = None


@attrs.frozen(kw_only=True)
class Request:
    """All that the command line said, checked."""

    tokens: tuple[int, ...]
    geometry: Geometry
    strategies: tuple[str, ...]
    ram_budget: int | None
    steps: int
    folder: Path
    memory_limit: int | None
