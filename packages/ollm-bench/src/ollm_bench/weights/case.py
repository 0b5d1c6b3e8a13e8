"""One case of `ollm bench weights`: `python -m ollm_bench.weights.case`, the other end of `ollm_bench.process`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ollm_bench.process import answer, say

if TYPE_CHECKING:
    from ollm_bench.rates import RawFiles
    from ollm_bench.weights.records import Measured, Request


def run(request: Request) -> Measured:
    """Measure what the request asks for."""
    from pathlib import Path

    from ollm_bench.checkpoints import weight_files
    from ollm_bench.rates import RawFiles
    from ollm_bench.weights.plan import sample_bytes
    from ollm_bench.weights.records import Measured

    disk = RawFiles(weight_files(Path(request.geometry.model)), sample_bytes(request.geometry))
    if request.case.kind == "disk":
        say("reading the checkpoint")
        disk.read()
        return Measured(rates=disk.rates)
    return _run(request, disk)


def _run(request: Request, disk: RawFiles) -> Measured:
    import torch

    from ollm_bench.limits import drop_page_cache
    from ollm_bench.memory import PeakMemory
    from ollm_bench.weights.checkpoints import skeleton
    from ollm_bench.weights.steps import Steps
    from ollm_bench.weights.subjects import load

    skeleton(request.geometry.model)  # what is imported belongs to the process and not to the case
    # pages that somebody else brought into the cache would not count against this case's limit
    drop_page_cache()
    memory, peaks = PeakMemory(), list[int]()
    with memory.window(peaks):
        began = time.perf_counter()
        subject = load(request, say)
        seconds = time.perf_counter() - began
    try:
        with torch.inference_mode():
            return Steps(request, subject, disk, memory).measured(load_seconds=seconds, load_peak=peaks[0])
    finally:
        subject.close()


def _request_type() -> type[Request]:
    from ollm_bench.weights.records import Request

    return Request


if __name__ == "__main__":
    answer(_request_type, run)
