"""How much memory there is, how much is free, and who of ours has claimed what: on the host (cgroup limits included)
and on the device.

One ledger serves the whole process, so that several caches, and whatever else takes much memory, plan with what the
others have left.
"""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import attrs
import psutil
import torch

from ollm.contracts.spill import MemorySnapshot
from ollm.errors import MemoryLimitError
from ollm.io.devices import is_accelerator
from ollm.units import format_size

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
# (controller of v1 or "" for v2, folder, limit, usage, name of the reclaimable page cache in memory.stat)
_LAYOUTS = (
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ("", "", "memory.max", "memory.current", "inactive_file"),
)


_HOST = torch.device("cpu")
_HEADROOM = 64 * 2**20
"""Free memory that no claim takes: for what is too small or too short-lived to be claimed."""


@attrs.define(eq=False)
class Claim:
    """Memory that somebody of ours may fill. Drawn from the ledger; `release` gives it back, and so does whatever drops
    it, for what was claimed is dropped with it."""

    purpose: str
    nbytes: int
    """What may be filled."""
    device: torch.device
    used: int = 0
    """What is filled so far, and therefore no longer measured as free. Kept by the owner."""
    held: bool = True
    """Whether it still counts."""

    def release(self) -> None:
        """Nothing of it is used any more. May be called twice."""
        self.held = False


class MemoryLedger:
    """Claims of this process, beside what is measured as free. Thread-safe."""

    def __init__(self) -> None:
        self._drawn: list[weakref.ref[Claim]] = []
        self._lock = threading.RLock()  # the garbage collector may drop who claims while a claim is being made

    def begin_child(self) -> None:
        """Right behind a fork, in the child: a thread of the parent that held the lock would never give it back."""
        self._lock = threading.RLock()

    def measure(self, device: torch.device) -> MemorySnapshot:
        """What is free now, less what was claimed and is not filled yet."""
        measured = measure_memory(device)
        host_free = max(measured.host_free - self._unfilled(_HOST), 0)
        device_free = host_free
        if is_accelerator(device):
            device_free = max(measured.device_free - self._unfilled(device), 0)
        return attrs.evolve(measured, host_free=host_free, device_free=device_free)

    def room(self, device: torch.device) -> int:
        """The largest claim that would be granted now, in bytes."""
        return max(self.measure(device).device_free - _HEADROOM, 0)

    def try_claim(self, purpose: str, nbytes: int, device: torch.device) -> Claim | None:
        """Room for `nbytes` on `device`, or `None` if so much is not free, or nobody can tell."""
        with suppress(MemoryLimitError):
            return self._claim(purpose, nbytes, device)
        return None

    def claim(self, purpose: str, nbytes: int, device: torch.device) -> Claim:
        """Room for `nbytes` on `device`.

        Raises:
            MemoryLimitError: so much is not free; the message names both sizes. Or nobody can tell what is.
        """
        claim = self._claim(purpose, nbytes, device)
        if claim is None:
            raise self._refusal(purpose, nbytes, device)
        return claim

    def _claim(self, purpose: str, nbytes: int, device: torch.device) -> Claim | None:
        with self._lock:
            if nbytes > self.room(device):
                return None
            claim = Claim(purpose, nbytes, device)
            self._drawn = [*map(weakref.ref, self._claims), weakref.ref(claim)]
            return claim

    def check(self, purpose: str, nbytes: int, device: torch.device) -> None:
        """Check that a claim would be granted now.

        Raises:
            MemoryLimitError: as `claim`.
        """
        if nbytes > self.room(device):
            raise self._refusal(purpose, nbytes, device)

    @property
    def _claims(self) -> list[Claim]:
        """Those that count."""
        return [claim for drawn in self._drawn if (claim := drawn()) is not None and claim.held]

    def _refusal(self, purpose: str, nbytes: int, device: torch.device) -> MemoryLimitError:
        free = self.measure(device).device_free
        return MemoryLimitError(
            f"{purpose} need {format_size(nbytes)} of memory on {device}, and of {format_size(free)} free "
            f"{format_size(_HEADROOM)} must stay so. Close other programs or caches, or raise this process's "
            "memory limit."
        )

    def _unfilled(self, device: torch.device) -> int:
        return sum(max(claim.nbytes - claim.used, 0) for claim in self._claims if claim.device == device)


ledger = MemoryLedger()
"""The one of this process."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=ledger.begin_child)


def measure_memory(device: torch.device) -> MemorySnapshot:
    """Total and free bytes now, on the host and on `device`, as the tightest limit allows; memory cgroups count.

    Raises:
        MemoryLimitError: the system does not say how much is free.
    """
    try:
        host = psutil.virtual_memory()
    except (OSError, KeyError, ValueError, psutil.Error) as error:  # no /proc, or no descriptor left for it
        raise MemoryLimitError(
            f"Cannot tell how much memory is free: {error}. /proc/meminfo must be there, and a file descriptor for it: "
            "close files, or raise the limit of open files (ulimit -n)."
        ) from error
    total, free = host.total, host.available
    for limit, used in _cgroup_limits():
        total, free = min(total, limit), min(free, max(limit - used, 0))
    device_total, device_free = total, free
    if is_accelerator(device):
        device_free, device_total = torch.cuda.mem_get_info(device)
    return MemorySnapshot(
        device_type=device.type,
        host_total=total,
        host_free=free,
        device_total=device_total,
        device_free=device_free,
    )


def _cgroup_limits() -> list[tuple[int, int]]:
    """Limit and unreclaimable use of every memory cgroup around this process, versions 1 and 2; its parents too."""
    limits = []
    for folder, limit_file, usage_file, cache_key in _cgroup_folders():
        limit, usage = _number(folder / limit_file), _number(folder / usage_file)
        if limit is not None and usage is not None:
            limits.append((limit, max(usage - _page_cache(folder, cache_key), 0)))
    return limits


def _cgroup_folders() -> list[tuple[Path, str, str, str]]:
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller, root, limit_file, usage_file, cache_key in _LAYOUTS:
            if controller not in controllers.split(","):
                continue
            top = _CGROUP_ROOT / root
            own = top / path.lstrip("/")
            # up to the mount itself, which is the limit inside a container: the path may be the host's there
            for folder in (own, *own.parents):
                if folder.is_relative_to(top):
                    found.append((folder, limit_file, usage_file, cache_key))
    return found


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" is no limit


def _page_cache(folder: Path, key: str) -> int:
    try:
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except (OSError, ValueError):
        return 0
    return 0
