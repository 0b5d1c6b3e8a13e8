"""Runs cases one after the other, each in a new process, and keeps going when one of them dies. Prints nothing."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Generic

import attrs
import cattrs

from ollm.plugin import measure_memory
from ollm_bench.limits import memory_group
from ollm_bench.process import PROGRESS
from ollm_bench.records import C, Case, G, M, Outcome, Request

Progress = Callable[[int, Case, str], None]
"""Called with the index of a case, the case, and what it does now."""

LEAST_FREE_DISK = 256 * 2**20
"""Stores leave this much free and refuse to write otherwise."""
PROCESS_BYTES = 250 * 10**6
"""What Python with torch and transformers takes before there is a model."""

_KILLED = (-9, 137)
"""Killed by the kernel, and what a shell makes of that."""


@attrs.frozen(kw_only=True)
class Free:
    """What is free before a case starts, in bytes."""

    memory: int
    disk: int

    def why_refused(self, memory: int, disk: int) -> str:
        """Why what needs so much cannot fit; empty if it can."""
        for what, needs, has in (("memory", memory, self.memory), ("disk", disk, self.disk)):
            if needs > has:
                return f"needs {needs / 1e6:,.0f} MB of {what}, {has / 1e6:,.0f} MB free"
        return ""


@attrs.frozen(kw_only=True)
class Benchmark(Generic[C, G, M]):
    """What running its cases and showing them must know of a benchmark."""

    module: str
    """What the process of a case runs."""
    measured: type[M]
    """What it answers."""
    why_refused: Callable[[C, G, Free], str]
    """Why a case of a geometry cannot run with what is free; empty if it can."""
    judge: Callable[[Sequence[Outcome[C, M]], G, bool], list[Outcome[C, M]]]
    """The outcomes of a whole run with what was possible and verdicts; told whether the run had a memory limit."""
    step: str
    """What is done once in the seconds that are shown: `token` or `step`."""
    above: str
    """What the memory that is shown comes on top of."""


@contextmanager
def private_folder(cache_dir: Path) -> Iterator[Path]:
    """A new folder below `cache_dir`, which goes at the end whatever happened."""
    folder = Path(tempfile.mkdtemp(prefix="ollm-bench-", dir=cache_dir))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_cases(
    benchmark: Benchmark[C, G, M],
    cases: Sequence[C],
    geometry: G,
    *,
    folder: Path,
    steps: int,
    memory_limit: int | None,
    progress: Progress,
) -> list[Outcome[C, M]]:
    """One outcome for each case, in order.

    Raises:
        ConfigurationError: when there can be no memory limit here.
    """
    outcomes: list[Outcome[C, M]] = []
    for index, case in enumerate(cases):
        refused = benchmark.why_refused(case, geometry, free_now(folder, memory_limit))
        if refused:
            outcomes.append(Outcome(case=case, status="refused", reason=refused))
            continue
        request = Request(case=case, geometry=geometry, folder=str(folder), steps=steps)
        outcomes.append(_run(benchmark, request, memory_limit, functools.partial(progress, index, case)))
    return outcomes


def free_now(folder: Path, memory_limit: int | None) -> Free:
    """What a case may take: memory inside the limit, and the disk of `folder`."""
    import torch

    memory = measure_memory(torch.device("cpu")).host_free
    return Free(
        memory=memory if memory_limit is None else min(memory, memory_limit), disk=shutil.disk_usage(folder).free
    )


def _run(
    benchmark: Benchmark[C, G, M], request: Request[C, G], memory_limit: int | None, say: Callable[[str], None]
) -> Outcome[C, M]:
    command = [sys.executable, "-m", benchmark.module]
    # its answer goes to a file: a pipe that nobody reads while the process still speaks on stderr would stop it
    with memory_group(memory_limit) as group, tempfile.TemporaryFile("w+") as answer:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        try:
            if group is not None:
                group.add(process.pid)  # it waits for its request, so nothing large is allocated yet
            return _talk(process, answer, benchmark, request, say)
        finally:
            process.kill()
            process.communicate()


def _talk(
    process: subprocess.Popen[str],
    answer: IO[str],
    benchmark: Benchmark[C, G, M],
    request: Request[C, G],
    say: Callable[[str], None],
) -> Outcome[C, M]:
    assert process.stdin and process.stderr
    with suppress(BrokenPipeError):  # it died already; its exit code says how
        process.stdin.write(json.dumps(cattrs.unstructure(request)))
        process.stdin.close()
    process.stdin = None  # `communicate` would flush it again
    errors = deque[str](maxlen=20)
    for line in process.stderr:
        if line.startswith(PROGRESS):
            say(line.removeprefix(PROGRESS).rstrip())
        elif line.strip():
            errors.append(line.rstrip())
    code = process.wait()
    if code == 0:
        answer.seek(0)
        last = deque(answer, maxlen=1)  # what libraries print comes before it
        try:
            measured = cattrs.structure(json.loads("".join(last)), benchmark.measured)
        except Exception as error:  # json's and cattrs' errors have no common base
            reason = f"its answer cannot be read ({type(error).__name__}): {''.join(last).strip()[:80]!r}"
            return Outcome(case=request.case, status="failed", reason=reason)
        return Outcome(case=request.case, status="done", measured=measured)
    if code in _KILLED:
        return Outcome(case=request.case, status="killed", reason="the kernel killed it, most likely for memory")
    return Outcome(case=request.case, status="failed", reason=errors[-1] if errors else f"exit code {code}")


def _environment() -> dict[str, str]:
    """This process's, with the module search path as it is here."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
