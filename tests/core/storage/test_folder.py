"""Private folders: who may see them, who owns them, and that nothing of them is left."""

from __future__ import annotations

import gc
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.storage.storage_fixtures import DIRECTORY, get, open_storage, process, put, tree
from ollm.errors import CacheBusyError, CacheDirectoryError, ConfigurationError, StorageError
from ollm.io import shim
from ollm.io.shim import Disk
from ollm.storage.folder import CacheFolder
from ollm.testing.processes import in_child

NOBODY = 65534
IS_ROOT = os.geteuid() == 0

OPEN_A_FOLDER = """
import sys
from pathlib import Path
from ollm.storage.folder import CacheFolder
folder = CacheFolder.open(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.readline()
folder.close()
"""

HOLD_A_FOLDER = """
import sys
from pathlib import Path
from ollm.storage.folder import CacheFolder
folder = CacheFolder.create(Path(sys.argv[1]), sys.argv[2])
print(folder.path, flush=True)
sys.stdin.readline()
folder.close()
"""

OPEN_AND_CLOSE_MANY = """
import sys
from pathlib import Path
from ollm.storage.folder import CacheFolder
print(flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    folder = CacheFolder.create(Path(sys.argv[1]), sys.argv[2])
    assert (folder.path / "lock").exists()
    folder.close()
print("done", flush=True)
"""


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that an unprivileged user may write to; pytest's own may not be entered by others."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def become_ordinary() -> None:
    """Root may do anything: tests of permissions run in a child that is somebody else."""
    if IS_ROOT:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o277, 0o777], ids=oct)
def test_folders_and_files_are_private_whatever_the_umask(open_to_all: Path, umask: int) -> None:
    def check() -> None:
        become_ordinary()
        os.umask(umask)
        with_record = open_storage(open_to_all)
        put(with_record, b"secret")
        second = open_storage(open_to_all)
        modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in open_to_all.rglob("*")}
        assert len(modes) == 10  # root, tag, lock; twice: folder, lock, manifest; one segment
        assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items()), modes
        with_record.close()
        second.close()
        assert tree(open_to_all) == []

    in_child(check)


def test_the_root_is_marked_as_a_cache(tmp_path: Path) -> None:
    held = CacheFolder.create(tmp_path, DIRECTORY)
    tag = (tmp_path / DIRECTORY / "CACHEDIR.TAG").read_bytes()
    assert tag.startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    held.close()


def test_the_folder_of_a_living_session_is_never_touched(tmp_path: Path) -> None:
    with process(HOLD_A_FOLDER, tmp_path, DIRECTORY) as other:
        held = Path(other.stdout.readline().strip())
        (held / "segment-000000.kv").write_bytes(b"theirs")
        before = {path: (path.lstat(), path.read_bytes()) for path in held.iterdir()}
        ours = open_storage(tmp_path)
        assert ours.path.parent == held.parent
        ours.close()
        assert {path: (path.lstat(), path.read_bytes()) for path in held.iterdir()} == before
        other.communicate("\n")
        assert other.returncode == 0
    assert tree(tmp_path) == []


def test_the_folder_of_a_killed_session_is_removed_when_the_next_one_is_made(tmp_path: Path) -> None:
    with process(HOLD_A_FOLDER, tmp_path, DIRECTORY) as other:
        dead = Path(other.stdout.readline().strip())
        (dead / "segment-000000.kv").write_bytes(b"left behind")
        other.kill()
    assert dead.is_dir()
    storage = open_storage(tmp_path)
    assert not dead.exists()
    storage.close()
    assert tree(tmp_path) == []


def test_two_processes_come_and_go_on_one_cache_dir(tmp_path: Path) -> None:
    with (
        process(OPEN_AND_CLOSE_MANY, tmp_path, DIRECTORY, 150) as one,
        process(OPEN_AND_CLOSE_MANY, tmp_path, DIRECTORY, 150) as two,
    ):
        for each in (one, two):
            each.stdout.readline()
        for each in (one, two):
            each.stdin.write("\n")
            each.stdin.flush()
        assert [each.communicate()[0] for each in (one, two)] == ["done\n", "done\n"]
    assert tree(tmp_path) == []


def test_nothing_is_left_after_close_and_closing_twice_is_allowed(tmp_path: Path) -> None:
    first, second = open_storage(tmp_path), open_storage(tmp_path)
    put(first, b"x")
    first.close()
    first.close()
    assert get(second, put(second, b"y")) == b"y"
    second.close()
    assert tree(tmp_path) == []
    assert tmp_path.is_dir()


