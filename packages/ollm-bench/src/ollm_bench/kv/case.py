"""One case of `ollm bench kv`: `python -m ollm_bench.kv.case`, the other end of `ollm_bench.process`."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ollm_bench.process import answer, say, timed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ollm_bench.kv.records import Measured, Request
    from ollm_bench.memory import PeakMemory
    from ollm_bench.rates import RawDisk


def run(request: Request) -> Measured:
    """Measure what the request asks for."""
    from pathlib import Path

    from ollm_bench.kv.plan import sample_bytes
    from ollm_bench.rates import RawDisk

    if request.case.kind in ("static", "dynamic"):
        return _without_gradients(lambda: _in_memory(request))
    say("writing a file to measure the disk with")
    with RawDisk(Path(request.folder), sample_bytes(request.geometry, request.case.tokens)) as disk:
        if request.case.kind == "disk":
            return _disk_alone(disk)
        return _without_gradients(lambda: _on_disk(request, disk))


def _without_gradients(measure: Callable[[], Measured]) -> Measured:
    import torch

    with torch.inference_mode():
        return measure()


def _disk_alone(disk: RawDisk) -> Measured:
    from ollm_bench.kv.records import Measured

    say("reading it")
    disk.read_all()
    return Measured(rates=disk.rates)


def _in_memory(request: Request) -> Measured:
    from transformers import DynamicCache, StaticCache

    from ollm_bench.contexts import decode_one, fill_by_layers, random_keys_and_values
    from ollm_bench.kv.plan import WARM_UP_STEPS, cache_tokens
    from ollm_bench.kv.records import Measured

    model, memory = _load(request)
    tokens = request.case.tokens
    fill_peaks: list[int] = []
    decode_peaks: list[int] = []
    if request.case.kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=cache_tokens(tokens, request.steps))
    else:
        cache = DynamicCache(config=model.config)
    keys, values = random_keys_and_values(model, tokens)
    with memory.window(fill_peaks):
        began = time.perf_counter()
        fill_by_layers(cache, model, keys, values, _filling)
        fill_seconds = time.perf_counter() - began
    given = keys.nbytes + values.nbytes
    del keys, values
    seconds = []
    for step in range(WARM_UP_STEPS + request.steps):
        say(f"decoding, step {step + 1} of {WARM_UP_STEPS + request.steps}")
        with memory.window(decode_peaks):
            seconds.append(timed(lambda: decode_one(model, cache)))
    return Measured(
        step_seconds=seconds[WARM_UP_STEPS:],
        fill_seconds=fill_seconds,
        fill_peak=max(fill_peaks[0] - given, 0),
        decode_peak=max(decode_peaks),
        memory_method=memory.method,
    )


def _on_disk(request: Request, disk: RawDisk) -> Measured:
    from ollm import disk_cache
    from ollm_bench.contexts import decode_one
    from ollm_bench.kv.plan import WARM_UP_STEPS
    from ollm_bench.kv.records import Measured
    from ollm_bench.limits import drop_page_cache
    from ollm_bench.rates import BLOCK

    model, memory = _load(request)
    decode_peaks: list[int] = []
    cache = disk_cache(
        model,
        cache_dir=request.folder,
        cache_strategy=request.case.strategy or "",
        ram_budget=request.case.ram_budget,
    )
    with ExitStack() as opened:
        opened.callback(cache.close)
        fill_seconds, fill_peak = _fill(request, model, cache, memory)
        if request.case.forks > 1:
            cache = cache.fork(request.case.forks)
            opened.callback(cache.close)
        disk.write_some()
        for step in range(WARM_UP_STEPS):
            say(f"decoding, warm-up {step + 1} of {WARM_UP_STEPS}")
            with memory.window(decode_peaks):
                decode_one(model, cache, request.case.forks)
        state = cache.state()
        cold = max(state.disk_bytes - state.resident_bytes, 0)
        stored = _stored(state.directory) if state.directory is not None else []
        files = [path for path in stored if path.stat().st_size >= BLOCK]  # less says nothing of a disk

        def read_raw() -> None:
            """What a step reads, as raw as can be: the disk drifts from minute to minute."""
            if cold > state.disk_bytes // 50:
                disk.read_files(files, cold)

        read_raw()
        seconds, before = [], state.bytes_read
        not_dropped = "what this case reads is not in it" if state.unbuffered else ""
        for step in range(request.steps):
            say(f"decoding, step {step + 1} of {request.steps}")
            if not state.unbuffered:
                not_dropped = drop_page_cache()
            with memory.window(decode_peaks):
                seconds.append(timed(lambda: decode_one(model, cache, request.case.forks)))
            read_raw()
        state = cache.state()
        if not disk.rates.reads:
            disk.read_all()
    return Measured(
        rates=disk.rates,
        step_seconds=seconds,
        bytes_per_step=(state.bytes_read - before) // request.steps,
        stored_bytes=state.disk_bytes,
        fill_seconds=fill_seconds,
        bytes_written=state.bytes_written,
        fill_peak=fill_peak,
        decode_peak=max(decode_peaks),
        page_cache=f"not dropped: {not_dropped}" if not_dropped else "dropped before each step",
        memory_method=memory.method,
        mode=state.mode,
    )


def _fill(request: Request, model: Any, cache: Any, memory: PeakMemory) -> tuple[float, int]:
    """Seconds, and the peak of memory without the keys and values that are given."""
    from ollm_bench.contexts import fill_by_pieces, piece_tokens, random_keys_and_values, wait_for_disk

    tokens = request.case.tokens
    keys, values = random_keys_and_values(model, min(piece_tokens(request.geometry.layer_bytes(1)), tokens))
    peaks: list[int] = []
    with memory.window(peaks):
        began = time.perf_counter()
        fill_by_pieces(cache, model, keys, values, tokens, _filling)
        directory = cache.state().directory
        if directory is not None:
            wait_for_disk(directory)
        seconds = time.perf_counter() - began
    return seconds, max(peaks[0] - keys.nbytes - values.nbytes, 0)


def _stored(directory: Path) -> list[Path]:
    """The files that hold keys and values: ollm's own segments, or what a store made under names of its own."""
    return sorted(path for path in directory.iterdir() if path.name.startswith(("segment-", "store-")))


def _load(request: Request) -> tuple[Any, PeakMemory]:
    """The model after a tiny forward, so that what it allocates once is not counted as the cache's."""
    import torch

    from ollm_bench.kv.models import make_model
    from ollm_bench.kv.plan import cache_tokens
    from ollm_bench.memory import PeakMemory

    say("loading the model")
    model = make_model(request.geometry, cache_tokens(request.case.tokens, request.steps))
    model(torch.tensor([[7, 8]]))
    return model, PeakMemory()


def _filling(share: float) -> None:
    say(f"filling {share:.0%}")


def _request_type() -> type[Request]:
    from ollm_bench.kv.records import Request

    return Request


if __name__ == "__main__":
    answer(_request_type, run)
