"""What every test of a store begins with: an empty store in a folder of its own, as `disk_cache` makes one, or one that
goes on with a folder that was kept."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import settings

from ollm.contracts.blocks import Extent, KVBlock
from ollm.contracts.kv import KVStore
from ollm.contracts.options import NoOptions
from ollm.contracts.spill import KVGeometry, LayerGeometry
from ollm.contracts.strategy import KVBuildContext
from ollm.errors import OllmError, UnsupportedOperationError
from ollm.storage.folder import CacheFolder
from ollm.storage.kept import KeptLayer
from ollm.storage.options import WRITE_BUFFERS, StorageOptions
from ollm.storage.segments import SegmentedStorage
from ollm.testing.blocks import assert_equal, assert_holds, random_block, read_extent
from ollm.units import ByteSize

DIRECTORY = "kv_cache_under_test"
GEOMETRY = KVGeometry(tuple(LayerGeometry(layer, kv_heads=3, key_size=8, value_size=8, itemsize=4) for layer in (0, 1)))
_USUAL_TOKENS = 64

T = TypeVar("T")


def store_context(
    cache_dir: Path, *, options: Any = None, window_tokens: int | None = None, keep: bool = False
) -> KVBuildContext:
    """What the `build` of a KV strategy receives, for a store on the CPU with its files below `cache_dir`.

    Args:
        cache_dir: as in `ollm.disk_cache`; a store that asks for storage or a folder gets one below it.
        options: of the strategy. `StorageOptions`, and what inherits them, are used for the storage too.
        window_tokens: as `cache_window_tokens` in `ollm.disk_cache`.
        keep: whether the folder stays when the store is closed. The next store with the same `cache_dir` that is to
            keep its folder, too, goes on with that one.
    """
    limits = options if isinstance(options, StorageOptions) else StorageOptions(min_free_bytes=ByteSize(0))

    def folder() -> CacheFolder:
        kept = [*cache_dir.glob(f"{DIRECTORY}/entry-*")] if keep else []
        return CacheFolder.open(kept[0]) if kept else CacheFolder.create(cache_dir, DIRECTORY, keep=keep)

    def storage(*, write_buffers: int = WRITE_BUFFERS, compact_from: int = 1) -> SegmentedStorage:
        return SegmentedStorage(
            folder(), strategy="under-test", options=limits, write_buffers=write_buffers, compact_from=compact_from
        )

    return KVBuildContext(
        options=NoOptions() if options is None else options,
        geometry=GEOMETRY,
        device=torch.device("cpu"),
        window_tokens=window_tokens,
        storage=storage,
        folder=folder,
    )


def depth(times: int) -> int:
    """How often something is tried: so many times where Hypothesis tries 100 examples, its default, and with another
    profile in proportion. At least once."""
    return max(times * settings().max_examples // 100, 1)


def some(places: Sequence[T], times: int) -> Sequence[T]:
    """About `depth(times)` of all places, evenly and the same ones every time. They are an odd number of places apart,
    so that all bits of a byte and all bytes of a block come up."""
    return places[:: max(len(places) // depth(times), 1) | 1]


def flip(path: Path, place: int) -> None:
    """Change one bit of the byte at a place of a file. Doing so twice changes nothing."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


@contextmanager
def typed(what: str) -> Iterator[None]:
    """Only assertions, and errors that users can handle, get out."""
    try:
        yield
    except (AssertionError, OllmError):
        raise
    except Exception as error:
        raise untyped(what, error) from error


def untyped(what: str, error: Exception) -> AssertionError:
    """Says of an error of a store that no user could handle it."""
    cure = "raise StorageError, CorruptDataError or another error of ollm.plugin"
    return AssertionError(f"{what}: {type(error).__name__} ({error}); {cure}")


def flush_writes(store: KVStore) -> None:
    """Wait until what was written is on the disk."""
    if store.storage is not None:
        store.storage.flush()


def commit(store: KVStore, extents: Iterable[Extent], *, durable: bool = False) -> None:
    """Write the table of a layer, or of several, down, where the store is over a storage of ollm's."""
    if isinstance(store.storage, SegmentedStorage):
        store.storage.commit(kept_layers(extents), durable=durable)


def kept_layers(extents: Iterable[Extent]) -> list[KeptLayer]:
    """The layers that have these extents, and lost nothing."""
    ordered = sorted(extents, key=lambda extent: (extent.key.layer, extent.start))
    return [KeptLayer.of([*group]) for _, group in itertools.groupby(ordered, lambda extent: extent.key.layer)]


