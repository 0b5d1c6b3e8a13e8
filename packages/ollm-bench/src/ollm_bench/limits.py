"""Memory cgroups for the processes of cases, and dropping the page cache: both where root may. Starts no process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ollm.plugin import ConfigurationError

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def drop_page_cache() -> str:
    """Make the kernel forget cached file contents. Returns why it could not; empty if it did."""
    try:
        DROP_CACHES.write_text("1")
    except OSError as error:
        return f"{DROP_CACHES}: {error.strerror}; run as root to have it dropped"
    return ""


class MemoryGroup:
    """A cgroup with a memory limit that processes can be put into."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, pid: int) -> None:
        """Move a process, whose future memory then counts."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        """Delete the group. All its processes must have ended; what is left of an unusual one does no harm."""
        with suppress(OSError):
            self._folder.rmdir()


@contextmanager
def memory_group(limit: int | None) -> Iterator[MemoryGroup | None]:
    """A new group while the `with` block runs; `None` without a limit.

    Raises:
        ConfigurationError: where this user or this system can make none.
    """
    if limit is None:
        yield None
        return
    group = _make_group(limit)
    try:
        yield group
    finally:
        group.remove()


def _make_group(limit: int) -> MemoryGroup:
    problem = "no memory cgroup is mounted at /sys/fs/cgroup"
    for parent, version in _parents():
        folder = parent / f"ollm-bench-{os.getpid()}"
        try:
            if version == 2:
                with suppress(OSError):  # it may be on already, and not ours to switch
                    (parent / "cgroup.subtree_control").write_text("+memory")
            folder.mkdir(exist_ok=True)
            _set_limit(folder, version, limit)
        except OSError as error:
            problem = f"{folder}: {error.strerror or error}"
            with suppress(OSError):
                folder.rmdir()
            continue
        return MemoryGroup(folder)
    raise ConfigurationError(
        f"--memory-limit: no memory cgroup could be made ({problem}). Run as root on a system with cgroups, or leave "
        "the option away and start the command inside a limit, such as "
        f"'systemd-run --user --scope -p MemoryMax={limit} ollm bench …'."
    )


def _set_limit(folder: Path, version: int, limit: int) -> None:
    """Without swap, which would turn a refusal of memory into a benchmark of swapping."""
    name, swap, swap_limit = {
        1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", limit),
        2: ("memory.max", "memory.swap.max", 0),
    }[version]
    if not (folder / name).exists():
        raise OSError(f"has no {name}")
    (folder / name).write_text(str(limit))
    if (folder / swap).exists():
        with suppress(OSError):
            (folder / swap).write_text(str(swap_limit))


def _parents() -> Iterator[tuple[Path, int]]:
    """Folders to try, with the cgroup version: the own group first, then those around it up to the mount."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, version = CGROUP_ROOT / "memory", 1
        elif not controllers:
            top, version = CGROUP_ROOT, 2
        else:
            continue
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top) and folder.is_dir():
                yield folder, version
