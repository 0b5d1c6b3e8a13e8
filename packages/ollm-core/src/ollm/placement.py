"""Which decoder layers are placed where: asks a placement plugin, checks its answer, and records the truth."""

from __future__ import annotations

import attrs

from ollm.contracts.models import ModelParts
from ollm.contracts.offload import OffloadPlacement
from ollm.contracts.strategy import BuildContext
from ollm.errors import ConfigurationError, PluginError
from ollm.registry import Kind, registry


@attrs.frozen(kw_only=True)
class PlacementRecord:
    """What was asked for, what was decided, and what is true of the weights now."""

    target: str
    """The tier that was asked for: `cpu`."""
    requested_policy: str
    resolved_policy: str
    """What `auto` stood for."""
    requested_layers: int
    applied_layers: int
    """At most the layers that the model has."""
    layer_indices: tuple[int, ...]
    placed_bytes: int
    """Weights of the placed layers."""
    total_layers: int
    weights_on: str
    """Where all weights are now, the placed layers' included: this version does not stream weights, so every layer
    stays resident on the model's device and the placement takes effect once it does."""


def place_layers(parts: ModelParts, *, target: str, layers_num: int, policy: str, device: str) -> PlacementRecord:
    """Choose `layers_num` decoder layers with a placement plugin.

    Raises:
        ConfigurationError: for a count that is no whole number from 0 up, and for unknown policies (the choices, or
            the command that installs them, are in the message).
        PluginError: when the plugin answers with layers that do not exist, twice, or too many.
    """
    if not isinstance(layers_num, int) or isinstance(layers_num, bool) or layers_num < 0:
        raise ConfigurationError(f"layers_num={layers_num!r}: give the number of layers to place, 0 or more.")
    names = registry()
    offer = names.get(Kind.OFFLOAD_PLACEMENT, policy)
    placement: OffloadPlacement = names.build(offer, BuildContext(names.options(offer, {})), OffloadPlacement)
    sizes = [sum(weight.nbytes for weight in layer.parameters()) for layer in parts.layers]
    chosen = tuple(placement.place(sizes, count=layers_num, budget=None))
    if list(chosen) != sorted(set(chosen) & set(range(len(sizes)))) or len(chosen) > layers_num:
        raise PluginError(
            f"Offload placement '{names.name_of(offer)}' chose {chosen} for {layers_num} of {len(sizes)} layers."
        )
    return PlacementRecord(
        target=target,
        requested_policy=policy,
        resolved_policy=placement.resolves_to or names.name_of(offer),
        requested_layers=layers_num,
        applied_layers=len(chosen),
        layer_indices=chosen,
        placed_bytes=sum(sizes[index] for index in chosen),
        total_layers=len(sizes),
        weights_on=device,
    )
