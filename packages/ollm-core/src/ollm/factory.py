"""`disk_cache`: from names and options to a `KVCache`, everything checked before anything is made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cattrs

from ollm.contracts.kv import KVStore
from ollm.contracts.spill import SpillPlan, SpillPolicy
from ollm.contracts.strategy import BuildContext, KVBuildContext, KVFacts
from ollm.errors import ConfigurationError, PluginError
from ollm.kv.session import KVSession
from ollm.memory import measure_memory
from ollm.registry import Kind, Offer, registry
from ollm.seam.cache import KVCache
from ollm.seam.geometry import decoder_config, kv_geometry
from ollm.storage.folder import RunFolder
from ollm.storage.options import StorageOptions
from ollm.storage.segments import SegmentedStorage
from ollm.units import parse_size

if TYPE_CHECKING:
    from torch import nn

LIFECYCLES = ("runtime-scoped", "persistent")


def disk_cache(
    model: nn.Module,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_strategy: str = "chunked",
    cache_lifecycle: str = "runtime-scoped",
    cache_window_tokens: int | None = None,
    ram_budget: int | str | None = None,
    spill_policy: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> KVCache:
    """A KV cache for any transformers model, to be passed as `model.generate(past_key_values=cache)`.

    Args:
        model: a loaded causal model, on one device.
        cache_dir: where the folder `kv_cache_<strategy>` goes; made if it is missing. Not used by `resident`.
        cache_strategy: a KV strategy; `ollm plugins` lists them.
        cache_lifecycle: `runtime-scoped`: the folder goes with the cache. `persistent` is not built yet.
        cache_window_tokens: for strategies that keep a window only.
        ram_budget: memory for keys and values beyond the tail, in bytes or as `"512MiB"`; `0` keeps nothing
            resident; by default the spill policy decides from what is free.
        spill_policy: by default the one that the strategy names.
        options: the strategy's own options, see `ollm plugins -v`.

    Raises:
        ConfigurationError: for any wrong argument, before anything is made.
        CacheDirectoryError: when the folder cannot be made or is not safe.
    """
    config = decoder_config(model)
    names = registry()
    offer = names.get(Kind.KV_STORE, cache_strategy)
    name, facts = names.name_of(offer), offer.strategy.facts
    assert facts is not None  # the registry refuses KV stores without
    settings = names.options(offer, {} if options is None else options)
    _check_lifecycle(cache_lifecycle, name, facts)
    _check_window(cache_window_tokens, name, facts)
    directory = _check_cache_dir(cache_dir, name, facts)
    budget = _check_budget(ram_budget, name, facts)
    policy = names.get(Kind.SPILL_POLICY, spill_policy or facts.spill_policy)
    parameter = next(model.parameters())
    geometry = kv_geometry(config, parameter.dtype)
    plan = _plan(policy, geometry, parameter.device, budget)

    def storage() -> SegmentedStorage:
        if directory is None or facts.directory is None:
            raise PluginError(f"KV store '{name}' asks for storage, but its facts name no `directory`.")
        shared = settings if isinstance(settings, StorageOptions) else None
        folder = RunFolder.create(directory, facts.directory)
        return SegmentedStorage(folder, strategy=name, options=shared, parameters=cattrs.unstructure(settings))

    context = KVBuildContext(options=settings, geometry=geometry, device=parameter.device, storage=storage)
    store = names.build(offer, context, KVStore)
    session = KVSession(
        store,
        plan,
        strategy=name,
        layers=len(geometry.layers),
        keep_resident=facts.lossless and facts.directory is not None,
    )
    try:
        return KVCache(config, session, spill_policy=names.name_of(policy), lossless=facts.lossless)
    except BaseException:
        session.close()
        raise


def _check_lifecycle(lifecycle: str, name: str, facts: KVFacts) -> None:
    if lifecycle not in LIFECYCLES:
        raise ConfigurationError(f"cache_lifecycle={lifecycle!r}: choose one of {', '.join(LIFECYCLES)}.")
    if lifecycle == "persistent":
        if facts.directory is None:
            raise ConfigurationError(
                f"cache_lifecycle='persistent' with cache_strategy={name!r}: that strategy keeps nothing on disk."
            )
        raise ConfigurationError(
            "cache_lifecycle='persistent' is not built yet: use 'runtime-scoped'. "
            "(Its folder layout is fixed in docs/reference/on-disk-format.md.)"
        )


def _check_window(window: int | None, name: str, facts: KVFacts) -> None:
    if facts.full_history and window is not None:
        windowed = [
            registry().name_of(offer)
            for offer in registry().offers(Kind.KV_STORE)
            if offer.strategy.facts and not offer.strategy.facts.full_history
        ]
        raise ConfigurationError(
            f"cache_window_tokens={window!r} with cache_strategy={name!r}: that strategy keeps the full history. "
            f"Strategies that keep a window: {', '.join(windowed) or 'none is installed'}."
        )
    if not facts.full_history:
        raise ConfigurationError(
            f"cache_strategy={name!r} keeps a window, which needs block-wise attention; this version does not have it."
        )


def _check_budget(ram_budget: int | str | None, name: str, facts: KVFacts) -> int | None:
    if ram_budget is None:
        return None
    if facts.directory is None:
        raise ConfigurationError(
            f"ram_budget={ram_budget!r} with cache_strategy={name!r}: that strategy keeps everything in memory. "
            "Choose one that uses the disk, such as 'chunked'."
        )
    return parse_size(ram_budget, "ram_budget")


def _check_cache_dir(cache_dir: str | os.PathLike[str] | None, name: str, facts: KVFacts) -> Path | None:
    if facts.directory is None:
        return None
    if cache_dir is None or not os.fspath(cache_dir):
        raise ConfigurationError(
            f"cache_dir={cache_dir!r}: cache_strategy={name!r} keeps keys and values on disk, so name a folder for "
            "them, such as './kv_cache/'."
        )
    return Path(cache_dir).absolute()


def _plan(policy: Offer, geometry: Any, device: Any, budget: int | None) -> SpillPlan:
    names = registry()
    settings = names.options(policy, {})
    built: SpillPolicy = names.build(policy, BuildContext(settings), SpillPolicy)
    plan = built.plan(geometry, measure_memory(device), budget)
    if not isinstance(plan, SpillPlan) or (budget is not None and plan.resident_bytes > budget):
        raise PluginError(
            f"Spill policy '{names.name_of(policy)}' answered {plan!r}: it must be a SpillPlan within the budget of "
            f"{budget} bytes."
        )
    return plan
