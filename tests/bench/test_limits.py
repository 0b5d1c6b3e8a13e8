"""Memory groups, in folders that look like cgroups; and raw rates of a small file."""

from __future__ import annotations

import os

import pytest

from ollm.errors import ConfigurationError
from ollm_bench import limits, machine, rates


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Make a fake cgroup tree: `make(own, files)` says where this process is and what each new group holds."""
    root = tmp_path / "cgroup"
    root.mkdir()
    monkeypatch.setattr(limits, "CGROUP_ROOT", root)
    monkeypatch.setattr(limits, "OWN_GROUPS", tmp_path / "own")

    def make(own, folder, files):
        (tmp_path / "own").write_text(own)
        (root / folder).mkdir(parents=True, exist_ok=True)
        group = root / folder / f"ollm-bench-{os.getpid()}"
        group.mkdir()
        for name in files:
            (group / name).write_text("")
        return group

    return make


def test_version_1(cgroups):
    group = cgroups(
        "4:memory:/jobs/a\n0::/\n", "memory/jobs/a", ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
    )
    with limits.memory_group(2**30) as made:
        made.add(123)
        assert (group / "memory.limit_in_bytes").read_text() == str(2**30)
        assert (group / "memory.memsw.limit_in_bytes").read_text() == str(2**30)
        assert (group / "cgroup.procs").read_text() == "123"


def test_version_2_switches_the_controller_on_and_swap_off(cgroups):
    group = cgroups("0::/user\n", "user", ["memory.max", "memory.swap.max"])
    with limits.memory_group(2**30):
        assert (group / "memory.max").read_text() == str(2**30)
        assert (group / "memory.swap.max").read_text() == "0"
        assert (group.parent / "cgroup.subtree_control").read_text() == "+memory"


def test_a_group_goes_at_the_end(cgroups):
    group = cgroups("0::/user\n", "user", ["memory.max"])
    with limits.memory_group(2**30):
        (group / "memory.max").unlink()  # in a real tree, removing the folder is enough
    assert not group.exists()


@pytest.mark.parametrize("own", ["", "0::/user\n"])
def test_where_none_can_be_made_the_error_says_what_to_do(cgroups, own):
    cgroups(own, "user", [])
    with (
        pytest.raises(ConfigurationError, match=r"--memory-limit: no memory cgroup .* Run as root .*systemd-run"),
        limits.memory_group(2**30),
    ):
        pass


def test_no_limit_makes_no_group():
    with limits.memory_group(None) as group:
        assert group is None


def test_a_page_cache_that_cannot_be_dropped(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "DROP_CACHES", tmp_path / "missing" / "drop_caches")
    assert "run as root" in limits.drop_page_cache()
    monkeypatch.setattr(limits, "DROP_CACHES", tmp_path / "drop_caches")
    assert limits.drop_page_cache() == ""
    assert (tmp_path / "drop_caches").read_text() == "1"


@pytest.mark.parametrize("direct", [True, False])
def test_raw_rates_move_every_byte_and_leave_nothing(tmp_path, monkeypatch, direct):
    if not direct:
        monkeypatch.setattr(rates, "_takes_direct", lambda folder: False)
    with rates.RawDisk(tmp_path, 3 * rates.BLOCK) as disk:
        disk.read_all()
        disk.read_files([tmp_path / "raw-rate.bin"] * 2, 4 * rates.BLOCK)
        disk.write_some()
        found = disk.rates
    assert [sample.nbytes for sample in found.reads] == [3 * rates.BLOCK, 4 * rates.BLOCK]
    assert [sample.nbytes for sample in found.writes] == [3 * rates.BLOCK, rates.BLOCK]
    assert found.read > 0 and found.write > 0
    assert direct or not found.direct
    assert list(tmp_path.iterdir()) == []


def test_the_file_system_is_that_of_the_innermost_mount(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\ntmpfs {tmp_path} tmpfs rw 0 0\n/dev/b {tmp_path}/other xfs rw 0 0\n")
    monkeypatch.setattr(machine, "MOUNTS", mounts)
    assert machine.file_system(tmp_path) == "tmpfs"
    monkeypatch.setattr(machine, "MOUNTS", tmp_path / "missing")
    assert machine.file_system(tmp_path) == "unknown"
    found = machine.notes({"file_system": "tmpfs"}, [])
    assert "no disk was measured" in found[0]