def test_nothing_is_left_when_the_cache_is_just_dropped(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    put(storage, b"x")
    del storage
    gc.collect()
    assert tree(tmp_path) == []


def test_a_normal_exit_removes_all_and_that_of_a_forked_child_nothing(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from core.storage.storage_fixtures import get, open_storage, put
storage = open_storage(Path(sys.argv[1]))
extent = put(storage, b"x")
child = os.fork()
if child == 0:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert get(storage, extent) == b"x"
print(*sorted(path.name for path in storage.path.iterdir()))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "lock manifest.json segment-000000.kv\n"
    assert tree(tmp_path) == []


@pytest.mark.parametrize("removed", [".", DIRECTORY], ids=["cache_dir", "root"])
def test_a_folder_removed_while_in_use_is_a_typed_error(tmp_path: Path, removed: str) -> None:
    storage = open_storage(tmp_path / "cache")
    extent = put(storage, b"x")
    shutil.rmtree(tmp_path / "cache" / removed)
    for segment in (0, 1):
        with pytest.raises(StorageError, match="removed while the cache was in use"):
            put(storage, b"y", segment=segment)
    assert get(storage, extent) == b"x"
    storage.close()


def test_a_file_in_the_place_of_the_cache_dir_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    for cache_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CacheDirectoryError, match="Cannot use"):
            CacheFolder.create(cache_dir, DIRECTORY)
    assert (tmp_path / "file").read_bytes() == b"precious"


@pytest.mark.skipif(not IS_ROOT, reason="needs root to give a folder to somebody else")
def test_a_cache_dir_that_one_may_not_write_to_is_a_typed_error(open_to_all: Path) -> None:
    def check() -> None:
        become_ordinary()
        with pytest.raises(CacheDirectoryError, match="Permission denied"):
            CacheFolder.create(open_to_all, DIRECTORY)

    open_to_all.chmod(0o755)
    in_child(check)
    assert tree(open_to_all) == []


def test_a_read_only_file_system_is_a_typed_error(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from ollm.errors import CacheDirectoryError
from ollm.storage.folder import CacheFolder
try:
    CacheFolder.create(Path(sys.argv[1]), sys.argv[2])
except CacheDirectoryError as error:
    print(error)
"""
    mounted = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 77; exec "$3" -c "$4" "$1" "$2"'
    command = ["unshare", "--mount", "sh", "-c", mounted, "sh", str(tmp_path), DIRECTORY, sys.executable, script]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode in (1, 77):
        pytest.skip(f"may not mount here: {done.stderr.strip()}")
    assert "Read-only file system" in done.stdout, done.stderr


def test_a_folder_that_is_kept_stays_with_all_that_is_in_it(tmp_path: Path) -> None:
    folder = CacheFolder.create(tmp_path, DIRECTORY, keep=True)
    assert re.fullmatch("entry-[0-9a-f]{16}", folder.path.name)
    assert (folder.is_new, folder.kept) == (True, True)
    with open(folder.open_file("store-mine"), "wb") as file:
        file.write(b"kept")
    folder.close()
    folder.close()
    before = tree(tmp_path)
    again = CacheFolder.open(folder.path)
    assert (again.path, again.is_new, again.kept) == (folder.path, False, True)
    with open(again.open_file("store-mine", make=False), "rb") as file:
        assert file.read() == b"kept"
    again.close()
    assert tree(tmp_path) == before
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.lstat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_a_folder_that_is_kept_is_kept_by_whoever_comes_and_goes_beside_it(tmp_path: Path) -> None:
    """Its owner is gone, as that of a dead session is."""
    kept = CacheFolder.create(tmp_path, DIRECTORY, keep=True)
    kept.close()
    before = tree(tmp_path)
    for keep in (False, False, True):
        CacheFolder.create(tmp_path, DIRECTORY, keep=keep).close()
    assert set(before) <= set(tree(tmp_path))
    assert sum(name.count("/") == 1 and "/entry-" in name for name in tree(tmp_path)) == 2
    assert not any("/run-" in name for name in tree(tmp_path))


def test_a_kept_folder_that_is_dropped_is_closed_and_kept(tmp_path: Path) -> None:
    folder = CacheFolder.create(tmp_path, DIRECTORY, keep=True)
    path = folder.path
    del folder
    gc.collect()
    CacheFolder.open(path).close()


def test_a_kept_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    made = CacheFolder.create(tmp_path, DIRECTORY, keep=True)
    with pytest.raises(CacheBusyError, match=f"{made.path.name} is in use by another cache"):
        CacheFolder.open(made.path)
    made.close()
    opened = CacheFolder.open(made.path)
    with pytest.raises(CacheBusyError):
        CacheFolder.open(made.path)
    opened.close()
    with process(OPEN_A_FOLDER, made.path) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(CacheBusyError):
            CacheFolder.open(made.path)
        other.kill()
        other.wait()
    CacheFolder.open(made.path).close()


def test_a_folder_that_was_not_to_be_kept_cannot_be_opened(tmp_path: Path) -> None:
    """It would be taken for one that is kept, and removed by whoever comes next."""
    with process(HOLD_A_FOLDER, tmp_path, DIRECTORY) as other:
        dead = Path(other.stdout.readline().strip())
        other.kill()
    with pytest.raises(CacheDirectoryError, match=r"run-\w+ is no folder that is kept"):
        CacheFolder.open(dead)
    assert tree(dead) == ["lock"]


def test_a_new_folder_that_is_given_up_is_removed_also_if_it_was_to_be_kept(tmp_path: Path) -> None:
    for keep in (False, True):
        folder = CacheFolder.create(tmp_path, DIRECTORY, keep=keep)
        folder.give_up()
        folder.give_up()
        folder.close()
        assert tree(tmp_path) == []
    made = CacheFolder.create(tmp_path, DIRECTORY, keep=True)
    made.close()
    made.give_up()  # too late: it was closed
    CacheFolder.open(made.path).give_up()  # not new
    assert made.path.is_dir()


def test_the_name_of_a_folder_that_is_kept_is_on_the_medium_and_those_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a durable commit in it may not be found after the power was cut."""
    synced: list[Path] = []

    class Watching(Disk):
        def fsync_folder(self, path: Path) -> None:
            assert path.is_dir()
            synced.append(path)
            super().fsync_folder(path)

    monkeypatch.setattr(shim, "disk", Watching())
    cache_dir = tmp_path / "new" / "cache"
    CacheFolder.create(cache_dir, DIRECTORY).close()
    assert synced == [], "not asked for, not done"
    shutil.rmtree(tmp_path / "new")
    kept = CacheFolder.create(cache_dir, DIRECTORY, keep=True)
    assert set(synced) == {kept.path.parent, cache_dir, tmp_path / "new", tmp_path}
    kept.close()
    synced.clear()
    CacheFolder.create(cache_dir, DIRECTORY, keep=True).close()
    assert set(synced) == {kept.path.parent, cache_dir}, "whoever made them may not have synced them"


@pytest.mark.parametrize("umask", [0o000, 0o777], ids=oct)
def test_a_cache_dir_that_is_made_is_private_whatever_the_umask_and_one_that_is_there_stays_as_it_is(
    open_to_all: Path, umask: int
) -> None:
    def check() -> None:
        become_ordinary()
        os.umask(umask)
        for cache_dir in (open_to_all / "new" / "cache", open_to_all):
            CacheFolder.create(cache_dir, DIRECTORY).close()
        modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in open_to_all.rglob("*")}
        assert modes == {"new": 0o700, "cache": 0o700}
        assert stat.S_IMODE(open_to_all.lstat().st_mode) == 0o777

    in_child(check)


def test_an_attempt_to_open_a_busy_folder_leaves_no_file_open(tmp_path: Path) -> None:
    made = CacheFolder.create(tmp_path, DIRECTORY, keep=True)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(CacheBusyError):
            CacheFolder.open(made.path)
    assert len(os.listdir("/proc/self/fd")) == before
    made.close()


def test_a_forked_child_does_not_give_up_the_lock_of_its_parent(tmp_path: Path) -> None:
    made = CacheFolder.create(tmp_path, DIRECTORY, keep=True)
    in_child(made.close)
    with pytest.raises(CacheBusyError):
        CacheFolder.open(made.path)
    made.close()


@pytest.mark.parametrize("missing", [".", "lock"])
def test_a_folder_that_is_not_there_cannot_be_opened(tmp_path: Path, missing: str) -> None:
    made = CacheFolder.create(tmp_path, DIRECTORY, keep=True)
    made.close()
    shutil.rmtree(made.path) if missing == "." else (made.path / missing).unlink()
    with pytest.raises(CacheDirectoryError, match="Cannot use"):
        CacheFolder.open(made.path)
    assert missing == "." or tree(made.path) == [], "and nothing is made there"


def test_files_of_segments_that_are_not_used_are_removed_and_no_others(tmp_path: Path) -> None:
    folder = CacheFolder.create(tmp_path, DIRECTORY, keep=True)
    names = ["segment-000000.kv", "segment-000001.kv", "segment-999999.kv", "store-segment-000001.kv", "manifest.json"]
    for name in names:
        os.close(folder.open_file(name))
    (folder.path / "segment-1.kv").touch()
    folder.remove_segments(keep=[0])
    assert set(tree(folder.path)) == {"lock", "segment-1.kv", *names} - {"segment-000001.kv", "segment-999999.kv"}
    with pytest.raises(ConfigurationError, match="out of range"):
        folder.remove_segments(keep=[10**6])
    folder.close()


def test_a_manifest_is_read_up_to_a_length(tmp_path: Path) -> None:
    folder = CacheFolder.create(tmp_path, DIRECTORY, keep=True)
    folder.replace_manifest(b"first", durable=False)
    folder.replace_manifest(b"the second one", durable=True)
    assert folder.read_manifest(100) == b"the second one"
    assert folder.read_manifest(5) == b"the s"
    assert sorted(tree(folder.path)) == ["lock", "manifest.json"]
    (folder.path / "manifest.json.tmp").write_bytes(b"what an interrupted attempt left, and longer than the next one")
    folder.replace_manifest(b"third", durable=False)
    assert folder.read_manifest(100) == b"third"
    folder.close()
