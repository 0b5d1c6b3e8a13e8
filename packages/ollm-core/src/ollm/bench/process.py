"""The memory of this process, and a limit on it that the system enforces."""

from __future__ import annotations

import os
import resource
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from ollm.errors import ConfigurationError

CGROUP_ROOT = Path("/sys/fs/cgroup")
_LAYOUTS = (("memory", "memory.limit_in_bytes"), (".", "memory.max"))


class Peak:
    """The highest resident size since the last `start`, above a base."""

    def __init__(self) -> None:
        """The base is what the process takes now."""
        self._base = psutil.Process().memory_info().rss

    def start(self) -> None:
        """Forget earlier peaks, where the system can; elsewhere the peak is that of the whole process."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def above_base(self) -> int:
        """Bytes."""
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            high = int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024
        except (OSError, StopIteration):
            high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(high - self._base, 0)


@contextmanager
def memory_cgroup(limit: int, root: Path = CGROUP_ROOT) -> Iterator[Path]:
    """A new memory control group (version 1 or 2) with a limit in bytes, removed at the end.

    Raises:
        ConfigurationError: it cannot be made here; the message says what to do instead.
    """
    for controller, limit_file in _LAYOUTS:
        top = root / controller
        if not (top / "cgroup.procs").exists() or (controller == "." and not _delegates_memory(top)):
            continue
        group = top / f"ollm-bench-{secrets.token_hex(4)}"
        try:
            group.mkdir()
            (group / limit_file).write_text(str(limit))
        except OSError:
            with suppress(OSError):
                group.rmdir()
            continue
        try:
            yield group
        finally:
            with suppress(OSError):
                group.rmdir()
        return
    raise ConfigurationError(
        f"--memory-limit: no memory control group can be made below {root}. Run as root, or put a limit around the "
        "whole command: systemd-run --user --scope -p MemoryMax=2G ollm bench kv …"
    )


def join(group: Path) -> None:
    """Put this process into a control group."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _delegates_memory(top: Path) -> bool:
    """Whether groups below it have a memory controller (version 2)."""
    with suppress(OSError):
        return "memory" in (top / "cgroup.subtree_control").read_text().split()
    return False
