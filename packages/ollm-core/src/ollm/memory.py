"""How much memory there is and how much is free, on the host (cgroup limits included) and on the device."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from ollm.contracts.spill import MemorySnapshot

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
# (controller of v1 or "" for v2, folder, limit, usage, name of the reclaimable page cache in memory.stat)
_LAYOUTS = (
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ("", "", "memory.max", "memory.current", "inactive_file"),
)


def measure_memory(device: torch.device) -> MemorySnapshot:
    """Total and free bytes now, as the tightest limit allows."""
    host = psutil.virtual_memory()
    total, free = host.total, host.available
    for limit, used in _cgroup_limits():
        total, free = min(total, limit), min(free, max(limit - used, 0))
    device_total, device_free = total, free
    if device.type == "cuda":
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
