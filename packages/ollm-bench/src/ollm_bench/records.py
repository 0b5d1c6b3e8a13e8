"""What every benchmark is made of, as records that go to a case's process and into the JSON file.

Data only. Each benchmark has its own cases, geometry and measured values, which extend these; what to run is decided in
its `plan`, what numbers mean in its `verdicts`.
"""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import attrs

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@attrs.frozen(kw_only=True)
class Case(ABC):
    """One thing to measure, in a process of its own."""

    kind: str
    """`disk` (raw rates alone), or one of the benchmark's own."""

    @property
    @abstractmethod
    def label(self) -> str:
        """As people read it; what all cases of a run have in common is left out."""

    @property
    @abstractmethod
    def is_baseline(self) -> bool:
        """Whether others are compared with it."""

    @property
    def title(self) -> str:
        """The label with all that tells this case from the others."""
        return self.label

    @property
    def is_step(self) -> bool:
        """Whether its seconds are those of one token, and so comparable to the others'."""
        return True


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
    writes: list[Sample] = attrs.field(factory=list)

    @property
    def read(self) -> float:
        """Bytes per second, the mean of all samples."""
        return statistics.mean(sample.rate for sample in self.reads)

    @property
    def write(self) -> float:
        return statistics.mean(sample.rate for sample in self.writes)


@attrs.frozen(kw_only=True)
class Measured(ABC):
    """What the process of a case answers."""

    rates: Rates | None = None
    """`None` for what does not read from the disk."""
    step_seconds: list[float] = attrs.field(factory=list)
    first_seconds: float | None = None
    """Of the first step of all, where it is told apart."""
    bytes_per_step: int = 0
    """Read from the disk."""
    page_cache: str = ""
    """What was done about it, if it has a part in this case."""
    memory_method: str = ""
    mode: str = ""
    """The mode of ollm's cache, `block` or `tensor`, if there is one."""
    remark: str = ""
    """What else a reader may want to know of this case."""

    @property
    def seconds(self) -> float:
        """Of one step: the median."""
        return statistics.median(self.step_seconds)

    @property
    @abstractmethod
    def peak(self) -> int:
        """The highest memory, above what the benchmark says."""


@attrs.frozen(kw_only=True)
class Verdict:
    """One thing that a case is asked for, and whether it is reached."""

    what: str
    """What the value is, as a reader would go on after the number: `of StaticCache's time`."""
    value: float
    limit: float
    at_least: bool
    """Whether `limit` is the least value that is good enough; else it is the most."""
    unit: str
    """`x` for ratios, `MB` for memory."""
    reached: bool


C = TypeVar("C", bound=Case)
G = TypeVar("G")
M = TypeVar("M", bound=Measured)


@attrs.frozen(kw_only=True)
class Request(Generic[C, G]):
    """What the process of a case is told."""

    case: C
    geometry: G
    folder: str
    """A new folder on the disk to measure, which belongs to this run."""
    steps: int


@attrs.frozen(kw_only=True)
class Outcome(Generic[C, M]):
    """A case after its turn."""

    case: C
    status: str
    """`done`, `refused` (it cannot fit, or lacks something), `killed` (most likely for memory) or `failed`."""
    reason: str = ""
    """Why it is not `done`."""
    measured: M | None = None
    achievable_seconds: float | None = None
    """What memory and disk allow: the longer of computing and of reading the same bytes raw."""
    possible: float | None = None
    """Seconds per step as a multiple of `achievable_seconds`."""
    verdicts: list[Verdict] = attrs.field(factory=list)
    doubts: list[str] = attrs.field(factory=list)
    """Why nobody should rely on the verdicts."""


@attrs.frozen(kw_only=True)
class Report(Generic[C, G, M]):
    """A whole run, as `--json` writes it."""

    format: int = 2
    date: str
    command: list[str]
    machine: dict[str, Any]
    versions: dict[str, str]
    geometry: G
    steps: int
    memory_limit: int | None
    notes: list[str]
    """What could not be done here, such as dropping the page cache."""
    outcomes: list[Outcome[C, M]]

    @property
    def failed(self) -> bool:
        """Whether a case ended in a way that nobody planned."""
        return any(outcome.status in ("killed", "failed") for outcome in self.outcomes)
