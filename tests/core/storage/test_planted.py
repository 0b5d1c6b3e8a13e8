"""Things that somebody else put where ollm keeps its folders: refused or left alone, never followed, never changed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from core.storage.storage_fixtures import DIRECTORY, commit, open_storage, put, reopen, tree
from ollm.contracts.blocks import Extent
from ollm.errors import CacheDirectoryError, StorageError
from ollm.storage.folder import CacheFolder
from ollm.storage.segments import SegmentedStorage
from ollm.testing.processes import in_child

RUN = "run-0123456789abcdef"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files to somebody else")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A private root, as another session left it."""
    root = tmp_path / "cache" / DIRECTORY
    root.mkdir(mode=0o700, parents=True)
    return root


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of the user's that looks like ours: following a link into it would delete all of it."""
    victim = tmp_path / "victim"
    (victim / RUN).mkdir(mode=0o700, parents=True)
    for name in ("lock", "CACHEDIR.TAG", f"{RUN}/lock", f"{RUN}/segment-000000.kv"):
        (victim / name).write_bytes(b"precious")
    return victim


def create(root: Path) -> CacheFolder:
    return CacheFolder.create(root.parent, root.name)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_refused(root: Path, problem: str) -> None:
    with pytest.raises(CacheDirectoryError, match=problem):
        create(root)


def assert_left_alone(root: Path, planted: str, caplog: pytest.LogCaptureFixture) -> None:
    """A session comes and goes, and says that it left something."""
    before = tree(root)
    with caplog.at_level(logging.WARNING, "ollm"):
        create(root).close()
    assert planted in caplog.text
    assert set(tree(root)) - {"lock", "CACHEDIR.TAG"} == set(before)


def test_a_link_in_the_place_of_the_root_is_refused(root: Path, victim: Path) -> None:
    before = contents(victim)
    root.rmdir()
    root.symlink_to(victim)
    assert_refused(root, "is a symbolic link")
    assert contents(victim) == before


@pytest.mark.parametrize("kind", ["file", "FIFO"])
def test_anything_but_a_folder_in_the_place_of_the_root_is_refused(root: Path, kind: str) -> None:
    root.rmdir()
    root.touch() if kind == "file" else os.mkfifo(root)
    assert_refused(root, "is not a folder")
    assert root.exists()


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777], ids=oct)
def test_a_root_that_others_may_write_to_is_refused(root: Path, mode: int) -> None:
    root.chmod(mode)
    assert_refused(root, f"may be written by others \\(mode {mode:04o}\\)")
    assert tree(root) == []


@needs_root
def test_a_root_of_another_user_is_refused(root: Path) -> None:
    os.chown(root, 65534, 65534)
    assert_refused(root, "belongs to another user")
    assert tree(root) == []


def test_a_link_in_the_place_of_the_lock_is_refused(root: Path, victim: Path) -> None:
    before = contents(victim)
    (root / "lock").symlink_to(victim / "lock")
    assert_refused(root, "is a symbolic link")
    (root / "lock").unlink()
    (root / "lock").symlink_to(victim / "new")
    assert_refused(root, "is a symbolic link")
    assert contents(victim) == before


def test_a_lock_with_a_second_name_is_refused_at_once_and_not_changed(root: Path, victim: Path) -> None:
    (victim / "lock").chmod(0o644)
    before = contents(victim)
    (root / "lock").hardlink_to(victim / "lock")
    assert_refused(root, "plain file with one name")
    assert contents(victim) == before


def test_a_fifo_in_the_place_of_the_lock_is_refused_and_not_waited_for(root: Path) -> None:
    os.mkfifo(root / "lock", 0o600)
    assert_refused(root, "plain file with one name")


@needs_root
def test_a_lock_of_another_user_is_refused(root: Path) -> None:
    (root / "lock").touch()
    os.chown(root / "lock", 65534, 65534)
    assert_refused(root, "belongs to another user")


