"""How fast this disk reads small pieces at random, by size and by how many are in flight: raw, and in the engine.

A strategy that reads only some heads or some tokens asks for pieces of 16 to 256 KiB. Raw: `preadv`, unbuffered, from
so many threads. Engine: `PartReader`, with hashes checked and bytes put where they are wanted. Ratios are to reading
the same file in order with requests of 1 MiB, measured next to each.

    python benchmarks/small_reads.py [seconds per case]
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from ollm.contracts.blocks import BlockKey, Extent, KVBlock
from ollm.io import scheduler
from ollm.io.buffers import aligned_buffer, tensor_bytes
from ollm.kv import parts
from ollm.storage import options
from ollm.storage.folder import CacheFolder
from ollm.storage.segments import SegmentedStorage

KIB = 2**10
SIZES = (16, 32, 64, 128, 256)
DEPTHS = (1, 2, 4, 8, 16, 32)
FILE_BYTES = 2**31


def raw(path: Path, nbytes: int, depth: int, seconds: float, *, in_order: bool = False) -> float:
    """GB/s of `depth` threads."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    size, lock, state = path.stat().st_size // nbytes, threading.Lock(), {"next": 0, "moved": 0}
    until = time.perf_counter() + seconds

    def work(seed: int) -> None:
        view, places = tensor_bytes(aligned_buffer(nbytes)), random.Random(seed)
        moved = 0
        while time.perf_counter() < until:
            if in_order:
                with lock:
                    at, state["next"] = state["next"], (state["next"] + 1) % size
            else:
                at = places.randrange(size)
            moved += os.preadv(fd, [view], at * nbytes)
        with lock:
            state["moved"] += moved

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(depth)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    return state["moved"] / (time.perf_counter() - began) / 1e9


def engine(reader: parts.PartReader, extents: list[Extent], nbytes: int, seconds: float) -> float:
    """GB/s of keys of one head at a time, of so many bytes, at random."""
    token = extents[0].layout.key_size * extents[0].layout.dtype.itemsize
    count, places, moved = nbytes // token, random.Random(0), 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        wanted = []
        for _ in range(64):
            extent = places.choice(extents)
            start = places.randrange(extent.key.tokens // count) * count
            head = places.randrange(extent.layout.kv_heads)
            wanted.append(parts.Part(extent, range(head, head + 1), range(start, start + count)))
        moved += sum(block.keys.nbytes + block.values.nbytes for block in reader.read(wanted))
    return moved / (time.perf_counter() - began) / 1e9


def main(seconds: float) -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        storage = SegmentedStorage(CacheFolder.create(Path(folder), "kv_cache_bench"), strategy="bench")
        keys = torch.randn(1, 8, 2048, 128).bfloat16()
        block, extents = KVBlock(keys, keys), []
        for number in range(FILE_BYTES // (2 * keys.nbytes)):
            key = BlockKey(0, 0, 2048 * number, 2048, 1)
            extents.append(Extent.of(key, block.layout, storage.write(block, key, segment=0)))
        storage.flush()
        path = storage.path / "segment-000000.kv"
        print(f"a file of {FILE_BYTES / 1e9:.1f} GB; GB/s (and of reading in order)")
        print("raw, in flight  " + "".join(f"{size:>10} KiB" for size in SIZES))
        for depth in DEPTHS:
            cells = []
            for size in SIZES:
                whole = raw(path, 2**20, 8, seconds, in_order=True)
                found = raw(path, size * KIB, depth, seconds)
                cells.append(f"{found:6.2f} ({found / whole:.2f})")
            print(f"{depth:>14}  " + " ".join(f"{cell:>13}" for cell in cells), flush=True)
        print(
            f"engine, {options.PARTS_IN_FLIGHT} in flight on {scheduler.WORKERS} threads; so much of keys and of values"
        )
        reader, cells = parts.PartReader(storage), []
        for size in SIZES:
            whole = raw(path, 2**20, 8, seconds, in_order=True)
            found = engine(reader, extents, size * KIB, seconds)
            cells.append(f"{found:6.2f} ({found / whole:.2f})")
        print(" " * 16 + " ".join(f"{cell:>13}" for cell in cells))
        reader.close()
        storage.close()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)
