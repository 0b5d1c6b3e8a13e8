"""Runs the cases one after the other, each in a process of its own, and says how far it is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import attrs
import cattrs
import torch

from ollm.bench.plan import Free, cases, why_it_cannot_fit
from ollm.bench.process import memory_cgroup
from ollm.bench.records import Case, Measured, Outcome, Request, Status
from ollm.memory import measure_memory

Say = Callable[[str], None]
_LAST_LINES = 5


def run(request: Request, say: Say) -> list[Outcome]:
    """Measure everything that fits.

    Args:
        request: what to measure.
        say: called with every step of the progress.
    """
    planned = cases(request)
    outcomes = []
    for number, case in enumerate(planned, 1):
        where = f"case {number} of {len(planned)}: {case.title}, {case.tokens:,} tokens"
        outcomes.append(_run(case, request, lambda text, where=where: say(f"{where}: {text}")))  # type: ignore[misc]
    return outcomes


def free_now(request: Request) -> Free:
    """Memory within the limit, and disk."""
    memory = measure_memory(torch.device("cpu")).host_free
    limit = request.memory_limit
    return Free(memory=min(memory, limit or memory), disk=shutil.disk_usage(request.folder).free)


def _run(case: Case, request: Request, say: Say) -> Outcome:
    reason = why_it_cannot_fit(case, free_now(request))
    if reason:
        say(f"refused: {reason}")
        return Outcome(case=case, status=Status.REFUSED, reason=reason)
    limit = request.memory_limit
    with nullcontext(None) if limit is None else memory_cgroup(limit) as group:
        return _in_process(attrs.evolve(case, cgroup=None if group is None else str(group)), say)


def _in_process(case: Case, say: Say) -> Outcome:
    command = [sys.executable, "-P", "-m", "ollm.bench.case"]  # no module of the current folder
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        try:
            process.stdin.write(json.dumps(cattrs.unstructure(case)))
            process.stdin.close()
            lines = []
            for line in process.stderr:
                lines.append(line.rstrip())
                say(lines[-1])
            answer = process.stdout.read()
        except BaseException:
            process.kill()
            raise
    _remove_leftovers(Path(case.folder))
    if process.returncode == 0:
        return Outcome(case=case, status=Status.DONE, measured=cattrs.structure(json.loads(answer), Measured))
    if process.returncode == -9:
        return Outcome(case=case, status=Status.KILLED, reason="the system killed it, probably for its memory")
    return Outcome(case=case, status=Status.FAILED, reason=" / ".join(lines[-_LAST_LINES:]))


def _remove_leftovers(folder: Path) -> None:
    """Of a process that was killed."""
    for path in folder.glob("ollm-bench-*"):
        shutil.rmtree(path, ignore_errors=True)
