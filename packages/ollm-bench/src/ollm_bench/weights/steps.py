"""Steps of a loaded subject, one after the other, with the disk measured after each of them."""

from __future__ import annotations

import time
from collections.abc import Callable

from ollm_bench.limits import drop_page_cache
from ollm_bench.memory import PeakMemory, disk_bytes_read
from ollm_bench.process import say, timed
from ollm_bench.rates import RawFiles
from ollm_bench.weights.records import Measured, Request
from ollm_bench.weights.subjects import Subject

_QUIET = 0.1
"""Seconds without a byte read after which reading ahead has come to its end."""


class Steps:
    """Seconds and bytes of steps. They run when this is made, in this thread."""

    def __init__(self, request: Request, subject: Subject, disk: RawFiles, memory: PeakMemory) -> None:
        """Take the first step of all apart, then those that the request asks for."""
        self._request, self._subject, self._disk, self._memory = request, subject, disk, memory
        self._ours = request.case.kind == "ollm"
        self._reads = request.case.kind != "memory"
        self._peaks: list[int] = []
        self._seconds: list[float] = []
        self._weights = self._kv = self._kernel = 0
        self._page_cache = ""
        say("the first step")
        with memory.window(self._peaks):
            self._first = timed(subject.step)
        self._read_raw()
        if request.case.prompt:
            self._take_prompt(request.case.prompt)
            return
        for number in range(request.steps):
            say(f"step {number + 1} of {request.steps}")
            self._take_one()

    def measured(self, *, load_seconds: float, load_peak: int) -> Measured:
        """All of it, with what loading took before."""
        count = len(self._seconds)
        kernel = self._kernel // count
        return Measured(
            rates=self._disk.rates if self._reads else None,
            first_seconds=self._first,
            step_seconds=self._seconds,
            bytes_per_step=(self._weights + self._kv) // count if self._ours else kernel,
            kernel_bytes_per_step=kernel,
            kv_bytes_per_step=self._kv // count,
            load_seconds=load_seconds,
            load_peak=load_peak,
            step_peak=max(self._peaks),
            page_cache=self._page_cache,
            memory_method=self._memory.method,
            mode=self._subject.mode,
            remark=self._subject.remark,
        )

    def _take_one(self) -> None:
        if self._ours:
            self._subject.step()  # else this one would find what was read ahead while the disk was measured
        self._measure(self._subject.step)

    def _take_prompt(self, tokens: int) -> None:
        say(f"a prompt of {tokens:,}")
        self._settle()
        self._measure(lambda: self._subject.take_prompt(tokens))

    def _measure(self, action: Callable[[], None]) -> None:
        if self._reads and not (self._ours and self._disk.direct):
            not_dropped = drop_page_cache()
            self._page_cache = f"not dropped: {not_dropped}" if not_dropped else "dropped before each step"
        before = self._counts()
        with self._memory.window(self._peaks):
            self._seconds.append(timed(action))
        if self._request.case.prompt:
            self._settle()
        weights, kv, kernel = (after - earlier for earlier, after in zip(before, self._counts(), strict=True))
        self._weights += weights
        self._kv += kv
        self._kernel += kernel
        self._read_raw()

    def _read_raw(self) -> None:
        if self._reads:
            self._disk.read()

    def _counts(self) -> tuple[int, int, int]:
        return self._subject.weights_read, self._subject.kv_read, disk_bytes_read()

    def _settle(self) -> None:
        """Until nothing is read ahead any more, so that what is counted is what was needed."""
        last = -1
        while (now := self._subject.weights_read) != last:
            last = now
            time.sleep(_QUIET)
