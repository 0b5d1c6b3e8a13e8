"""What a benchmark is made of, as records that go to a case's process and into the JSON file.

Data only: what to run is decided in `plan`, what numbers mean in `verdicts`.
"""

from __future__ import annotations

import statistics
from typing import Any

import attrs

from ollm.units import format_size

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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

    def kv_bytes(self, tokens: int) -> int:
        return self.bytes_per_token * tokens

    def layer_bytes(self, tokens: int) -> int:
        """Keys and values of one layer."""
        return self.kv_bytes(tokens) // self.layers


@attrs.frozen(kw_only=True)
class Case:
    """One thing to measure, in a process of its own."""

    kind: str
    """`disk` (raw rates alone), `static`, `dynamic` or `strategy`."""
    tokens: int
    strategy: str | None = None
    residency: str | None = None
    """`nothing`, `half`, `everything`, or `budget` for a size that the user chose."""
    ram_budget: int | None = None
    forks: int = 1
    """How many continuations of what the cache is filled with decode at once."""

    @property
    def label(self) -> str:
        """As people read it, without the number of tokens."""
        names = {"disk": "raw disk", "static": "StaticCache", "dynamic": "DynamicCache"}
        if self.kind != "strategy":
            return names[self.kind]
        if self.residency == "budget":
            return f"{self.strategy}, {format_size(self.ram_budget or 0)} resident"
        return f"{self.strategy}, {self.residency} resident" + (f", {self.forks} forks" if self.forks > 1 else "")


@attrs.frozen(kw_only=True)
class Request:
    """What the process of a case is told."""

    case: Case
    geometry: Geometry
    folder: str
    """A new folder on the disk to measure, which belongs to this run."""
    steps: int
    sample_bytes: int
    """The size of the file that raw rates are measured with."""


@attrs.frozen
class Sample:
    """One measurement of the disk alone."""

    nbytes: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.nbytes / self.seconds


@attrs.frozen(kw_only=True)
class Rates:
    """Raw rates of the disk, measured around and between what is compared with them."""

    direct: bool
    """Whether the kernel's cache was bypassed with O_DIRECT; `False` where the file system refuses that."""
    reads: list[Sample]
    writes: list[Sample]

    @property
    def read(self) -> float:
        """Bytes per second, the mean of all samples."""
        return statistics.mean(sample.rate for sample in self.reads)

    @property
    def write(self) -> float:
        return statistics.mean(sample.rate for sample in self.writes)


@attrs.frozen(kw_only=True)
class Measured:
    """What the process of a case answers. Bytes of memory are above the loaded model."""

    rates: Rates | None = None
    """`None` for caches in memory."""
    step_seconds: list[float] = attrs.field(factory=list)
    bytes_per_step: int = 0
    """Keys and values read from the disk."""
    fill_seconds: float = 0.0
    """Of `cache.update`, and of waiting until the disk has what it was given."""
    bytes_written: int = 0
    stored_bytes: int = 0
    """What the cache takes on disk in the end."""
    fill_peak: int = 0
    decode_peak: int = 0
    page_cache: str = "not dropped: nothing of this case is read from a disk"
    memory_method: str = ""
    mode: str = ""
    """The mode of ollm's cache, `block` or `tensor`."""

    @property
    def seconds(self) -> float:
        """Of one decode step: the median."""
        return statistics.median(self.step_seconds)

    @property
    def peak(self) -> int:
        return max(self.fill_peak, self.decode_peak)


@attrs.frozen(kw_only=True)
class Verdict:
    """One bar, and whether a case is over it."""

    bar: str
    what: str
    value: float
    limit: float
    at_least: bool
    """Whether `limit` is the least value that is good enough; else it is the most."""
    unit: str
    """`x` for ratios, `MB` for memory."""
    reached: bool


@attrs.frozen(kw_only=True)
class Outcome:
    """A case after its turn."""

    case: Case
    status: str
    """`done`, `refused` (it cannot fit), `killed` (most likely for memory) or `failed`."""
    reason: str = ""
    """Why it is not `done`."""
    measured: Measured | None = None
    achievable_seconds: float | None = None
    """What memory and disk allow: the longer of StaticCache's time and reading the same bytes raw."""
    possible: float | None = None
    """Seconds per token as a multiple of `achievable_seconds`."""
    verdicts: list[Verdict] = attrs.field(factory=list)


@attrs.frozen(kw_only=True)
class Report:
    """A whole run, as `--json` writes it."""

    format: int = 1
    date: str
    command: list[str]
    machine: dict[str, Any]
    versions: dict[str, str]
    geometry: Geometry
    steps: int
    memory_limit: int | None
    notes: list[str]
    """What could not be done here, such as dropping the page cache."""
    outcomes: list[Outcome]

    @property
    def failed(self) -> bool:
        """Whether a case ended in a way that nobody planned."""
        return any(outcome.status in ("killed", "failed") for outcome in self.outcomes)
