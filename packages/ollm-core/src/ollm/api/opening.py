"""Carries a cache's plan out: folder, storage, store, session, model, cache. If a step fails, what was done before it
is undone, in one place."""

from __future__ import annotations

import functools
import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from ollm.api.facts import decoder_layers, try_blocks
from ollm.contracts.kv import KVStore
from ollm.contracts.options import format_parameters
from ollm.contracts.strategy import KVBuildContext
from ollm.errors import PluginError
from ollm.io.devices import is_accelerator
from ollm.io.ledger import ledger
from ollm.kv.session import KVSession
from ollm.plan import CachePlan
from ollm.registry import registry
from ollm.seam.cache import KVCache
from ollm.seam.geometry import decoder_config
from ollm.seam.mode import switch_on
from ollm.seam.watch import watch
from ollm.storage.folder import CacheFolder
from ollm.storage.options import WRITE_BUFFERS, StorageOptions
from ollm.storage.segments import SegmentedStorage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from ollm.kv.state import PrefillProgress

logger = logging.getLogger(__name__)


def open_cache(plan: CachePlan, model: nn.Module, progress: Callable[[PrefillProgress], None] | None = None) -> KVCache:
    """The cache that was planned, for the model that it was planned for. Where the plan leaves the mode open, a trial
    with a few tokens decides it first.

    Args:
        plan: from `plan_cache`.
        model: on the device of the plan.
        progress: in block mode, called after every piece of every layer of a prefill.

    Raises:
        ConfigurationError: the trial's verdict is not what was asked for; nothing was made.
        CacheDirectoryError: when the folder cannot be made or is not safe.
        MemoryLimitError: no memory is free for the buffers that reading and writing need.
        PluginError: the store is not what its plugin says.
    """
    if plan.mode is None:
        plan = plan.decided(try_blocks(model, lambda pieces: _open(plan.for_trial(pieces=pieces), model)))
    cache = _open(plan, model)
    cache.progress = progress
    for warning in (*plan.warnings, *cache.what_stays_in_memory()):
        logger.warning("%s", warning)
    return cache


def _open(plan: CachePlan, model: nn.Module) -> KVCache:
    switch = None
    if plan.mode == "block":
        switch = functools.partial(switch_on, model, decoder_layers(model) if plan.pieces else ())
    with ExitStack() as undo:
        cache = KVCache(
            decoder_config(model),
            _open_session(plan, undo),
            spill_policy=plan.spill_policy,
            lossless=plan.facts.lossless,
            switch_on=switch,
            changes=[functools.partial(watch, model)],
            mode_reason=plan.mode_reason,
        )
        undo.pop_all()
    cache.piece_tokens = plan.piece_tokens if plan.pieces else None
    return cache


def _open_session(plan: CachePlan, undo: ExitStack) -> KVSession:
    """Make what is below the cache; `undo` takes all of it away again."""
    device = torch.device(plan.model.device)
    folders: list[Path] = []

    def folder() -> CacheFolder:
        if plan.directory is None:
            raise PluginError(f"KV store '{plan.strategy}' asks for a folder, but its facts name no `directory`.")
        made = CacheFolder.create(plan.directory.parent, plan.directory.name)
        undo.callback(made.close)
        folders.append(made.path)
        return made

    def storage(*, write_buffers: int = WRITE_BUFFERS, compact_from: int = 1) -> SegmentedStorage:
        made = SegmentedStorage(
            folder(),
            strategy=plan.strategy,
            options=plan.options if isinstance(plan.options, StorageOptions) else None,
            parameters=format_parameters(plan.options),
            write_buffers=write_buffers,
            compact_from=compact_from,
            pinned=is_accelerator(device),
        )
        undo.callback(made.close)
        return made

    context = KVBuildContext(
        options=plan.options,
        geometry=plan.geometry,
        device=device,
        window_tokens=plan.window_tokens,
        storage=storage,
        folder=folder,
    )
    store: KVStore = registry().build(plan.offer, context, KVStore)
    undo.callback(store.close)
    if store.window != plan.window_tokens:
        raise PluginError(
            f"KV store '{plan.strategy}' has window={store.window!r}, cache_window_tokens={plan.window_tokens!r}."
        )
    claims = []
    for purpose, nbytes in (("tails", plan.memory.tails), ("activations", plan.memory.activations)):
        # so that others plan without it; it is needed all the same
        claim = ledger.try_claim(purpose, nbytes, device) if nbytes else None
        if claim is not None:
            undo.callback(claim.release)
            claims.append(claim)
    session = KVSession(
        store,
        plan.spill,
        strategy=plan.strategy,
        layers=[layer.layer for layer in plan.geometry.layers],
        lossless=plan.facts.lossless,
        device=device,
        directory=folders[0] if folders else None,
        claims=claims,
    )
    undo.callback(session.close)
    return session
