"""Carries out where decoder layers stay: measures what is free, asks `ollm.plan` for a plan, moves weights by it, and
records the truth. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ollm.contracts.offload import Tier
from ollm.errors import ConfigurationError, DeviceError
from ollm.io.devices import is_accelerator
from ollm.io.ledger import ledger
from ollm.plan.placement import PlacementPlan, PlacementRecord, Room, plan_fit, plan_placement
from ollm.weights.ring import RING_SLOTS
from ollm.weights.streamer import WeightStreamer


class Placer:
    """The placement of one loaded model. Until one is asked for, `fit` decides when the model or a cache needs it."""

    def __init__(self, streamer: WeightStreamer | None, layer_bytes: Sequence[int], device: torch.device) -> None:
        """`streamer` is `None` for a model that was loaded whole: its layers, of `layer_bytes` each, stay where they
        are, as the record then says."""
        self.record: PlacementRecord | None = None
        self._plan: PlacementPlan | None = None  # the latest that was carried out
        self._streamer = streamer
        self._sizes = list(layer_bytes) if streamer is None else streamer.layer_bytes
        self._device = device
        if streamer is not None:
            streamer.before_first = self._fit

    def decide(self) -> None:
        """Let `fit` decide now if nothing was decided yet.

        Raises:
            MemoryLimitError, WeightsError: as `WeightStreamer.place`.
        """
        if self.record is None:
            self._fit()

    def place(self, target: str, layers_num: int, policy: str) -> PlacementRecord:
        """Keep `layers_num` decoder layers on the tier `cpu` or `gpu` and stream all others; see the callers.

        Raises:
            ConfigurationError, PluginError: as `plan_placement`, and where the other tier was asked for before.
            DeviceError: for `gpu` where the model is on a CPU.
            MemoryLimitError: the layers do not fit; nothing was read or changed.
        """
        if target == "gpu" and not is_accelerator(self._device):
            raise DeviceError(
                "offload_layers_to_gpu: the model is on a CPU. Keep layers in its memory with offload_layers_to_cpu, "
                "or load the model with device='cuda:0'."
            )
        plan = plan_placement(target, layers_num, policy, self._sizes)
        if self.record is not None and self.record.target not in (target, "auto"):
            raise ConfigurationError(
                f"Layers were placed on the {self.record.target} before, and placing some on the {target} as well is "
                "not supported. Load the model again and place layers on one of them."
            )
        return self._carry_out(plan)

    def _fit(self) -> None:
        host = _room(torch.device("cpu")) if is_accelerator(self._device) else None
        self._carry_out(plan_fit(self._sizes, device=_room(self._device), host=host, slots=RING_SLOTS))

    def _carry_out(self, plan: PlacementPlan) -> PlacementRecord:
        try:
            if self._streamer is not None:
                self._streamer.place(plan.tiers)
        except BaseException:
            if self._plan is not None:  # the earlier one may be undone in part
                self.record = self._record(self._plan)
            raise
        record = self._record(plan)
        self._plan, self.record = plan, record
        return record

    def _record(self, plan: PlacementPlan) -> PlacementRecord:
        streamer = self._streamer
        if streamer is None:
            return PlacementRecord.of(plan, self._sizes, [Tier.DEVICE] * len(self._sizes), 0)
        return PlacementRecord.of(plan, self._sizes, streamer.tiers, streamer.streamed_bytes)


def _room(device: torch.device) -> Room:
    return Room(free=ledger.measure(device).device_free, claimable=ledger.room(device))
