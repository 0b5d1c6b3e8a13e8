"""Free memory is what the tightest limit leaves: the machine's, or that of a cgroup of either version."""

from __future__ import annotations

import psutil
import pytest
import torch

from ollm import memory

GIB = 2**30


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """`cgroup(lines, files)`: what `/proc/self/cgroup` says, and the files below `/sys/fs/cgroup`."""

    def build(lines, files):
        root = tmp_path / "cgroup"
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{text}\n")
        (tmp_path / "self").write_text("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(memory, "_CGROUP_ROOT", root)
        monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "self")
        return memory.measure_memory(torch.device("cpu"))

    return build


@pytest.fixture(autouse=True)
def a_machine_of_64_gib(monkeypatch):
    machine = type("svmem", (), {"total": 64 * GIB, "available": 48 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", machine)


def test_without_cgroups_the_machine_counts(cgroup):
    found = cgroup([], {})
    assert (found.host_total, found.host_free) == (64 * GIB, 48 * GIB)
    assert (found.device_total, found.device_free, found.device_type) == (64 * GIB, 48 * GIB, "cpu")


def test_a_limit_of_version_2_and_its_page_cache(cgroup):
    found = cgroup(
        ["0::/user/job"],
        {
            "user/job/memory.max": 4 * GIB,
            "user/job/memory.current": 3 * GIB,
            "user/job/memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}",
        },
    )
    assert (found.host_total, found.host_free) == (4 * GIB, 3 * GIB)


def test_the_limit_of_a_parent_counts(cgroup):
    found = cgroup(
        ["0::/user/job"],
        {
            "user/memory.max": 2 * GIB,
            "user/memory.current": GIB,
            "user/job/memory.max": "max",
            "user/job/memory.current": GIB,
        },
    )
    assert (found.host_total, found.host_free) == (2 * GIB, GIB)


def test_a_limit_of_version_1_beside_other_controllers(cgroup):
    found = cgroup(
        ["5:cpu,cpuacct:/x", "4:memory:/job", "0::/x"],
        {
            "memory/job/memory.limit_in_bytes": 8 * GIB,
            "memory/job/memory.usage_in_bytes": 5 * GIB,
            "memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}",
        },
    )
    assert (found.host_total, found.host_free) == (8 * GIB, 4 * GIB)


def test_inside_a_container_the_mount_itself_is_the_limit(cgroup):
    """`/proc/self/cgroup` names the host's path, which does not exist below the container's mount."""
    found = cgroup(["0::/host/docker/abc"], {"memory.max": GIB, "memory.current": 0})
    assert (found.host_total, found.host_free) == (GIB, GIB)


def test_a_group_over_its_limit_has_nothing_free(cgroup):
    assert cgroup(["0::/"], {"memory.max": GIB, "memory.current": 2 * GIB}).host_free == 0
