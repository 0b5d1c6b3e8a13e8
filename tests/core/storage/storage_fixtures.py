"""What several tests of the storage helper need: storages, small records, and children of this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ollm.contracts.blocks import BlockKey, Extent, KVBlock, KVLayout
from ollm.io.buffers import aligned_buffer
from ollm.storage.folder import CacheFolder
from ollm.storage.kept import extents_of
from ollm.storage.options import StorageOptions
from ollm.storage.records import run_span
from ollm.storage.segments import SegmentedStorage
from ollm.testing.case import kept_layers

DIRECTORY = "kv_cache_test"


def open_storage(
    cache_dir: Path, *, keep: bool = False, compact_from: int = 1, strategy: str = "test", **options: object
) -> SegmentedStorage:
    """A new storage in a folder of its own below `cache_dir/kv_cache_test`."""
    folder = CacheFolder.create(cache_dir, DIRECTORY, keep=keep)
    settings = StorageOptions(**{"min_free_bytes": 0, **options})
    return SegmentedStorage(folder, strategy=strategy, options=settings, compact_from=compact_from)


def reopen(path: Path, *, strategy: str = "test", parameters: object = None, **options: object) -> SegmentedStorage:
    """A storage over a folder that was kept; nothing is adopted yet."""
    settings = StorageOptions(**{"min_free_bytes": 0, **options})
    return SegmentedStorage(CacheFolder.open(path), strategy=strategy, options=settings, parameters=parameters)


def block_of(payload: bytes) -> KVBlock:
    """One token of one head, whose bytes on disk are these: one byte of keys, the others values."""
    raw = torch.tensor(list(payload), dtype=torch.uint8).view(1, 1, 1, len(payload))
    return KVBlock(raw[..., :1], raw[..., 1:])


def layout_of(size: int) -> KVLayout:
    """Of such a block of `size` bytes."""
    return KVLayout(torch.uint8, 1, min(size, 1), max(size - 1, 0))


def put(
    storage: SegmentedStorage,
    payload: bytes,
    *,
    segment: int = 0,
    layer: int = 0,
    branch: int = 0,
    start: int = 0,
    at: int | None = None,
    flush: bool = True,
) -> Extent:
    """Write one record of one token and, unless told otherwise, wait until it is on the disk."""
    key, block = BlockKey(layer, branch, start, 1, 1), block_of(payload)
    location = storage.write(block, key, segment=segment, at=at)
    if flush:
        storage.flush()
    return Extent.of(key, block.layout, location)


def read_raw(storage: SegmentedStorage, *extents: Extent) -> list[torch.Tensor]:
    """The payloads of adjacent extents, in a buffer of their own."""
    begin, end = run_span(extents)
    return storage.read(extents, aligned_buffer(end - begin))


def get(storage: SegmentedStorage, extent: Extent) -> bytes:
    """Read a record's payload."""
    return read_raw(storage, extent)[0].numpy().tobytes()


def get_pieces(storage: SegmentedStorage, extent: Extent, start: int, stop: int) -> bytes:
    """Bytes `start … stop - 1` of a record's payload, by way of the pieces that hold them."""
    pieces = storage.pieces(extent, start, stop)
    content = storage.read_pieces(pieces, aligned_buffer(pieces.stop - pieces.start))
    return content.numpy().tobytes()[start - pieces.start : stop - pieces.start]


def locations(*extents: Extent) -> Sequence[object]:
    """Where they are, as `free` wants it."""
    return [extent.location for extent in extents]


def commit(storage: SegmentedStorage, extents: Iterable[Extent], **more: bool) -> None:
    """Commit layers that have these extents, and lost nothing."""
    storage.commit(kept_layers(extents), **more)


def committed_extents(storage: SegmentedStorage) -> tuple[Extent, ...]:
    """What the last commit listed."""
    return tuple(extents_of(storage.committed))


def file_of(storage: SegmentedStorage, segment: int = 0) -> Path:
    """The file of a segment."""
    return storage.path / f"segment-{segment:06d}.kv"


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file. Doing so twice changes nothing."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def tree(folder: Path) -> list[str]:
    """Every path below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process of its own, with pipes for both directions; it is gone after the `with` block."""
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        try:
            yield child
        finally:
            if child.poll() is None and not child.stdin.closed:
                child.kill()
