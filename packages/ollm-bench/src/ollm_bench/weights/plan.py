"""Which cases a run has, and which of them cannot fit. Pure arithmetic: measures nothing, starts nothing."""

from __future__ import annotations

from ollm_bench.run import LEAST_FREE_DISK, PROCESS_BYTES, Free
from ollm_bench.weights.records import Case, Geometry

BESIDE_BYTES = 200 * 10**6
"""What streaming may take beside slots, resident layers, embeddings and keys and values."""
KV_BYTES = 300 * 10**6
"""What keys and values on the disk may take in memory."""
SLOTS = 3
"""Layers that streaming may have in memory at a time, beside those that are resident."""

_MOST_SAMPLE = 2**30


def plan_cases(geometry: Geometry, *, resident: int | None, kv_tokens: int, prompt: int) -> list[Case]:
    """Every case in the order of running.

    Args:
        geometry: the model.
        resident: layers that stay in memory in one of the cases; `None` for half of them.
        kv_tokens: also measure with keys and values of so many tokens on the disk, unless 0.
        prompt: also measure a prompt of so many tokens, unless 0.
    """
    memory = Case(kind="memory")
    some = len(geometry.layer_bytes) // 2 if resident is None else resident
    placements = [0, *([some] if some else []), None]
    cases = [Case(kind="disk"), memory, Case(kind="mapped"), Case(kind="accelerate")]
    cases += [Case(kind="ollm", resident=count) for count in placements]
    for more in ({"kv_tokens": kv_tokens}, {"prompt": prompt}):
        if any(more.values()):
            cases += [Case(kind="memory", **more), Case(kind="ollm", resident=0, **more)]
    return [*cases, memory]  # again: the machine drifts, too


def sample_bytes(geometry: Geometry) -> int:
    """How much of the checkpoint is read to measure the disk: what a step reads, within reason."""
    return min(sum(geometry.layer_bytes), _MOST_SAMPLE)


def why_refused(case: Case, geometry: Geometry, free: Free) -> str:
    """Why a case cannot fit; empty if it can."""
    return free.why_refused(memory_needed(case, geometry), _disk_needed(case, geometry))


def streamed_bytes(case: Case, geometry: Geometry) -> int:
    """Bytes of the layers that are not resident: of the smallest ones, where layers differ."""
    return sum(sorted(geometry.layer_bytes)[: len(geometry.layer_bytes) - (case.resident or 0)])


def most_memory(case: Case, geometry: Geometry) -> int:
    """The most that a case of ollm may take: resident layers, slots, embeddings, and a fixed amount."""
    weights = sum(geometry.layer_bytes) - streamed_bytes(case, geometry) + geometry.other_bytes
    kv = KV_BYTES if case.kv_tokens or case.prompt else 0
    return weights + SLOTS * max(geometry.layer_bytes) + BESIDE_BYTES + kv


def memory_needed(case: Case, geometry: Geometry) -> int:
    """Bytes of memory that a case cannot do without; what is mapped need not be there at once."""
    needed = {
        "disk": 0,
        "memory": geometry.model_bytes + geometry.kv_bytes_per_token * case.kv_tokens,
        "mapped": max(geometry.layer_bytes),
        "accelerate": geometry.other_bytes + max(geometry.layer_bytes),
        "ollm": min(most_memory(case, geometry), geometry.model_bytes + BESIDE_BYTES),
    }[case.kind]
    return needed + (0 if case.kind == "disk" else PROCESS_BYTES)


def _disk_needed(case: Case, geometry: Geometry) -> int:
    """Beside the checkpoint, which is there."""
    tokens = case.kv_tokens + case.prompt if case.kind == "ollm" else 0
    return geometry.kv_bytes_per_token * tokens + LEAST_FREE_DISK if tokens else 0
