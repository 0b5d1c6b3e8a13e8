"""How large a request a disk is fastest with: why ollm reads and writes 1 MiB per system call, into huge pages.

Eight threads read and four write a file of 512 MiB, unbuffered, each the parts of 8 MiB that nobody has taken, in
requests of every size; the order is drawn anew in every round, for disks drift. Linux only.

    python benchmarks/request_size.py [rounds]
"""

from __future__ import annotations

import mmap
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ollm.io.buffers import aligned_buffer, tensor_bytes

MIB = 2**20
FILE, PART = 512 * MIB, 8 * MIB
READERS, WRITERS = 8, 4
REQUESTS = (MIB // 4, MIB // 2, MIB, 2 * MIB, 4 * MIB, 8 * MIB)

Transfer = Callable[[int, list[memoryview], int], int]
Case = tuple[Transfer, int, str]


def main(rounds: int) -> None:
    buffers = {
        "huge": [tensor_bytes(aligned_buffer(PART)) for _ in range(READERS)],
        "small": [_in_small_pages() for _ in range(READERS)],
    }
    for buffer in (*buffers["huge"], *buffers["small"]):
        buffer[:] = os.urandom(PART)
    cases: list[Case] = [(os.preadv, request, "huge") for request in REQUESTS]
    cases += [(os.preadv, request, "small") for request in (MIB, 4 * MIB)]
    cases += [(os.pwritev, request, "huge") for request in REQUESTS]
    rates: dict[Case, list[float]] = {case: [] for case in cases}
    with tempfile.NamedTemporaryFile(dir=".") as file:
        fd = os.open(Path(file.name), os.O_RDWR | os.O_DIRECT)
        _move(fd, buffers["huge"], os.pwritev, MIB)
        for _ in range(rounds):
            for case in random.sample(cases, len(cases)):
                transfer, request, pages = case
                rates[case].append(_move(fd, buffers[pages], transfer, request))
        os.close(fd)
    print(f"GB/s, median (lowest to highest) of {rounds} rounds")
    for transfer, request, pages in cases:
        found = rates[transfer, request, pages]
        what = "write" if transfer is os.pwritev else "read"
        print(
            f"{what:5} requests of {request / MIB:5.2f} MiB, {pages:5} pages: {statistics.median(found):5.2f} "
            f"({min(found):.2f} to {max(found):.2f})"
        )


def _in_small_pages() -> memoryview:
    pages = mmap.mmap(-1, PART, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return memoryview(pages)


def _move(fd: int, buffers: Sequence[memoryview], transfer: Transfer, request: int) -> float:
    """Read or write the whole file; GB/s."""
    parts = iter(range(0, FILE, PART))

    def work(buffer: memoryview) -> None:
        for part in parts:  # next() of a range's iterator is atomic
            for at in range(0, PART, request):
                transfer(fd, [buffer[at : at + request]], part + at)

    if transfer is os.pwritev:
        os.ftruncate(fd, 0)
    threads = WRITERS if transfer is os.pwritev else READERS
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        list(pool.map(work, buffers[:threads]))
        if transfer is os.pwritev:
            os.fsync(fd)
        return FILE / (time.perf_counter() - began) / 1e9


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
