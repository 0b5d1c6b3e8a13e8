"""The peak memory of this process while something runs, and what it read from disks. Knows how Linux counts, and what
to do elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_IO = Path("/proc/self/io")
_RESET_PEAK = "5"


class PeakMemory:
    """Measures peaks above what the process had when this was made."""

    def __init__(self) -> None:
        self._base = psutil.Process().memory_info().rss
        self.resettable = self._reset()

    @property
    def method(self) -> str:
        """How it is measured, for the report."""
        if self.resettable:
            return "VmHWM, reset before each window"
        return "ru_maxrss, which cannot be reset: the peak since the process began"

    @contextmanager
    def window(self, peaks: list[int]) -> Iterator[None]:
        """Append the peak of what runs in the `with` block."""
        self._reset()
        yield
        peaks.append(max(self._peak() - self._base, 0))

    def _reset(self) -> bool:
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            return False
        return True

    def _peak(self) -> int:
        if self.resettable:
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def disk_bytes_read() -> int:
    """What the kernel read from disks for this process so far, mapped pages included; 0 where it does not say."""
    try:
        lines = _IO.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), 0)
