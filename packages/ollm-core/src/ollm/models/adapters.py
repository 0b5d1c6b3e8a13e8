"""Which model adapter is for a model: a third party's before ollm's own, `generic` last."""

from __future__ import annotations

from typing import Any

from ollm.contracts.models import ModelAdapter
from ollm.contracts.options import NoOptions
from ollm.contracts.strategy import BuildContext
from ollm.errors import PluginError
from ollm.registry import Kind, registry
from ollm.registry.kinds import RESERVED

_LAST = "generic"


def find_adapter(config: Any) -> tuple[str, ModelAdapter]:
    """Name and adapter for a config.

    Raises:
        PluginError: when several third parties claim the model, and when one fails; says what to do.
    """
    names = registry()
    matching: dict[str, ModelAdapter] = {}
    for offer in names.offers(Kind.MODEL_ADAPTER):
        adapter = names.build(offer, BuildContext(NoOptions()), ModelAdapter)
        with names.blaming(offer, "matches()"):
            matches = adapter.matches(config)
        if matches:
            matching[names.name_of(offer)] = adapter
    foreign = [name for name in matching if name not in RESERVED[Kind.MODEL_ADAPTER]]
    if len(foreign) > 1:
        raise PluginError(
            f"Several model adapters claim models of type {config.model_type!r}: {', '.join(foreign)}. "
            "Switch all but one off with OLLM_DISABLE_PLUGINS."
        )
    order = [*foreign, *(name for name in matching if name not in foreign and name != _LAST), _LAST]
    for name in order:
        if name in matching:
            return name, matching[name]
    raise PluginError("No model adapter is left: is ollm-core's own plugin switched off?")
