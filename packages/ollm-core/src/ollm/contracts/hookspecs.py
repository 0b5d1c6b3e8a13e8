"""The hooks of the pluggy project `ollm`. This file is a specification: it holds no code.

A plugin is a module named by one entry point in the group `ollm`. It holds `ollm_api_version = 1` and
functions marked with `ollm.plugin.hookimpl`. It must import neither torch nor transformers: what is heavy
is imported by `Strategy.build` when the strategy is used, and by running a `Command`.
"""

from collections.abc import Iterable

import pluggy

from ollm.contracts.commands import Command
from ollm.contracts.kv import KVStore
from ollm.contracts.models import ModelAdapter
from ollm.contracts.offload import OffloadPlacement
from ollm.contracts.spill import SpillPolicy
from ollm.contracts.strategy import Strategy

PROJECT = "ollm"
"""The pluggy project name, and the entry-point group in which plugins are found."""

API_VERSION = 1
"""The version of hooks and contracts. A plugin states the one it was written for as `ollm_api_version`."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def ollm_kv_stores() -> Iterable[Strategy[KVStore]]:
    """Offer KV strategies: where the keys and values of full-attention layers live.

    Each strategy carries `KVFacts` and its `build` takes a `KVBuildContext` and returns a `KVStore`.
    Used by `Inference.DiskCache(cache_strategy=...)` and `ollm.disk_cache`.
    """


@hookspec
def ollm_spill_policies() -> Iterable[Strategy[SpillPolicy]]:
    """Offer spill policies: when the in-memory tail is flushed, and how many bytes stay resident.

    Each strategy's `build` takes a `BuildContext` and returns a `SpillPolicy`.
    Used by `Inference.DiskCache(spill_policy=...)` and as the default that a KV strategy names.
    """


@hookspec
def ollm_offload_placements() -> Iterable[Strategy[OffloadPlacement]]:
    """Offer offload placements: which decoder layers are kept in the tier that the caller names.

    Each strategy's `build` takes a `BuildContext` and returns an `OffloadPlacement`.
    Used by `Inference.offload_layers_to_cpu(policy=...)` and `offload_layers_to_gpu`, and the one named `fit` where
    neither is called.
    """


@hookspec
def ollm_model_adapters() -> Iterable[Strategy[ModelAdapter]]:
    """Offer model adapters: where a model family keeps its decoder layers and what its checkpoint calls them.

    Each strategy's `build` takes a `BuildContext` and returns a `ModelAdapter`.
    Used by `Inference` and `AutoInference` for the model that they load. The adapter named `generic` is asked last.
    """


@hookspec
def ollm_commands() -> Iterable[Command]:
    """Offer commands: what `ollm` runs by a name, beside the commands of core.

    Each names the typer app or the function that it runs, which is imported only then: `ollm --help` and `ollm plugins`
    show its summary without it.
    """
