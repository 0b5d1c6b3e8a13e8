"""What lies on the disk: where it is, who may read it, and what becomes of it when something else changes it.

Any damage ends in the right numbers or in a typed error, never in other numbers.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ollm.contracts.blocks import Extent, KVBlock
from ollm.contracts.kv import KVStore
from ollm.errors import OllmError
from ollm.testing.blocks import write_blocks
from ollm.testing.case import StoreCase, bytes_of, files_of, flip, flush_writes, some

_BLOCK = 4096
_PLACES = 12
"""About how many places of each file are damaged, one at a time; see `some`."""


class FilesTests(StoreCase):
    """Skipped for stores without files."""

    _has_a_cache = False
    """Whether the store may give bytes that it has in memory, so that damage may go unnoticed and do no harm."""

    @pytest.fixture
    def filled(self, store: KVStore, tmp_path: Path) -> Iterator[tuple[KVStore, list[Path]]]:
        """A store with three extents, and its files."""
        _fill(self, store)
        files = files_of(tmp_path)
        if not files:
            pytest.skip("this store has no files")
        yield store, files

    def test_what_is_written_is_on_the_disk(self, filled: tuple[KVStore, list[Path]]) -> None:
        """Random numbers hardly shrink: a store that writes less than a fifth of them keeps them somewhere else."""
        store, files = filled
        cache_dir = files[0].parents[2]
        before = bytes_of(cache_dir)
        blocks = self.blocks(store, 8, 64, heads=3, key_size=64, value_size=64)
        payload = sum(block.keys.nbytes + block.values.nbytes for block in blocks)
        write_blocks(store, blocks, layer=5)
        flush_writes(store)
        grown = bytes_of(cache_dir) - before
        assert grown >= payload / 5, f"{payload} bytes were written and the files grew by {grown}"
        assert store.stats().disk_bytes >= payload / 5, "stats().disk_bytes"

    def test_files_are_private(self, filled: tuple[KVStore, list[Path]]) -> None:
        """Keys and values tell the text: no other user may read them, whatever the umask."""
        _, files = filled
        before = os.umask(0)
        try:
            with tempfile.TemporaryDirectory(dir=files[0].parents[2].parent) as folder:
                other = self.new(Path(folder))
                _fill(self, other)
                run = {path.parent for path in files_of(Path(folder))}
                modes = {
                    path: stat.S_IMODE(path.lstat().st_mode)
                    for place in run
                    for path in (place, *place.iterdir())
                }  # fmt: skip
                other.close()
        finally:
            os.umask(before)
        open_to_others = {path.name: oct(mode) for path, mode in modes.items() if mode & 0o077}
        assert not open_to_others, "others may read or write it; open_file() of the folder makes private files"

    def test_no_file_holds_a_path(self, filled: tuple[KVStore, list[Path]]) -> None:
        """Names are derived, never read: who changes a file must not choose which file is read next."""
        _, files = filled
        folder = files[0].parent
        names = {str(folder), *(path.name for path in files)}
        found = [(path.name, name) for path in files for name in names if name.encode() in path.read_bytes()]
        assert found == []

    def test_a_damaged_byte_gives_right_data_or_a_typed_error(self, tmp_path: Path) -> None:
        """A checksum in front of the bytes, compared when they are read, is the usual way."""

        def places(size: int) -> list[int]:
            """At the beginning of a file, everywhere, and the last byte."""
            near = some(range(min(size, 64)), _PLACES)
            return sorted({*near, *some(range(size), _PLACES), size - 1} if size else ())

        self._damage(tmp_path, flip, places)

    def test_a_file_that_is_cut_gives_right_data_or_a_typed_error(self, tmp_path: Path) -> None:
        """A short read is no read."""
        self._damage(tmp_path, os.truncate, lambda size: some(range(size), _PLACES))

    def test_blocks_in_the_wrong_place_give_right_data_or_a_typed_error(self, tmp_path: Path) -> None:
        """What lies where something else was asked for is intact in itself: compare it with what was asked for."""

        def misplace(path: Path, number: int) -> None:
            content, shift = path.read_bytes(), number * _BLOCK
            _overwrite(path, content[shift:] + content[:shift])

        with self._filled_again(tmp_path) as (_, table, _):
            record = max(extent.location.nbytes for extent in table) // _BLOCK  # without header and padding
        likely = {1, *(count * record + more for count in (1, 2) for more in range(4))}

        def shifts(size: int) -> list[int]:
            blocks = -(-size // _BLOCK)
            return sorted({shift for shift in likely if shift < blocks} | {*some(range(1, blocks), _PLACES // 3)})

        self._damage(tmp_path, misplace, shifts)

    def test_a_file_that_is_empty_gives_right_data_or_a_typed_error(self, tmp_path: Path) -> None:
        """As after a crash of the machine, which leaves zeros."""
        self._damage(tmp_path, lambda path, _: _overwrite(path, bytes(path.stat().st_size)), lambda size: (0,))

    def _damage(
        self, tmp_path: Path, change: Callable[[Path, int], object], places: Callable[[int], Iterable[int]]
    ) -> None:
        """Fill a store anew for every place of every file, change the file there, which the store has open, and read
        everything. `places` of a file are told its size."""
        with self._filled_again(tmp_path) as (_, _, files):
            todo = [(number, place) for number, path in enumerate(files) for place in places(path.stat().st_size)]
        if not todo:
            pytest.skip("this store has no files")
        caught = 0
        for number, place in todo:
            with self._filled_again(tmp_path) as (store, table, files):
                path = files[number]
                what = f"{path.name} of {path.stat().st_size} bytes, changed at {place}"
                change(path, place)
                caught += self.right_or_refused(store, table, what)
        assert caught or self._has_a_cache, (
            "no change was ever noticed: are these the files that the store reads? If it has a cache of its own, open "
            "it with a small one"
        )

    @contextmanager
    def _filled_again(self, tmp_path: Path) -> Iterator[tuple[KVStore, dict[Extent, KVBlock], list[Path]]]:
        folder = tmp_path / "again"
        store = self.new(folder)
        try:
            table = _fill(self, store)
            yield store, table, files_of(folder)
        finally:
            with suppress(OllmError):  # it may say that its files are not what they were
                store.close()
            shutil.rmtree(folder, ignore_errors=True)


def _fill(case: StoreCase, store: KVStore) -> dict[Extent, KVBlock]:
    """Three extents in two layers, equally large, so that one could be taken for another; what was written."""
    table: dict[Extent, KVBlock] = {}
    for layer in (0, 1):
        blocks = case.blocks(store, 2 - layer, 16, seed=layer, heads=4, key_size=128, value_size=128)
        table |= zip(write_blocks(store, blocks, layer=layer), blocks, strict=True)
    flush_writes(store)
    return table


def _overwrite(path: Path, content: bytes) -> None:
    """Other bytes in the same file."""
    with path.open("r+b") as file:
        file.write(content)
