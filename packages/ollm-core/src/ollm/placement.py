"""Which decoder layers stay where: asks a placement plugin, checks its answer, carries it out, records the truth."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from ollm.contracts.offload import OffloadPlacement
from ollm.contracts.strategy import BuildContext
from ollm.errors import ConfigurationError, DeviceError, PluginError
from ollm.io.ledger import ledger
from ollm.registry import Kind, registry
from ollm.weights.ring import RING_SLOTS
from ollm.weights.streamer import Tier, WeightStreamer

DEFAULT_POLICY = "fit"
"""What places layers where nobody calls for a placement."""


@attrs.frozen(kw_only=True)
class PlacementRecord:
    """What was asked for, what was decided, and what is true of the weights now."""

    target: str
    """The tier that was asked for: `cpu` or `gpu`; `auto` where nobody asked."""
    requested_policy: str
    resolved_policy: str
    """What `auto` stood for."""
    requested_layers: int | None
    """`None` where nobody asked: as many as fit."""
    applied_layers: int
    """At most the layers that the model has."""
    layer_indices: tuple[int, ...]
    placed_bytes: int
    """Memory of the placed layers."""
    total_layers: int
    tiers: tuple[str, ...]
    """For every layer where its weights are between forward passes: `device` (the model's), `host` or `disk`."""
    resident_bytes: int
    """Memory of all layers that are in memory."""
    streamed_bytes: int
    """Weights that every forward pass, so every generated token, reads from disk."""


class Placer:
    """The placement of one loaded model. Until one is asked for, `fit` decides when the model or a cache needs it."""

    def __init__(self, streamer: WeightStreamer | None, layer_bytes: Sequence[int], device: torch.device) -> None:
        """`streamer` is `None` for a model that was loaded whole: its layers, of `layer_bytes` each, stay where they
        are, as the record then says."""
        self.record: PlacementRecord | None = None
        self._streamer = streamer
        self._sizes = list(layer_bytes) if streamer is None else streamer.layer_bytes
        self._device = device
        if streamer is not None:
            streamer.before_first = self._fit

    def settle(self) -> None:
        """Let `fit` decide now if nothing was decided yet.

        Raises:
            MemoryLimitError, WeightsError: as `WeightStreamer.place`.
        """
        if self.record is None:
            self._fit()

    def place(self, target: str, layers_num: int, policy: str) -> PlacementRecord:
        """Keep `layers_num` decoder layers on the tier `cpu` or `gpu` and stream all others; see the callers.

        Raises:
            ConfigurationError: for a count that is no whole number from 0 up, for unknown policies (the choices, or
                the command that installs them, are in the message), and where the other tier was asked for before.
            DeviceError: for `gpu` where the model is on a CPU.
            PluginError: when the plugin answers with layers that do not exist, twice, or too many.
            MemoryLimitError: the layers do not fit; nothing was read or changed.
        """
        if target == "gpu" and self._device.type == "cpu":
            raise DeviceError(
                "offload_layers_to_gpu: the model is on a CPU. Keep layers in its memory with offload_layers_to_cpu, "
                "or load the model with device='cuda:0'."
            )
        if not isinstance(layers_num, int) or isinstance(layers_num, bool) or layers_num < 0:
            raise ConfigurationError(f"layers_num={layers_num!r}: give the number of layers to place, 0 or more.")
        if self.record is not None and self.record.target not in (target, "auto"):
            raise ConfigurationError(
                f"Layers were placed on the {self.record.target} before, and placing some on the {target} as well is "
                "not supported. Load the model again and place layers on one of them."
            )
        name, placement = _find(policy)
        chosen = _ask(placement, name, self._sizes, count=layers_num, budget=None)
        tier = Tier.DEVICE if target == "gpu" else Tier.HOST
        return self._carry_out(target, policy, placement.resolves_to or name, layers_num, dict.fromkeys(chosen, tier))

    def _fit(self) -> None:
        """The device is filled first; on an accelerator, host memory takes what it can of the rest."""
        name, placement = _find(DEFAULT_POLICY)
        tiers: dict[int, Tier] = {}
        homes = [(Tier.DEVICE, self._device)]
        if self._device.type != "cpu":
            homes.append((Tier.HOST, torch.device("cpu")))
        for tier, device in homes:
            left = [index for index in range(len(self._sizes)) if index not in tiers]
            sizes = [self._sizes[index] for index in left]
            chosen = _ask(placement, name, sizes, count=None, budget=fit_budget(sizes, device))
            tiers.update((left[number], tier) for number in chosen)
        self._carry_out("auto", DEFAULT_POLICY, placement.resolves_to or name, None, tiers)

    def _carry_out(
        self, target: str, requested: str, resolved: str, count: int | None, tiers: dict[int, Tier]
    ) -> PlacementRecord:
        streamer, now = self._streamer, [Tier.DEVICE] * len(self._sizes)
        if streamer is not None:
            streamer.place([tiers.get(index, Tier.DISK) for index in range(len(self._sizes))])
            now = streamer.tiers
        self.record = PlacementRecord(
            target=target,
            requested_policy=requested,
            resolved_policy=resolved,
            requested_layers=count,
            applied_layers=len(tiers),
            layer_indices=tuple(sorted(tiers)),
            placed_bytes=sum(self._sizes[index] for index in tiers),
            total_layers=len(self._sizes),
            tiers=tuple(tier.value for tier in now),
            resident_bytes=sum(size for size, tier in zip(self._sizes, now, strict=True) if tier is not Tier.DISK),
            streamed_bytes=streamer.streamed_bytes if streamer is not None else 0,
        )
        return self.record


def fit_budget(layer_bytes: Sequence[int], device: torch.device) -> int:
    """Bytes that `fit` gives to layers on a device: three quarters of what is free, less the slots to read the others
    into. The last quarter is for keys and values, tails and activations."""
    budget = min(ledger.measure(device).device_free * 3 // 4, ledger.room(device))
    if sum(layer_bytes) <= budget:
        return budget
    return max(budget - RING_SLOTS * max(layer_bytes), 0)


def _find(policy: str) -> tuple[str, OffloadPlacement]:
    names = registry()
    offer = names.get(Kind.OFFLOAD_PLACEMENT, policy)
    placement: OffloadPlacement = names.build(offer, BuildContext(names.options(offer, {})), OffloadPlacement)
    return names.name_of(offer), placement


def _ask(
    placement: OffloadPlacement, name: str, sizes: Sequence[int], *, count: int | None, budget: int | None
) -> tuple[int, ...]:
    chosen = tuple(placement.place(sizes, count=count, budget=budget))
    most = len(sizes) if count is None else count
    if list(chosen) != sorted(set(chosen) & set(range(len(sizes)))) or len(chosen) > most:
        raise PluginError(f"Offload placement '{name}' chose {chosen} for {most} of {len(sizes)} layers.")
    if budget is not None and sum(sizes[index] for index in chosen) > budget:
        raise PluginError(f"Offload placement '{name}' chose {chosen}, which take more than {budget} bytes.")
    return chosen