def files_of(cache_dir: Path) -> list[Path]:
    """The files below a folder that hold keys and values: all but locks, tags and manifests."""
    found = (path for path in cache_dir.rglob("*") if path.is_file())
    return sorted(path for path in found if path.name not in ("lock", "CACHEDIR.TAG", "manifest.json"))


def bytes_of(cache_dir: Path) -> int:
    """How long these files are together."""
    return sum(path.stat().st_size for path in files_of(cache_dir))


def assert_nothing_left(cache_dir: Path, when: str) -> None:
    """Every store of the test has ended, and with them all files."""
    __tracebackhide__ = True
    left = [str(path.relative_to(cache_dir)) for path in sorted(cache_dir.rglob("*")) if not path.is_dir()]
    left = left or [f"{path.relative_to(cache_dir)}/" for path in sorted(cache_dir.rglob("*"))]
    if left:
        pytest.fail(
            f"left behind {when}: {', '.join(left)}. close() ends with close() of the folder, which takes files whose "
            "names begin with 'store-'; make them with open_file().",
            pytrace=False,
        )


class StoreCase(ABC):
    """Opens the store under test. A subclass writes `open`, and may set the attributes."""

    tolerance: float = 0.0
    """0 for a lossless store: what is read equals what was written, bit for bit. Else how far any number may be off,
    as a part of the largest magnitude among the keys, or the values, of its extent."""
    window_tokens: int | None = None
    """For a store with a window: the `cache_window_tokens` to test it with, from 8 to 32."""
    options: Any = None
    """What `open` finds as `context.options`; without it, an instance of `NoOptions`."""

    @abstractmethod
    def open(self, context: KVBuildContext) -> KVStore:
        """The store, new and empty: what the `build` of its strategy returns for this context. Called many times, also
        in child processes, and for folders that an earlier store left."""

    def new(self, cache_dir: Path, *, keep: bool = False) -> KVStore:
        """A store with its files, if it has any, below a folder. With `keep`, as in `store_context`: it must `adopt`
        whatever an earlier one left there."""
        return self.open(store_context(cache_dir, options=self.options, window_tokens=self.window_tokens, keep=keep))

    def can_go_on(self, cache_dir: Path) -> bool:
        """Whether the store can adopt what an earlier one left. Uses an empty folder."""
        store = self.new(cache_dir, keep=True)
        try:
            store.adopt(())
        except UnsupportedOperationError:
            return False
        finally:
            store.close()
        return not store.in_memory

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[KVStore]:
        """An empty store, closed at the end; then nothing of it may be left."""
        store = self.new(tmp_path)
        yield store
        store.close()
        assert_nothing_left(tmp_path, "after close()")

    @pytest.fixture
    def kept(self, tmp_path: Path) -> Path:
        """Where stores leave their folders for the next one."""
        if not self.can_go_on(tmp_path / "probe"):
            pytest.skip("this store keeps nothing beyond its process")
        return tmp_path / "kept"

    def holds(self, store: KVStore, extents: Sequence[Extent], blocks: Sequence[KVBlock]) -> None:
        """The store gives back these blocks."""
        __tracebackhide__ = True
        assert_holds(store, extents, blocks, self.tolerance)

    def right_or_refused(self, store: KVStore, table: Mapping[Extent, KVBlock], what: str) -> int:
        """Each extent gives what was written, or a typed error; how many errors came. `what` was done to the files."""
        __tracebackhide__ = True
        errors = 0
        for extent, block in table.items():
            try:
                ours = read_extent(store, extent)
            except OllmError:
                errors += 1
                continue
            except Exception as error:
                raise untyped(f"{what}, while reading {extent}", error) from error
            assert_equal(ours, block, self.tolerance, f"{what}: other {{}} of {extent}, and no error")
        return errors

    @staticmethod
    def block(store: KVStore, tokens: int, **more: Any) -> KVBlock:
        """Keys and values of so many tokens, or of as many as an extent of this store may have."""
        return random_block(min(tokens, most_tokens(store)), **more)

    def blocks(self, store: KVStore, count: int, tokens: int, *, seed: int = 0, **more: Any) -> list[KVBlock]:
        """Several of them, each with other numbers."""
        return [self.block(store, tokens, seed=100 * seed + number, **more) for number in range(count)]


def most_tokens(store: KVStore) -> int:
    """The largest extent that tests make."""
    return store.extent_tokens or _USUAL_TOKENS
