"""What several tests of the storage helper need: storages, raw records, and children of this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ollm.contracts.blocks import Extent
from ollm.io.buffers import aligned_buffer
from ollm.storage.folder import CacheFolder
from ollm.storage.options import StorageOptions
from ollm.storage.records import run_span
from ollm.storage.segments import SegmentedStorage

DIRECTORY = "kv_cache_test"


def open_storage(cache_dir: Path, **options: object) -> SegmentedStorage:
    """A new storage in a folder of its own below `cache_dir/kv_cache_test`."""
    settings = {"min_free_bytes": 0, **options}
    return SegmentedStorage(
        CacheFolder.create(cache_dir, DIRECTORY), strategy="test", options=StorageOptions(**settings)
    )


def put(
    storage: SegmentedStorage, payload: bytes, *, segment: int = 0, layer: int = 0, start: int = 0, flush: bool = True
) -> Extent:
    """Write one record of one token and, unless told otherwise, wait until it is on the disk."""
    extent = storage.write(
        [as_tensor(payload)], segment=segment, layer=layer, start=start, tokens=1, rows=1, dtype="opaque"
    )
    if flush:
        storage.flush()
    return extent


def as_tensor(payload: bytes) -> torch.Tensor:
    """Bytes as what stores hand over."""
    return torch.tensor(list(payload), dtype=torch.uint8)


def read_raw(storage: SegmentedStorage, *extents: Extent) -> list[torch.Tensor]:
    """The payloads of adjacent extents, in a buffer of their own."""
    begin, end = run_span(extents)
    return storage.read(extents, aligned_buffer(end - begin))


def get(storage: SegmentedStorage, extent: Extent) -> bytes:
    """Read a record's payload."""
    return read_raw(storage, extent)[0].numpy().tobytes()


def tree(folder: Path) -> list[str]:
    """Every path below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process of its own, with pipes for both directions; it is gone after the `with` block."""
    command = [sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            if child.poll() is None and not child.stdin.closed:  # type: ignore[union-attr]
                child.kill()
