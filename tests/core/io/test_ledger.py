"""Free memory is what the tightest limit leaves: the machine's, or that of a cgroup of either version."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from ollm.errors import MemoryLimitError
from ollm.io import ledger as module
from ollm.testing.processes import watchdog

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
        monkeypatch.setattr(module, "_CGROUP_ROOT", root)
        monkeypatch.setattr(module, "_OWN_GROUPS", tmp_path / "self")
        return module.measure_memory(torch.device("cpu"))

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


def test_the_unlimited_of_version_1_is_no_limit(cgroup):
    """The largest number of pages, in bytes."""
    found = cgroup(
        ["4:memory:/"],
        {"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/memory.usage_in_bytes": 40 * GIB},
    )
    assert (found.host_total, found.host_free) == (64 * GIB, 48 * GIB)


def test_groups_of_other_controllers_limit_nothing(cgroup):
    """Also one whose name contains `memory`."""
    found = cgroup(
        ["3:pids:/job", "1:name=memory:/job"],
        {
            "job/memory.max": GIB,
            "job/memory.current": 0,
            "memory/job/memory.limit_in_bytes": GIB,
            "memory/job/memory.usage_in_bytes": 0,
        },
    )
    assert found.host_total == 64 * GIB


def test_nothing_outside_the_mount_is_read(cgroup, tmp_path):
    (tmp_path / "memory.max").write_text(f"{GIB}")
    (tmp_path / "memory.current").write_text("0")
    assert cgroup(["0::/job"], {}).host_total == 64 * GIB


def test_the_tightest_of_all_limits_counts(cgroup):
    """Total and free may come from different groups."""
    found = cgroup(
        ["0::/user/job"],
        {
            "user/memory.max": 8 * GIB,
            "user/memory.current": 7 * GIB,
            "user/job/memory.max": 4 * GIB,
            "user/job/memory.current": GIB,
        },
    )
    assert (found.host_total, found.host_free) == (4 * GIB, GIB)


def test_a_machine_fuller_than_its_groups_counts_itself(cgroup, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", type("svmem", (), {"total": 64 * GIB, "available": GIB}))
    assert cgroup(["0::/"], {"memory.max": 8 * GIB, "memory.current": GIB}).host_free == GIB


@pytest.mark.parametrize("odd", ["", "much", "-1"])
def test_files_that_say_nothing_limit_nothing(cgroup, odd):
    found = cgroup(["0::/"], {"memory.max": odd, "memory.current": odd, "memory.stat": odd})
    assert (found.host_total, found.host_free) == (64 * GIB, 48 * GIB)


def test_page_cache_that_cannot_be_read_counts_as_used(cgroup):
    found = cgroup(["0::/"], {"memory.max": 4 * GIB, "memory.current": 3 * GIB, "memory.stat": "inactive_file lots"})
    assert found.host_free == GIB


def test_without_a_proc_the_machine_counts(cgroup, monkeypatch, tmp_path):
    cgroup(["0::/"], {"memory.max": GIB, "memory.current": 0})
    monkeypatch.setattr(module, "_OWN_GROUPS", tmp_path / "missing")
    assert module.measure_memory(torch.device("cpu")).host_total == 64 * GIB


def test_a_cuda_device_is_asked_for_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 80 * GIB))
    found = module.measure_memory(torch.device("cuda", 0))
    assert (found.device_type, found.device_free, found.device_total) == ("cuda", 3 * GIB, 80 * GIB)
    assert found.host_total <= 64 * GIB


def test_inside_a_container_the_mount_itself_is_the_limit(cgroup):
    """`/proc/self/cgroup` names the host's path, which does not exist below the container's mount."""
    found = cgroup(["0::/host/docker/abc"], {"memory.max": GIB, "memory.current": 0})
    assert (found.host_total, found.host_free) == (GIB, GIB)


def test_a_group_over_its_limit_has_nothing_free(cgroup):
    assert cgroup(["0::/"], {"memory.max": GIB, "memory.current": 2 * GIB}).host_free == 0


CPU = torch.device("cpu")


def test_what_is_claimed_and_not_filled_is_not_free(cgroup):
    cgroup([], {})
    ledger = module.MemoryLedger()
    claim = ledger.claim("buffers", 10 * GIB, CPU)
    assert ledger.measure(CPU).host_free == ledger.measure(CPU).device_free == 38 * GIB
    claim.used = 4 * GIB  # which the machine then measures as taken
    assert ledger.measure(CPU).host_free == 42 * GIB
    claim.used = 11 * GIB
    assert ledger.measure(CPU).host_free == 48 * GIB
    claim.release()
    claim.release()
    assert ledger.measure(CPU).host_free == 48 * GIB


def test_a_claim_beyond_what_is_free_is_refused_with_both_sizes(cgroup):
    cgroup(["0::/"], {"memory.max": 2 * GIB, "memory.current": GIB, "memory.stat": ""})
    ledger = module.MemoryLedger()
    assert ledger.try_claim("pieces", GIB, CPU) is None, "some headroom stays"
    first = ledger.claim("Read buffers", GIB // 2, CPU)
    with pytest.raises(
        MemoryLimitError, match=r"Write buffers need 512\.0 MiB of memory on cpu, and of 512\.0 MiB free"
    ):
        ledger.claim("Write buffers", GIB // 2, CPU)
    first.release()
    ledger.claim("Write buffers", GIB // 2, CPU)


def test_claims_from_many_threads_never_exceed_what_is_free(cgroup):
    cgroup([], {})
    ledger = module.MemoryLedger()
    with ThreadPoolExecutor(8) as threads:
        claims = list(threads.map(lambda _: ledger.try_claim("pieces", GIB, CPU), range(100)))
    assert sum(claim is not None for claim in claims) == 47


def test_what_is_claimed_on_one_device_is_free_on_the_others(cgroup, monkeypatch):
    cgroup([], {})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * GIB, 80 * GIB))
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    ledger = module.MemoryLedger()
    held = ledger.claim("weights", 6 * GIB, first)
    assert ledger.measure(first).device_free == 2 * GIB
    assert ledger.measure(second).device_free == 8 * GIB
    assert ledger.measure(first).host_free == 48 * GIB
    with pytest.raises(MemoryLimitError, match=r"need 6\.0 GiB of memory on cuda:0, and of 2\.0 GiB free"):
        ledger.claim("weights", 6 * GIB, first)
    assert ledger.claim("weights", 6 * GIB, second).device != held.device


def test_a_claim_may_be_released_while_another_one_is_made(monkeypatch):
    """As the garbage collector does, at any moment and in any thread."""
    ledger, device = module.MemoryLedger(), torch.device("cpu")
    first = ledger.claim("first", GIB, device)
    measure = module.measure_memory

    def collect(device):
        first.release()
        return measure(device)

    monkeypatch.setattr(module, "measure_memory", collect)
    with watchdog(10):
        second = ledger.claim("second", 2 * GIB, device)
    assert ledger._claims == [second]


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file"), OSError(24, "Too many open files"), KeyError()]
)
def test_where_nobody_can_tell_what_is_free_that_is_said_and_nothing_is_claimed(monkeypatch, error):
    """No `/proc/meminfo`, or no descriptor for it."""

    def fails():
        raise error

    ledger = module.MemoryLedger()
    monkeypatch.setattr(psutil, "virtual_memory", fails)
    for ask in (
        ledger.measure,
        lambda device: ledger.claim("Buffers", 1, device),
        lambda device: ledger.check("x", 1, device),
    ):
        with pytest.raises(MemoryLimitError, match="Cannot tell how much memory is free"):
            ask(torch.device("cpu"))
    assert ledger.try_claim("what is kept where there is room", 1, torch.device("cpu")) is None
