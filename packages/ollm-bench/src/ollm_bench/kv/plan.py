"""Which cases a run has, and which of them cannot fit. Pure arithmetic: measures nothing, starts nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from ollm_bench.kv.records import Case, Geometry
from ollm_bench.run import LEAST_FREE_DISK, PROCESS_BYTES, Free

STRATEGY_BYTES = 300 * 10**6
"""What a strategy may take beside what it keeps resident, and so what is set aside for it."""
SLACK_TOKENS = 64
"""Room in a cache beyond the tokens that it is filled with and those that are decoded."""
WARM_UP_STEPS = 2

_LEAST_SAMPLE, _MOST_SAMPLE = 64 * 2**20, 2**30


def plan_cases(
    geometry: Geometry,
    tokens: Sequence[int],
    strategies: Sequence[str],
    *,
    steps: int,
    ram_budget: int | None,
    forks: int = 1,
    lossy: Collection[str] = (),
) -> list[Case]:
    """Every case in the order of running: the baselines around those that are compared with them.

    Args:
        geometry, tokens, strategies, steps, ram_budget: what to measure.
        forks: how many continuations decode at once in one more case of each strategy, if more than one.
        lossy: the strategies whose bytes are not known beforehand, so that there is no half of them.
    """
    cases = [Case(kind="disk", tokens=max(tokens))]
    for count in tokens:
        cases += [Case(kind="static", tokens=count), Case(kind="dynamic", tokens=count)]
        for strategy in strategies:
            cases += [
                Case(
                    kind="strategy",
                    tokens=count,
                    strategy=strategy,
                    residency=name,
                    ram_budget=budget,
                    lossless=strategy not in lossy,
                )
                for name, budget in _budgets(geometry, count, steps, ram_budget)
                if not (name == "half" and strategy in lossy)
            ]
            cases.append(Case(kind="static", tokens=count))  # again: the machine drifts, too
            if forks > 1:
                budget = ram_budget or 0
                residency = "budget" if budget else "nothing"
                cases.append(
                    Case(
                        kind="strategy", tokens=count, strategy=strategy, residency=residency, ram_budget=budget,
                        forks=forks, lossless=strategy not in lossy,
                    )
                )  # fmt: skip
    return cases


def _budgets(geometry: Geometry, tokens: int, steps: int, ram_budget: int | None) -> Iterator[tuple[str, int]]:
    if ram_budget is not None:
        yield ("budget", ram_budget) if ram_budget else ("nothing", 0)
        return
    yield "nothing", 0
    yield "half", geometry.kv_bytes(tokens) // 2
    yield "everything", geometry.kv_bytes(cache_tokens(tokens, steps))


def cache_tokens(tokens: int, steps: int) -> int:
    """Tokens that a cache must have room for."""
    return tokens + WARM_UP_STEPS + steps + SLACK_TOKENS


def sample_bytes(geometry: Geometry, tokens: int) -> int:
    """Size of the file that raw rates are measured with: what the case reads, within reason, in whole reads."""
    wanted = min(max(geometry.kv_bytes(tokens), _LEAST_SAMPLE), _MOST_SAMPLE)
    return wanted - wanted % (4 * 2**20)


def why_refused(case: Case, geometry: Geometry, free: Free) -> str:
    """Why a case cannot fit; empty if it can."""
    return free.why_refused(memory_needed(case, geometry), disk_needed(case, geometry))


def memory_needed(case: Case, geometry: Geometry) -> int:
    """Bytes of memory, the model included."""
    everything, layer = geometry.kv_bytes(case.tokens), geometry.layer_bytes(case.tokens)
    cache = {
        "disk": 0,
        "static": everything,
        "dynamic": everything + 2 * layer,  # a step copies a layer's keys and values to append to them
        "strategy": (case.ram_budget or 0) + STRATEGY_BYTES,
    }[case.kind]
    return cache + (0 if case.kind == "disk" else PROCESS_BYTES + geometry.model_bytes)


def disk_needed(case: Case, geometry: Geometry) -> int:
    """Bytes on disk: the file of the raw rates, a quarter of it again for a second write, and the cache."""
    if case.kind in ("static", "dynamic"):
        return 0
    cache = geometry.kv_bytes(case.tokens) if case.kind == "strategy" else 0
    return sample_bytes(geometry, case.tokens) * 5 // 4 + cache + LEAST_FREE_DISK
