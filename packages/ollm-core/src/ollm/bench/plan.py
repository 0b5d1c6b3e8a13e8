"""Which cases a request means, and whether each can fit. Pure: what is free is passed in."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from ollm.bench.records import Case, Request, Resident
from ollm.units import format_size

BASELINES = ("DynamicCache", "StaticCache")
_PROCESS_BYTES = 500 * 2**20
"""An interpreter with torch and transformers, and a prompt's activations."""
_ENGINE_BYTES = 300 * 2**20
"""What a cache with nothing resident may take."""


@attrs.frozen(kw_only=True)
class Free:
    """What there is. Bytes."""

    memory: int
    disk: int


def cases(request: Request) -> list[Case]:
    """Everything to be measured, in order."""
    return [case for tokens in request.tokens for case in _cases_at(request, tokens)]


def why_it_cannot_fit(case: Case, free: Free) -> str:
    """What it needs and what there is; empty if it fits."""
    kv_bytes = case.tokens * case.geometry.bytes_per_token
    memory = _PROCESS_BYTES + case.geometry.model_bytes
    if case.on_disk:
        memory += _ENGINE_BYTES + min(case.ram_budget, kv_bytes)
    else:
        one_layer = kv_bytes // case.geometry.layers
        memory += kv_bytes + (2 if case.name == "DynamicCache" else 1) * one_layer
    if memory > free.memory:
        return f"needs {format_size(memory)} of memory, {format_size(free.memory)} are free"
    disk = kv_bytes + min(kv_bytes, 2**30) + 2**28 if case.on_disk else 0
    if disk > free.disk:
        return f"needs {format_size(disk)} on the disk, {format_size(free.disk)} are free"
    return ""


def _cases_at(request: Request, tokens: int) -> Iterator[Case]:
    for name in BASELINES:
        yield _case(request, tokens, name, Resident.POINTLESS, 0)
    kv_bytes = tokens * request.geometry.bytes_per_token
    for name in request.strategies:
        if name == "resident":
            yield attrs.evolve(_case(request, tokens, name, Resident.ALL, kv_bytes))
        elif request.ram_budget is not None:
            yield _case(request, tokens, name, Resident.BUDGET, request.ram_budget)
        else:
            yield _case(request, tokens, name, Resident.NOTHING, 0)
            yield _case(request, tokens, name, Resident.HALF, kv_bytes // 2)
            # with room for what is appended while it is measured
            yield _case(request, tokens, name, Resident.ALL, kv_bytes + kv_bytes // 8 + 2**26)


def _case(request: Request, tokens: int, name: str, resident: Resident, budget: int) -> Case:
    return Case(
        name=name, tokens=tokens, resident=resident, ram_budget=budget, geometry=request.geometry,
        steps=request.steps, folder=str(request.folder),
    )  # fmt: skip
