"""A decode step against a disk that is simulated: a rate, and nothing else. What the engine itself adds shows here.

Real disks drift by a third within minutes, and reading takes something from computing. A simulated read waits as long
as the disk would take for all that was asked of it before, moves no bytes and takes no processor; what it "read" is not
looked at. So a step can be compared with the longer of computing and reading to a few per cent. Tokens mean nothing.

    python benchmarks/simulated_disk.py [steps]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import torch

from ollm import disk_cache
from ollm.io import shim
from ollm.storage import segment
from ollm_bench.contexts import decode_one, fill_by_pieces, random_keys_and_values
from ollm_bench.kv.models import make_model, synthetic_geometry

TOKENS, PIECE = 32768, 4096
RATES = (1.8e9, 2.4e9, 3.2e9)
STRATEGIES = ("chunked", "paged", "quantized-cold-tier")


class SimulatedDisk(shim.Disk):
    """Reads at a rate, however many at a time; `None` is the real disk."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self._lock = threading.Lock()
        self._free_at = 0.0

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        if self.rate is None:
            return super().pread_into(fd, buffer, offset)
        with self._lock:
            self._free_at = max(time.perf_counter(), self._free_at) + len(buffer) / self.rate
            done = self._free_at
        time.sleep(max(done - time.perf_counter(), 0))
        return len(buffer)


def main(steps: int) -> None:
    geometry = synthetic_geometry(16, 8, 128, "bfloat16")
    everything = geometry.kv_bytes(TOKENS)
    model = make_model(geometry, TOKENS + 1000)
    disk = SimulatedDisk()
    print(f"{TOKENS:,} tokens, {everything / 1e9:.2f} GB of keys and values; medians of {steps} steps, seconds")
    print("strategy               resident    disk GB/s   step   reading   of the longer")
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        torch.inference_mode(),
        mock.patch.object(shim, "disk", disk),
        mock.patch.object(segment, "is_header", lambda record, header: True),
    ):
        for strategy in STRATEGIES:
            computing = 0.0
            for share in (1.0, 0.5, 0.0):
                if share == 0.5 and strategy == "quantized-cold-tier":
                    continue  # half of its bytes is less than half of the budget
                computing = _measure(model, Path(folder), strategy, share, everything, disk, steps, computing)


def _measure(
    model: object, folder: Path, strategy: str, share: float, everything: int, disk: SimulatedDisk, steps: int,
    computing: float,
) -> float:  # fmt: skip
    """Print what steps take at every rate; returns the seconds with everything resident."""
    budget = int(share * everything) + 64 * 2**20 * (share == 1)
    settings = {"cache_strategy": strategy, "ram_budget": budget, "options": {"verify": "never"}}
    with disk_cache(model, cache_dir=folder, **settings) as cache:
        keys, values = random_keys_and_values(model, PIECE)
        fill_by_pieces(cache, model, keys, values, TOKENS, lambda done: None)
        for _ in range(2):
            decode_one(model, cache)
        for rate in RATES if share < 1 else (None,):
            disk.rate = rate
            decode_one(model, cache)
            before, seconds = cache.state().bytes_read, []
            for _ in range(steps):
                began = time.perf_counter()
                decode_one(model, cache)
                seconds.append(time.perf_counter() - began)
            step = statistics.median(seconds)
            reading = (cache.state().bytes_read - before) / steps / rate if rate else 0.0
            computing = computing or step
            print(
                f"{strategy:22} {share:8.0%} {rate / 1e9 if rate else float('nan'):12.1f} {step:6.3f} {reading:9.3f} "
                f"{step / max(reading, computing):15.2f}",
                flush=True,
            )
        disk.rate = None
    return computing


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 11)
