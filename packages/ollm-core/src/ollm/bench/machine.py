"""Which machine this is, for a record of what was measured on it."""

from __future__ import annotations

import datetime
import platform
import sys
from pathlib import Path
from typing import Any

import importlib_metadata
import psutil


def describe_machine(folder: Path) -> dict[str, Any]:
    """Processor, memory, file system of `folder`, versions, date and command, as JSON."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["ollm", *sys.argv[1:]]),
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "file_system": _file_system(folder),
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib_metadata.version(name) for name in ("ollm-core", "torch", "transformers")},
        },
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _file_system(folder: Path) -> str:
    """Of the longest mount point above `folder`."""
    around = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    return max(around, key=lambda part: len(part.mountpoint)).fstype if around else "unknown"
