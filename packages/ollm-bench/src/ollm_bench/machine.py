"""What a result must say of the machine and the software that it was measured with."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from ollm_bench.records import Outcome

MOUNTS = Path("/proc/mounts")
CPUINFO = Path("/proc/cpuinfo")
IN_MEMORY = ("tmpfs", "ramfs")
"""File systems that are no disk."""

_NAMED = ("ollm-core", "torch", "transformers", "safetensors")


def describe_machine(folder: Path) -> dict[str, Any]:
    """The machine, with the file system that holds `folder`."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "file_system": file_system(folder),
        "kernel": f"{platform.system()} {platform.release()}",
    }


def describe_versions() -> dict[str, str]:
    """Python and the distributions that matter, ollm's plugins among them."""
    plugins = (point.dist for point in metadata.entry_points(group="ollm"))
    found = {dist.name: dist.version for dist in (*map(metadata.distribution, _NAMED), *plugins) if dist}
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


def file_system(folder: Path) -> str:
    """The type of the file system, such as `ext4`; `unknown` where the system does not say."""
    best, kind = Path("/"), "unknown"
    try:
        lines = MOUNTS.read_text().splitlines()
    except OSError:
        return kind
    for line in lines:
        _, mounted, found, *_ = line.split()
        place = Path(mounted.encode().decode("unicode_escape"))
        if folder.resolve().is_relative_to(place) and place.is_relative_to(best):
            best, kind = place, found  # of two at one place, the later one hides the other
    return kind


def _cpu_model() -> str:
    try:
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def notes(machine: dict[str, Any], outcomes: Sequence[Outcome[Any, Any]]) -> list[str]:
    """What a reader must know before believing the numbers: everything that could not be done here."""
    found = []
    if machine["file_system"] in IN_MEMORY:
        found.append(f"{machine['file_system']} is in memory, so no disk was measured: choose another --cache-dir")
    measured = [outcome.measured for outcome in outcomes if outcome.measured]
    found += sorted({f"page cache {one.page_cache}" for one in measured if one.page_cache.startswith("not")})
    if any(one.rates and not one.rates.direct for one in measured):
        found.append("O_DIRECT is refused here: raw rates go through the kernel's cache, which was told to forget")
    tensor = [outcome.case.label for outcome in outcomes if outcome.measured and outcome.measured.mode == "tensor"]
    if tensor:
        found.append(f"tensor mode, because this model does not take blocks: {'; '.join(dict.fromkeys(tensor))}")
    return found