def test_a_link_in_the_place_of_the_tag_is_not_written_through(root: Path, victim: Path) -> None:
    (root / "CACHEDIR.TAG").symlink_to(victim / "new")
    before = contents(victim)
    assert_refused(root, "File exists")
    assert contents(victim) == before


def test_a_link_named_like_a_session_is_left_alone(root: Path, victim: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = contents(victim)
    (root / RUN).symlink_to(victim / RUN)
    assert_left_alone(root, RUN, caplog)
    assert contents(victim) == before


def test_a_fifo_named_like_a_session_is_left_alone(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(root / RUN)
    assert_left_alone(root, RUN, caplog)


@pytest.mark.parametrize("change", [pytest.param("owner", marks=needs_root), "mode"])
def test_a_session_folder_that_is_not_private_is_left_alone(
    root: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    (root / RUN).mkdir(mode=0o700)
    (root / RUN / "segment-000000.kv").write_bytes(b"?")
    os.chown(root / RUN, 65534, 65534) if change == "owner" else (root / RUN).chmod(0o770)
    assert_left_alone(root, RUN, caplog)


def test_a_link_in_the_place_of_a_sessions_lock_leaves_the_session_alone(
    root: Path, victim: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(victim)
    (root / RUN).mkdir(mode=0o700)
    (root / RUN / "lock").symlink_to(victim / "lock")
    assert_left_alone(root, RUN, caplog)
    assert contents(victim) == before


def test_links_inside_a_dead_session_go_and_what_they_name_stays(root: Path, victim: Path) -> None:
    before = contents(victim)
    (root / RUN).mkdir(mode=0o700)
    (root / RUN / "lock").hardlink_to(victim / "lock")
    (root / RUN / "manifest.json").symlink_to(victim / RUN / "lock")
    (root / RUN / "segment-000000.kv").symlink_to(victim / RUN)
    os.mkfifo(root / RUN / "segment-000001.kv")
    create(root).close()
    assert not root.exists()
    assert contents(victim) == before


def test_unknown_files_of_a_dead_session_are_left_alone(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    unknown = ["notes.txt", "segment-1.kv", "segment-000000.kv.bak", "manifest.json~", ".lock", "Lock"]
    (root / RUN).mkdir(mode=0o700)
    for name in [*unknown, "lock", "manifest.json", "manifest.json.tmp", "segment-000000.kv", "segment-999999.kv"]:
        (root / RUN / name).touch()
    with caplog.at_level(logging.WARNING, "ollm"):
        create(root).close()
    assert sorted(path.name for path in (root / RUN).iterdir()) == sorted(unknown)
    assert all(name in caplog.text for name in unknown)


@pytest.mark.parametrize(
    "name", ["run-0123456789ABCDEF", "run-0", "run-0123456789abcdef0", "entry-0123456789abcdef", "notes.txt"]
)
def test_folders_not_named_like_a_session_are_left_alone(root: Path, name: str) -> None:
    (root / name).mkdir()
    (root / name / "lock").touch()
    create(root).close()
    assert {name, f"{name}/lock"} <= set(tree(root))


def test_a_link_to_the_cache_dir_itself_is_the_users_own_affair(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o777)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    folder = CacheFolder.create(tmp_path / "link", DIRECTORY)
    assert folder.path.is_dir()
    folder.close()
    assert tree(tmp_path / "disk") == []


def test_a_forked_child_does_not_remove_the_folder_of_its_parent(tmp_path: Path) -> None:
    folder = CacheFolder.create(tmp_path, DIRECTORY)
    in_child(folder.close)
    assert folder.path.is_dir()
    folder.close()
    assert tree(tmp_path) == []


ENTRY = "entry-0123456789abcdef"


@pytest.fixture
def entry(root: Path) -> Path:
    """A folder that was kept, as far as its owner can tell."""
    entry = root / ENTRY
    entry.mkdir(mode=0o700)
    (entry / "lock").touch(mode=0o600)
    return entry


def assert_not_opened(entry: Path, problem: str) -> None:
    with pytest.raises(CacheDirectoryError, match=problem):
        CacheFolder.open(entry)


def test_a_kept_folder_as_it_should_be_is_opened(entry: Path) -> None:
    CacheFolder.open(entry).close()


def test_a_link_in_the_place_of_a_kept_folder_is_not_opened(entry: Path, victim: Path) -> None:
    before = contents(victim)
    (entry / "lock").unlink()
    entry.rmdir()
    entry.symlink_to(victim / RUN)
    assert_not_opened(entry, "is a symbolic link")
    assert contents(victim) == before


def test_a_kept_folder_below_a_root_that_others_may_write_to_is_not_opened(entry: Path) -> None:
    """They could put another folder in its place."""
    entry.parent.chmod(0o777)
    assert_not_opened(entry, f"{DIRECTORY} may be written by others")


@pytest.mark.parametrize("change", [pytest.param("owner", marks=needs_root), "mode"])
def test_a_kept_folder_that_is_not_private_is_not_opened(entry: Path, change: str) -> None:
    os.chown(entry, 65534, 65534) if change == "owner" else entry.chmod(0o770)
    assert_not_opened(entry, r"belongs to another user|may be written by others")


@pytest.mark.parametrize("kind", ["link", "second name", "FIFO", "folder"])
def test_what_is_no_plain_lock_is_not_opened_nor_waited_for(entry: Path, victim: Path, kind: str) -> None:
    before, lock = contents(victim), entry / "lock"
    lock.unlink()
    if kind == "link":
        lock.symlink_to(victim / "lock")
    elif kind == "second name":
        lock.hardlink_to(victim / "lock")
    else:
        os.mkfifo(lock, 0o600) if kind == "FIFO" else lock.mkdir()
    assert_not_opened(entry, r"is a symbolic link|is not a plain file with one name")
    assert contents(victim) == before


KINDS = pytest.mark.parametrize("kind", ["link", "second name", "FIFO", "folder"])


def plant(kind: str, path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(target)
    elif kind == "second name":
        path.hardlink_to(target)
    else:
        os.mkfifo(path) if kind == "FIFO" else path.mkdir()


@pytest.fixture
def committed(tmp_path: Path) -> tuple[Path, Extent]:
    """A folder with one record that a commit lists."""
    storage = open_storage(tmp_path / "cache", keep=True)
    extent = put(storage, b"ours")
    commit(storage, [extent])
    storage.close()
    return storage.path, extent


@KINDS
@pytest.mark.parametrize("name", ["manifest.json", "segment-000000.kv"])
def test_what_was_planted_in_the_place_of_a_file_that_is_needed_is_refused(
    committed: tuple[Path, Extent], victim: Path, name: str, kind: str
) -> None:
    path, extent = committed
    before = contents(victim)
    plant(kind, path / name, victim / RUN / "segment-000000.kv")
    with pytest.raises(CacheDirectoryError, match=rf"{name} (is a symbolic link|is not a plain file)"):
        adopted(path, extent)
    assert contents(victim) == before


@KINDS
def test_what_was_planted_in_the_place_of_a_file_that_is_not_needed_goes_or_is_refused(
    committed: tuple[Path, Extent], victim: Path, kind: str
) -> None:
    path, extent = committed
    before, planted = contents(victim), path / "segment-000001.kv"
    plant(kind, planted, victim / RUN / "segment-000000.kv")
    if kind == "folder":
        with pytest.raises(StorageError, match="Cannot remove what is not used"):
            adopted(path, extent)
    else:
        storage = adopted(path, extent)
        assert not os.path.lexists(planted)
        put(storage, b"x", segment=1, start=1)
        storage.close()
    assert contents(victim) == before


def adopted(path: Path, extent: Extent) -> SegmentedStorage:
    storage = reopen(path)
    try:
        storage.adopt([extent])
    except BaseException:
        storage.close()
        raise
    return storage
