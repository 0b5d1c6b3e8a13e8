"""One case, in this process: `python -m ollm.bench.case` takes a case as JSON and prints what it measured as JSON.

Progress goes to stderr, a line each.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import cattrs

from ollm.bench.process import Peak, join
from ollm.bench.records import Case, Measured

WARM_UP = 2
FILL_TOKENS = 1024
"""Of a piece that is appended at once: one extent of 4 MiB and several of a smaller geometry."""
_MOST_RAW_WRITE = 2**30


def main() -> None:
    """Measure the case on stdin."""
    case = cattrs.structure(json.load(sys.stdin), Case)
    if case.cgroup is not None:
        join(Path(case.cgroup))
    import torch

    with torch.inference_mode():
        measured = _on_disk(case) if case.on_disk else _in_memory(case)
    print(json.dumps(attrs.asdict(measured)))


def _in_memory(case: Case) -> Measured:
    from transformers import DynamicCache, StaticCache

    from ollm.bench.models import decode_step, fill, random_piece, text_config

    model, peak = _load(case)
    config = text_config(model)
    room = case.tokens + WARM_UP + case.steps + 1
    cache = StaticCache(config, max_cache_len=room) if case.name == "StaticCache" else DynamicCache(config=config)
    peak.start()
    for _ in fill(cache, model, case.tokens, random_piece(model, case.tokens)):
        pass
    peak_fill = peak.above_base()
    _say("decoding")
    peak.start()
    seconds = _steps(decode_step(model, cache, case.tokens), case.steps)
    return Measured(seconds=seconds, peak_fill=peak_fill, peak_decode=peak.above_base())


def _on_disk(case: Case) -> Measured:
    from ollm import disk_cache
    from ollm.bench.models import decode_step, fill, random_piece
    from ollm.bench.rates import RawDisk, drop_page_cache

    with tempfile.TemporaryDirectory(dir=case.folder, prefix="ollm-bench-") as folder:
        raw = RawDisk(Path(folder))
        model, peak = _load(case)
        piece = random_piece(model, min(FILL_TOKENS, case.tokens))
        kv_bytes = case.tokens * case.geometry.bytes_per_token
        _say("writing raw")
        write_rate = raw.write_rate(min(kv_bytes, _MOST_RAW_WRITE))
        budget = None if case.name == "resident" else case.ram_budget
        with closing(disk_cache(model, cache_dir=folder, cache_strategy=case.name, ram_budget=budget)) as cache:
            peak.start()
            began = time.perf_counter()
            for done in fill(cache, model, case.tokens, piece):
                _say(f"filling {100 * done // case.tokens} %")
            fill_seconds, fill_bytes = time.perf_counter() - began, cache.state().bytes_written
            peak_fill = peak.above_base()
            step = decode_step(model, cache, case.tokens)
            for _ in range(WARM_UP):
                step()
            state = cache.state()
            files = sorted(state.directory.glob("segment-*")) if state.directory else []
            per_step = max(kv_bytes - state.resident_bytes, 0)

            def raw_rate() -> float | None:
                return raw.read_rate(files, per_step) if files and per_step > kv_bytes // 100 else None

            peak.start()
            rates, dropped = [raw_rate()], False
            seconds, before = [], cache.state().bytes_read
            for index in range(case.steps):
                _say(f"decoding {index + 1} of {case.steps}")
                dropped = not state.unbuffered and drop_page_cache()
                seconds += _timed(step)
                rates.append(raw_rate())
            return Measured(
                seconds=seconds,
                bytes_per_step=(cache.state().bytes_read - before) // case.steps,
                read_rates=[rate for rate in rates if rate is not None],
                write_rate=write_rate,
                fill_seconds=fill_seconds,
                fill_bytes=fill_bytes,
                peak_fill=peak_fill,
                peak_decode=peak.above_base(),
                cache_dropped=dropped,
                unbuffered=raw.unbuffered and state.unbuffered,
            )


def _load(case: Case) -> tuple[Any, Peak]:
    """The model, warmed up, and what the process takes with it."""
    import torch

    from ollm.bench.models import make_model

    _say("loading the model")
    model = make_model(case.geometry)
    model(torch.tensor([[7, 8]]))
    return model, Peak()


def _steps(step: Callable[[], None], count: int) -> list[float]:
    for _ in range(WARM_UP):
        step()
    return [seconds for _ in range(count) for seconds in _timed(step)]


def _timed(step: Callable[[], None]) -> list[float]:
    began = time.perf_counter()
    step()
    return [time.perf_counter() - began]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
