"""`disk_cache`: a request, a plan, a cache."""

# Without `from __future__ import annotations`: the signature shows types, not text.

from torch import nn

from ollm.api.facts import facts_of
from ollm.api.opening import open_cache
from ollm.api.showing import PrefillLine
from ollm.api.signature import CacheArguments, Progress, takes
from ollm.io.devices import resolve_device
from ollm.io.ledger import ledger
from ollm.plan import CachePlan, CacheRequest, plan_cache
from ollm.seam.cache import KVCache


def plan_for(model: nn.Module, request: CacheRequest) -> CachePlan:
    """The plan for a loaded model with the memory that is free now. Nothing is made; `open_cache` carries it out.

    Raises:
        ConfigurationError: for whatever does not fit together.
        DeviceError: the model is on a device that we cannot serve.
    """
    facts = facts_of(model)
    return plan_cache(request, facts, ledger.measure(resolve_device(facts.device)))


@takes(CacheArguments)
def disk_cache(model: nn.Module, request: CacheRequest, progress: Progress | None) -> KVCache:
    """A KV cache for any transformers model, to be passed as `model.generate(past_key_values=cache)`.

    Args:
        model: a loaded causal model, on one device.
        {arguments}

    Raises:
        ConfigurationError: for any wrong argument, and for a model that takes no cache, before anything is made.
        DeviceError: the model is on a device that is neither a CPU nor a CUDA device.
        CacheDirectoryError: when the folder cannot be made or is not safe.
        MemoryLimitError: no memory is free for the buffers that reading and writing need.
    """
    return open_cache(plan_for(model, request), model, progress or PrefillLine())
