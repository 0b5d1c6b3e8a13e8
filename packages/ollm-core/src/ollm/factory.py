"""`disk_cache`: from names and options to a `KVCache`, everything checked before anything is made."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cattrs
import torch

from ollm.adapters import find_adapter
from ollm.arguments import check_budget, check_cache_dir, check_lifecycle, check_mode, check_window
from ollm.contracts.kv import KVStore
from ollm.contracts.spill import KVGeometry, MemorySnapshot, SpillPlan, SpillPolicy
from ollm.contracts.strategy import BuildContext, KVBuildContext
from ollm.errors import ConfigurationError, OllmError, PluginError
from ollm.kv.session import KVSession
from ollm.kv.state import PrefillProgress
from ollm.memory import Claim, ledger
from ollm.registry import Kind, Offer, registry
from ollm.seam.cache import KVCache
from ollm.seam.geometry import decoder_config, kv_geometry, without_adapter
from ollm.seam.mode import switch_on, why_not_blocks
from ollm.seam.prefill import activation_bytes, piece_rows
from ollm.seam.support import check_takes_cache
from ollm.storage.folder import RunFolder
from ollm.storage.options import StorageOptions
from ollm.storage.segments import SegmentedStorage
from ollm.storage.write_behind import BUFFERS

if TYPE_CHECKING:
    from torch import nn


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
    mode: str = "auto",
    dense_projection_chunk_rows: int | None = None,
    progress: Callable[[PrefillProgress], None] | None = None,
) -> KVCache:
    """A KV cache for any transformers model, to be passed as `model.generate(past_key_values=cache)`.

    Args:
        model: a loaded causal model, on one device.
        cache_dir: where the folder `kv_cache_<strategy>` goes; made if it is missing. Not used by `resident`.
        cache_strategy: a KV strategy; `ollm plugins` lists them.
        cache_lifecycle: `runtime-scoped`: the folder goes with the cache. `persistent` is not built yet.
        cache_window_tokens: for strategies that keep a window only.
        ram_budget: memory for keys and values beyond the tail, in bytes or as `"512MiB"`; `0` keeps nothing
            resident; by default the spill policy decides from what is free. Where less is free by the time it is
            needed, less is kept.
        spill_policy: by default the one that the strategy names.
        options: the strategy's own options, see `ollm plugins -v`.
        mode: `block`: attention reads keys and values block by block, so that memory does not grow with the context;
            `tensor`: it gets all of one layer's at a time, which works for every model; `auto`: blocks where a trial
            with a few tokens shows that the model takes them.
        dense_projection_chunk_rows: in block mode, how many tokens of a prompt a layer takes at once; by default as
            many as keep its activations within a sixteenth of the free memory, at most 4096.
        progress: in block mode, called after every piece of every layer of a prefill.

    Raises:
        ConfigurationError: for any wrong argument, and for a model that takes no cache, before anything is made.
        CacheDirectoryError: when the folder cannot be made or is not safe.
        MemoryLimitError: no memory is free for the buffers that reading and writing need.
    """
    check_takes_cache(model)
    config = decoder_config(model)
    names = registry()
    offer = names.get(Kind.KV_STORE, cache_strategy)
    name, facts = names.name_of(offer), offer.strategy.facts
    assert facts is not None  # the registry refuses KV stores without
    settings = names.options(offer, {} if options is None else options)
    check_mode(mode, dense_projection_chunk_rows)
    check_lifecycle(cache_lifecycle, name, facts)
    check_window(cache_window_tokens, name, facts)
    directory = check_cache_dir(cache_dir, name, facts)
    budget = check_budget(ram_budget, name, facts)
    policy = names.get(Kind.SPILL_POLICY, spill_policy or facts.spill_policy)
    parameter = next(model.parameters())
    geometry = kv_geometry(config, parameter.dtype)
    memory = ledger.measure(parameter.device)
    plan = _plan(policy, geometry, memory, budget)
    per_token = activation_bytes(config, parameter.dtype.itemsize)
    rows = dense_projection_chunk_rows or piece_rows(per_token, memory.device_free)

    folders: list[Path] = []

    def folder() -> RunFolder:
        if directory is None or facts.directory is None:
            raise PluginError(f"KV store '{name}' asks for a folder, but its facts name no `directory`.")
        made = RunFolder.create(directory, facts.directory)
        folders.append(made.path)
        return made

    def storage(*, write_buffers: int = BUFFERS) -> SegmentedStorage:
        return SegmentedStorage(
            folder(),
            strategy=name,
            options=settings if isinstance(settings, StorageOptions) else None,
            parameters=cattrs.unstructure(settings),
            write_buffers=write_buffers,
            pinned=parameter.device.type == "cuda",
        )

    layers, reason = _choose_mode(model, config, mode)
    if layers is None and not facts.full_history:
        raise ConfigurationError(f"cache_strategy={name!r} keeps a window, which needs mode='block'; {reason}.")
    context = KVBuildContext(
        options=settings,
        geometry=geometry,
        device=parameter.device,
        window_tokens=cache_window_tokens,
        storage=storage,
        folder=folder,
    )
    store = names.build(offer, context, KVStore)
    if store.window != cache_window_tokens:
        store.close()
        raise PluginError(
            f"KV store '{name}' has window={store.window!r}, cache_window_tokens={cache_window_tokens!r}."
        )
    tails = min(plan.flush_tokens * geometry.bytes_per_token, plan.flush_bytes * len(geometry.layers))
    claims = _claim({"tails": tails, "activations": rows * per_token}, parameter.device)
    try:
        session = KVSession(
            store,
            plan,
            strategy=name,
            layers=[layer.layer for layer in geometry.layers],
            lossless=facts.lossless,
            device=parameter.device,
            directory=folders[0] if folders else None,
            claims=claims,
        )
    except BaseException:
        for claim in claims:
            claim.release()
        store.close()
        raise
    try:
        return _make_cache(model, config, session, layers, spill_policy=names.name_of(policy), lossless=facts.lossless,
            mode_reason=reason, piece_rows=rows, progress=progress)  # fmt: skip
    except BaseException:
        session.close()
        raise


def _claim(sizes: Mapping[str, int], device: torch.device) -> list[Claim]:
    """What a cache will need for a while, so that others plan without it; what is not free is needed all the same."""
    claims = (ledger.try_claim(purpose, nbytes, device) for purpose, nbytes in sizes.items())
    return [claim for claim in claims if claim is not None]


def _make_cache(
    model: nn.Module,
    config: Any,
    session: KVSession,
    layers: Sequence[nn.Module] | None,
    *,
    piece_rows: int | None,
    progress: Callable[[PrefillProgress], None] | None,
    **facts: Any,
) -> KVCache:
    """A cache in block mode, with the model switched to it, or in tensor mode where `layers` is `None`."""
    if layers is None:
        return KVCache(config, session, **facts)
    cache = KVCache(config, session, switch_on=functools.partial(switch_on, model, layers), **facts)
    cache.piece_rows, cache.progress = piece_rows, progress
    return cache


def _choose_mode(model: nn.Module, config: Any, mode: str) -> tuple[Sequence[nn.Module] | None, str]:
    """The decoder layers that take prompts in pieces (perhaps none), or `None` for tensor mode; and why."""
    if mode == "tensor":
        return None, "asked for"

    def trial_cache() -> KVCache:
        names = registry()
        offer = names.get(Kind.KV_STORE, "resident")
        context = KVBuildContext(
            options=names.options(offer, {}),
            geometry=kv_geometry(config, torch.float32),
            device=torch.device("cpu"),
            window_tokens=None,
            storage=lambda: None,  # type: ignore[arg-type,return-value]
            folder=lambda: None,  # type: ignore[arg-type,return-value]
        )
        plan = SpillPlan(flush_tokens=2, flush_bytes=2**20)
        store = names.build(offer, context, KVStore)
        session = KVSession(store, plan, strategy="trial", layers=())
        return KVCache(config, session, spill_policy="trial", lossless=True, switch_on=lambda: lambda: None)

    layers = _decoder_layers(model)
    reason = why_not_blocks(model, trial_cache, layers)
    if reason and layers:  # perhaps it only takes no pieces
        whole = why_not_blocks(model, trial_cache, ())
        if not whole:
            return (), f"a trial gave the same logits as stock attention, but not for prompts in pieces: {reason}"
    if not reason:
        return layers, "a trial gave the same logits as stock attention"
    if mode == "block":
        raise ConfigurationError(f"mode='block': {type(model).__name__} cannot attend block by block: {reason}.")
    return None, f"blocks do not work with this model: {reason}"


def _decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The model's decoder layers, as its adapter knows them; none if no adapter does."""
    try:
        return find_adapter(model.config)[1].parts(without_adapter(model)).layers
    except OllmError:
        return ()


def _plan(policy: Offer, geometry: KVGeometry, memory: MemorySnapshot, budget: int | None) -> SpillPlan:
    names = registry()
    settings = names.options(policy, {})
    built: SpillPolicy = names.build(policy, BuildContext(settings), SpillPolicy)
    plan = built.plan(geometry, memory, budget)
    if not isinstance(plan, SpillPlan) or (
        budget is not None and plan.resident_bytes + plan.resident_bytes_device > budget
    ):
        raise PluginError(
            f"Spill policy '{names.name_of(policy)}' answered {plan!r}: it must be a SpillPlan within the budget of "
            f"{budget} bytes."
        )
    return plan
