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

import cattrs

from ollm.bench.case import PROGRESS
from ollm.bench.limits import memory_group
from ollm.bench.plan import Free, sample_bytes, why_refused
from ollm.bench.records import Case, Geometry, Measured, Outcome, Request

Progress = Callable[[int, Case, str], None]
"""Called with the index of a case, the case, and what it does now."""

_KILLED = (-9, 137)
"""Killed by the kernel, and what a shell makes of that."""


@contextmanager
def private_folder(cache_dir: Path) -> Iterator[Path]:
    """A new folder below `cache_dir`, which goes at the end whatever happened."""
    folder = Path(tempfile.mkdtemp(prefix="ollm-bench-", dir=cache_dir))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_cases(
    cases: Sequence[Case],
    geometry: Geometry,
    *,
    folder: Path,
    steps: int,
    memory_limit: int | None,
    progress: Progress,
) -> list[Outcome]:
    """One outcome for each case, in order.

    Raises:
        ConfigurationError: when there can be no memory limit here.
    """
    outcomes = []
    for index, case in enumerate(cases):
        refused = why_refused(case, geometry, _free(folder, memory_limit))
        if refused:
            outcomes.append(Outcome(case=case, status="refused", reason=refused))
            continue
        request = Request(
            case=case,
            geometry=geometry,
            folder=str(folder),
            steps=steps,
            sample_bytes=sample_bytes(geometry, case.tokens),
        )
        outcomes.append(_run(request, memory_limit, functools.partial(progress, index, case)))
    return outcomes


def _free(folder: Path, memory_limit: int | None) -> Free:
    import torch

    from ollm.memory import measure_memory

    memory = measure_memory(torch.device("cpu")).host_free
    return Free(
        memory=memory if memory_limit is None else min(memory, memory_limit), disk=shutil.disk_usage(folder).free
    )


def _run(request: Request, memory_limit: int | None, say: Callable[[str], None]) -> Outcome:
    command = [sys.executable, "-m", "ollm.bench.case"]
    with memory_group(memory_limit) as group:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        try:
            if group is not None:
                group.add(process.pid)  # it waits for its request, so nothing large is allocated yet
            return _talk(process, request, say)
        finally:
            process.kill()
            process.communicate()


def _talk(process: subprocess.Popen[str], request: Request, say: Callable[[str], None]) -> Outcome:
    assert process.stdin and process.stdout and process.stderr
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
    answer = process.stdout.read()
    code = process.wait()
    if code == 0:
        return Outcome(case=request.case, status="done", measured=cattrs.structure(json.loads(answer), Measured))
    if code in _KILLED:
        return Outcome(case=request.case, status="killed", reason="the kernel killed it, most likely for memory")
    return Outcome(case=request.case, status="failed", reason=errors[-1] if errors else f"exit code {code}")


def _environment() -> dict[str, str]:
    """This process's, with the module search path as it is here."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
