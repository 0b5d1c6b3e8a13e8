"""Outputs that transformers records with hooks of its own, once anybody has asked for one: `output_router_logits` and
others. The hooks stay on a model and do nothing until a forward pass is asked again. Knows whose they are, and when.
"""

from __future__ import annotations

from typing import Any

from transformers.utils import output_capturing


def records_now() -> bool:
    """Whether this forward pass records outputs."""
    return bool(output_capturing._active_collector.get())


def is_recorder(hook: Any) -> bool:
    """Whether a hook is one of those, which listens only while something is recorded."""
    return getattr(hook, "__module__", None) == output_capturing.__name__
