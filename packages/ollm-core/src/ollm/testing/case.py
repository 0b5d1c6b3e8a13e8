"""What every test of a store begins with: an empty store in a folder of its own, as `disk_cache` makes one."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ollm.contracts.kv import KVStore
from ollm.contracts.options import NoOptions
from ollm.contracts.spill import KVGeometry, LayerGeometry
from ollm.contracts.strategy import KVBuildContext
from ollm.storage.folder import RunFolder
from ollm.storage.options import BUFFERS, StorageOptions
from ollm.storage.segments import SegmentedStorage
from ollm.testing.blocks import Pair, assert_holds, random_block
from ollm.units import ByteSize

DIRECTORY = "kv_cache_under_test"
GEOMETRY = KVGeometry(tuple(LayerGeometry(layer, kv_heads=3, key_size=8, value_size=8, itemsize=4) for layer in (0, 1)))
_USUAL_TOKENS = 64


def store_context(cache_dir: Path, *, options: Any = None, window_tokens: int | None = None) -> KVBuildContext:
    """What the `build` of a KV strategy receives, for a store on the CPU with its files below `cache_dir`.

    Args:
        cache_dir: as in `ollm.disk_cache`; a store that asks for storage or a folder gets one below it.
        options: of the strategy. `StorageOptions`, and what inherits them, are used for the storage too.
        window_tokens: as `cache_window_tokens` in `ollm.disk_cache`.
    """
    limits = options if isinstance(options, StorageOptions) else StorageOptions(min_free_bytes=ByteSize(0))

    def storage(*, write_buffers: int = BUFFERS) -> SegmentedStorage:
        folder = RunFolder.create(cache_dir, DIRECTORY)
        return SegmentedStorage(folder, strategy="under-test", options=limits, write_buffers=write_buffers)

    return KVBuildContext(
        options=NoOptions() if options is None else options,
        geometry=GEOMETRY,
        device=torch.device("cpu"),
        window_tokens=window_tokens,
        storage=storage,
        folder=functools.partial(RunFolder.create, cache_dir, DIRECTORY),
    )


def settle(store: KVStore) -> None:
    """Wait until what was appended is on the disk."""
    if store.storage is not None:
        store.storage.flush()


def files_of(cache_dir: Path) -> list[Path]:
    """The files below a folder that hold keys and values: all but locks and tags."""
    found = (path for path in cache_dir.rglob("*") if path.is_file())
    return sorted(path for path in found if path.name not in ("lock", "CACHEDIR.TAG", "manifest.json"))


def assert_nothing_left(cache_dir: Path, when: str) -> None:
    """Every store of the test has ended, and with them all files."""
    __tracebackhide__ = True
    left = [str(path.relative_to(cache_dir)) for path in sorted(cache_dir.rglob("*")) if not path.is_dir()]
    left = left or [f"{path.relative_to(cache_dir)}/" for path in sorted(cache_dir.rglob("*"))]
    if left:
        pytest.fail(
            f"left behind {when}: {', '.join(left)}. close() ends with remove() of the folder, which takes files whose "
            "names begin with 'store-'; make them with new_file().",
            pytrace=False,
        )


class StoreCase(ABC):
    """Opens the store under test. A subclass writes `open`, and may set the attributes."""

    tolerance: float = 0.0
    """0 for a lossless store: what is read equals what was appended, bit for bit. Else how far any number may be off,
    as a part of the largest magnitude among the keys, or the values, of its extent."""
    window_tokens: int | None = None
    """For a store with a window: the `cache_window_tokens` to test it with, from 8 to 32."""
    options: Any = None
    """What `open` finds as `context.options`; without it, an instance of `NoOptions`."""

    @abstractmethod
    def open(self, context: KVBuildContext) -> KVStore:
        """The store, new and empty: what the `build` of its strategy returns for this context. Called many times, also
        in child processes."""

    def new(self, cache_dir: Path) -> KVStore:
        """An empty store with its files, if it has any, below a folder."""
        return self.open(store_context(cache_dir, options=self.options, window_tokens=self.window_tokens))

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[KVStore]:
        """An empty store, closed at the end; then nothing of it may be left."""
        store = self.new(tmp_path)
        yield store
        store.close()
        assert_nothing_left(tmp_path, "after close()")

    def holds(self, store: KVStore, layer: int, blocks: list[Pair]) -> None:
        """The store gives back exactly these blocks."""
        __tracebackhide__ = True
        assert_holds(store, layer, blocks, self.tolerance)

    @staticmethod
    def block(store: KVStore, tokens: int, **more: Any) -> Pair:
        """Keys and values of so many tokens, or of as many as an extent of this store may have."""
        return random_block(min(tokens, most_tokens(store)), **more)


def most_tokens(store: KVStore) -> int:
    """The largest extent that tests make."""
    return store.extent_tokens or _USUAL_TOKENS
