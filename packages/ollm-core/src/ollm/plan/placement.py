"""Which decoder layers stay where: asks a placement plugin and checks its answer. Moves nothing, measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from ollm.contracts.offload import OffloadPlacement, Tier
from ollm.contracts.options import NoOptions
from ollm.contracts.strategy import BuildContext
from ollm.errors import ConfigurationError, PluginError
from ollm.registry import Kind, Offer, registry
from ollm.units import format_size

DEFAULT_POLICY = "fit"
"""What places layers where nobody calls for a placement."""


@attrs.frozen(kw_only=True)
class _Choice:
    """What was asked for, and which policy that means."""

    target: str
    """The tier that was asked for: `cpu` or `gpu`; `auto` where nobody asked."""
    requested_policy: str
    resolved_policy: str
    """What `auto` stood for."""
    requested_layers: int | None
    """`None` where nobody asked: as many as fit."""


@attrs.frozen(kw_only=True)
class PlacementPlan(_Choice):
    """What was asked for and decided of a model's layers."""

    tiers: tuple[Tier, ...]
    """For every layer where its weights are to be."""

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """The layers that are to stay in memory."""
        return tuple(index for index, tier in enumerate(self.tiers) if tier is not Tier.DISK)


@attrs.frozen(kw_only=True)
class PlacementRecord(_Choice):
    """What was asked for, what was decided, and what is true of the weights now."""

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

    def __str__(self) -> str:
        """In a line for people; `repr` has every field."""
        where = {"device": "where the model computes", "host": "in host memory", "disk": "read from disk"}
        counts = [f"{count} {where[tier]}" for tier in where if (count := self.tiers.count(tier))]
        kept = f"; in memory: {_ranges(self.layer_indices)}" if 0 < self.applied_layers < self.total_layers else ""
        policy = self.requested_policy
        policy += f" (here {self.resolved_policy})" if self.resolved_policy != policy else ""
        return (
            f"{self.total_layers} layers, placed by {policy}: {', '.join(counts) or 'none known'}{kept}. "
            f"{format_size(self.resident_bytes)} stay in memory, {format_size(self.streamed_bytes)} are read for every "
            "forward pass."
        )

    @classmethod
    def of(
        cls, plan: PlacementPlan, layer_bytes: Sequence[int], tiers: Sequence[Tier], streamed_bytes: int
    ) -> PlacementRecord:
        """A plan that was carried out, with the tiers that the layers are on now."""
        return cls(
            target=plan.target,
            requested_policy=plan.requested_policy,
            resolved_policy=plan.resolved_policy,
            requested_layers=plan.requested_layers,
            applied_layers=len(plan.layer_indices),
            layer_indices=plan.layer_indices,
            placed_bytes=sum(layer_bytes[index] for index in plan.layer_indices),
            total_layers=len(layer_bytes),
            tiers=tuple(tier.value for tier in tiers),
            resident_bytes=sum(size for size, tier in zip(layer_bytes, tiers, strict=True) if tier is not Tier.DISK),
            streamed_bytes=streamed_bytes,
        )


def _ranges(numbers: Sequence[int]) -> str:
    """`0, 2 to 5, 9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


@attrs.frozen(kw_only=True)
class Room:
    """Memory where layers may stay, in bytes."""

    free: int
    claimable: int
    """The largest claim that would be granted."""


def plan_placement(target: str, layers_num: int, policy: str, layer_bytes: Sequence[int]) -> PlacementPlan:
    """`layers_num` layers on the tier `cpu` or `gpu`, all others on disk.

    Raises:
        ConfigurationError: for a count that is no whole number from 0 up, and for unknown policies: the choices, or the
            command that installs them, are in the message.
        PluginError: when the plugin fails, or answers with layers that do not exist, twice, or too many.
    """
    if not isinstance(layers_num, int) or isinstance(layers_num, bool) or layers_num < 0:
        raise ConfigurationError(f"layers_num={layers_num!r}: give the number of layers to place, 0 or more.")
    placement = _Placement.named(policy)
    chosen = placement.ask(layer_bytes, count=layers_num, budget=None)
    tier = Tier.DEVICE if target == "gpu" else Tier.HOST
    return _plan(target, policy, placement.resolved, layers_num, dict.fromkeys(chosen, tier), layer_bytes)


def plan_fit(layer_bytes: Sequence[int], *, device: Room, host: Room | None, slots: int) -> PlacementPlan:
    """What fits, where nobody asked: the device is filled first, the host takes what it can of the rest.

    Args:
        layer_bytes: of every layer.
        device: the memory of the model's device.
        host: the host's; `None` where that is the same.
        slots: how many layers the others are read into at a time.
    """
    placement = _Placement.named(DEFAULT_POLICY)
    tiers: dict[int, Tier] = {}
    for tier, room in ((Tier.DEVICE, device), (Tier.HOST, host)):
        if room is None:
            continue
        left = [index for index in range(len(layer_bytes)) if index not in tiers]
        sizes = [layer_bytes[index] for index in left]
        chosen = placement.ask(sizes, count=None, budget=fit_budget(sizes, room, slots))
        tiers.update((left[number], tier) for number in chosen)
    return _plan("auto", DEFAULT_POLICY, placement.resolved, None, tiers, layer_bytes)


def fit_budget(layer_bytes: Sequence[int], room: Room, slots: int) -> int:
    """Bytes that `fit` gives to layers: three quarters of what is free, less the slots to read the others into. The
    last quarter is for keys and values, tails and activations."""
    budget = min(room.free * 3 // 4, room.claimable)
    if sum(layer_bytes) <= budget:
        return budget
    return max(budget - slots * max(layer_bytes), 0)


def _plan(
    target: str, requested: str, resolved: str, count: int | None, tiers: Mapping[int, Tier], layer_bytes: Sequence[int]
) -> PlacementPlan:
    return PlacementPlan(
        target=target,
        requested_policy=requested,
        resolved_policy=resolved,
        requested_layers=count,
        tiers=tuple(tiers.get(index, Tier.DISK) for index in range(len(layer_bytes))),
    )


@attrs.frozen
class _Placement:
    """A plugin's placement, whose answers are checked."""

    offer: Offer
    built: OffloadPlacement

    @classmethod
    def named(cls, policy: str) -> _Placement:
        offer = registry().get(Kind.OFFLOAD_PLACEMENT, policy)
        return cls(offer, registry().build(offer, BuildContext(NoOptions()), OffloadPlacement))

    @property
    def resolved(self) -> str:
        return self.built.resolves_to or registry().name_of(self.offer)

    def ask(self, sizes: Sequence[int], *, count: int | None, budget: int | None) -> tuple[int, ...]:
        with registry().blaming(self.offer, "place()"):
            chosen = tuple(self.built.place(sizes, count=count, budget=budget))
        answered = f"{self.offer.kind.label} '{registry().name_of(self.offer)}' chose {chosen!r}"
        most, real = len(sizes) if count is None else count, [index for index in chosen if type(index) is int]
        if list(chosen) != sorted(set(real) & set(range(len(sizes)))) or len(chosen) > most:
            raise PluginError(f"{answered}: it must be indices, ascending, for {most} of {len(sizes)} layers.")
        if budget is not None and sum(sizes[index] for index in chosen) > budget:
            raise PluginError(f"{answered}: these layers take more than {budget} bytes.")
        return chosen
