"""Whether a model takes a cache at all: what transformers says of it, asked before anything is made.

Most do. Some keep a state of their own in its place, some keep nothing and compute each text anew, and `generate` says
so in many ways, or not at all. Knows models, not caches; no model is decided on by a name.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from ollm.errors import ConfigurationError
from ollm.seam.geometry import decoder_config, without_adapter

_CACHE = "past_key_values"
_CACHES_OF_PEFT = ("PREFIX_TUNING", "CARTRIDGE")
"""What PEFT calls those of its methods that put something into a cache, which they make."""


def check_takes_cache(model: Any) -> None:
    """Whether a cache can be given to a model.

    Raises:
        ConfigurationError: it cannot; says why, and what to do. And as `decoder_config`.
    """
    decoder_config(model)
    base = without_adapter(model)
    reason = _brings_a_cache(model) or _why_no_cache(base)
    if reason:
        raise ConfigurationError(
            f"{type(base).__name__} takes no cache for keys and values: {reason}. Call its generate() without {_CACHE}."
        )


def _brings_a_cache(model: Any) -> str:
    """Why a PEFT model uses no cache but its own; empty if it uses ours, or is none."""
    kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    name = str(getattr(kind, "value", kind))
    return f"its adapter ({name}) is a cache of its own" if name in _CACHES_OF_PEFT else ""


def _why_no_cache(model: Any) -> str:
    """Empty if it takes one, as far as one can tell without trying."""
    parts = [type(module) for module in model.modules() if isinstance(module, PreTrainedModel)]
    # a model of several parts may pass on what it does not name; what transformers did not make is the caller's affair
    if parts and not any(_CACHE in inspect.signature(part.forward).parameters for part in set(parts)):
        return f"its forward has no argument {_CACHE}"
    if not _generates_with_any_cache(type(model)):
        return "transformers generates with it without a cache, or with one of a kind of its own"
    return ""


def _generates_with_any_cache(kind: Any) -> bool:
    """What `generate` asks before it makes a `DynamicCache`. It goes by names of classes, so models without a head can
    be asked as well."""
    asked = getattr(kind, "_supports_default_dynamic_cache", None)
    return bool(asked() if asked else GenerationMixin._supports_default_dynamic_cache.__func__(kind))
