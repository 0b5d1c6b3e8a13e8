"""The plan of a cache: which strategy, where, in which mode, and what it will take. Pure: it can be made and printed
before a model is loaded, and carried out later by `ollm.api`.

Decides what is decided of a cache. Knows neither stores nor models, only what plugins state of themselves and what was
measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from ollm.contracts.blocks import EXTENT_BYTES
from ollm.contracts.options import NoOptions
from ollm.contracts.spill import KVGeometry, MemorySnapshot, SpillPlan, SpillPolicy
from ollm.contracts.strategy import BuildContext, KVFacts
from ollm.errors import ConfigurationError, PluginError
from ollm.plan.checks import check_budget, check_cache_dir, check_lifecycle, check_mode, check_window
from ollm.plan.facts import BlockVerdict, ModelFacts
from ollm.plan.request import CacheRequest
from ollm.registry import Kind, Offer, registry
from ollm.storage.options import BUFFER_BYTES, DEVICE_BUFFERS, MOST_READ_BYTES, PARTS_IN_FLIGHT, WRITE_BUFFERS
from ollm.units import format_size

_TRIAL_PIECE_TOKENS = 3
"""Fewer than a trial's prompts have."""
_FEWEST_PIECE_TOKENS, _MOST_PIECE_TOKENS = 256, 4096


@attrs.frozen(kw_only=True)
class CacheMemory:
    """What a cache of one sequence takes of memory at most, in bytes, beside what grows with the context: see
    `CachePlan.bytes_per_token` and `prompt_bytes_per_token`."""

    tails: int
    """The newest tokens of all layers, on the model's device."""
    activations: int
    """Of a piece of a prompt in one layer, on the model's device; 0 where layers take a prompt whole."""
    read_buffers: int
    """On the host; 0 for strategies that use no disk."""
    write_buffers: int
    """On the host, for a store that asks for as many as usual."""
    part_buffers: int
    """On the host: for reading what is left of extents that were cropped."""
    decoding: int
    """On the model's device: for an extent of a store that computes what it gives."""
    staging: int
    """On an accelerator: for what is copied there to be computed with."""
    resident_host: int
    """Copies of what is on disk. A limit: where less is free by then, less is kept."""
    resident_device: int
    """The same on an accelerator."""

    @property
    def total(self) -> int:
        """All of it, on host and device together."""
        return sum(attrs.astuple(self))


@attrs.frozen(kw_only=True)
class CachePlan:
    """What was decided of a cache. `str(plan)` is for people."""

    strategy: str
    """The KV strategy, by the shortest name that means it."""
    offer: Offer = attrs.field(repr=False)
    """That strategy, as its plugin offers it."""
    options: Any
    """Its options, checked."""
    directory: Path | None
    """Below which the cache makes a folder of its own; `None` for strategies that use no disk."""
    lifecycle: str
    window_tokens: int | None
    mode: str | None
    """`block` or `tensor`; `None` while a trial with the model is to decide."""
    mode_reason: str
    pieces: bool = False
    """Whether decoder layers take prompts in pieces; in block mode only."""
    piece_tokens: int
    """How many tokens of a prompt a layer takes at once, then."""
    spill_policy: str
    spill: SpillPlan
    model: ModelFacts
    free: MemorySnapshot
    """What this was planned with."""
    requested_mode: str
    ram_budget: int | None = None
    """As asked for."""

    @property
    def facts(self) -> KVFacts:
        """What the strategy states of itself."""
        facts = self.offer.strategy.facts
        assert facts is not None  # the registry refuses KV stores without
        return facts

    @property
    def geometry(self) -> KVGeometry:
        """The layers whose keys and values go to the store."""
        return self.model.geometry

    @property
    def disk_bytes_per_token(self) -> int:
        """Keys and values of one token and row in all stored layers: what they take on disk, but for headers and
        padding; a lossy strategy takes less. 0 without a disk."""
        return 0 if self.directory is None else self.geometry.bytes_per_token

    @property
    def memory(self) -> CacheMemory:
        """What the cache will take."""
        on_disk, staged = self.directory is not None, self.free.device_type != "cpu"
        return CacheMemory(
            tails=min(
                self.spill.flush_tokens * self.geometry.bytes_per_token,
                self.spill.flush_bytes * len(self.geometry.layers),
            ),
            activations=self.piece_tokens * self.model.activation_bytes * self._in_pieces,
            read_buffers=self.spill.read_buffers * BUFFER_BYTES * on_disk,
            write_buffers=WRITE_BUFFERS * BUFFER_BYTES * on_disk,
            part_buffers=PARTS_IN_FLIGHT * MOST_READ_BYTES * on_disk,
            decoding=EXTENT_BYTES * on_disk,
            staging=DEVICE_BUFFERS * BUFFER_BYTES * staged,
            resident_host=self.spill.resident_bytes * on_disk,
            resident_device=self.spill.resident_bytes_device * (on_disk and self.facts.lossless and staged),
        )

    @property
    def bytes_per_token(self) -> int:
        """Memory on the model's device that grows with the context, per token and row: without a disk, all keys and
        values; in tensor mode, those of the layer that attends, as two tensors."""
        stored = self.geometry.bytes_per_token if self.directory is None else 0
        attending = max((layer.bytes_per_token for layer in self.geometry.layers), default=0)
        return stored + (attending if self.mode == "tensor" else 0)

    @property
    def prompt_bytes_per_token(self) -> int:
        """Activations of a prompt that layers take whole, per token and row; 0 where they take it in pieces."""
        return 0 if self._in_pieces else self.model.activation_bytes

    @property
    def _in_pieces(self) -> bool:
        """Also while the trial is to come: it is what will be, where the model takes it."""
        return self.pieces or self.mode is None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know beforehand."""
        return tuple(self._warnings())

    def _warnings(self) -> Iterator[str]:
        if self.window_tokens is not None:
            yield (
                f"cache_strategy={self.strategy!r} keeps the newest {self.window_tokens} tokens only: the model "
                "forgets what is older, by intention."
            )
        total = _total(self.free)
        if self.ram_budget is not None and self.ram_budget > total:
            yield (
                f"ram_budget={format_size(self.ram_budget)} is more memory than there is, and taken for all of it, "
                f"{format_size(total)}."
            )

    def decided(self, verdict: BlockVerdict) -> CachePlan:
        """This plan with the mode that the trial's verdict allows.

        Raises:
            ConfigurationError: blocks were asked for, or are needed for a window, and the model does not take them.
        """
        if verdict.blocks:
            return attrs.evolve(self, mode="block", mode_reason=verdict.reason, pieces=verdict.pieces)
        if self.requested_mode == "block":
            raise ConfigurationError(f"mode='block': {self.model.name} cannot attend block by block: {verdict.reason}.")
        return self._in_tensor_mode(f"blocks do not work with this model: {verdict.reason}")

    def for_trial(self, *, pieces: bool) -> CachePlan:
        """The plan of a cache to try a model with: in block mode, its prompts in pieces or not, in memory, flushing all
        the time."""
        verdict = BlockVerdict(blocks=True, pieces=pieces, reason="on trial")
        # its keys and values stay on the device that they come from: nothing is to be staged
        model = attrs.evolve(self.model, device="cpu", verdict=verdict)
        request = CacheRequest(cache_strategy="resident", dense_projection_chunk_rows=_TRIAL_PIECE_TOKENS)
        plan = plan_cache(request, model, self.free)
        return attrs.evolve(plan, spill=SpillPlan(flush_tokens=2, flush_bytes=2**20))

    def _in_tensor_mode(self, reason: str) -> CachePlan:
        if not self.facts.full_history:
            asked = "mode='tensor' was " if self.requested_mode == "tensor" else ""
            raise ConfigurationError(
                f"cache_strategy={self.strategy!r} keeps a window, which needs mode='block'; {asked}{reason}."
            )
        return attrs.evolve(self, mode="tensor", mode_reason=reason)

    def __str__(self) -> str:
        rows = list(self._rows())
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {text}" for name, text in rows)

    def _rows(self) -> Iterator[tuple[str, str]]:
        layers, memory, facts = self.geometry.layers, self.memory, self.facts
        yield "strategy", f"{self.strategy}, {'lossless' if facts.lossless else 'lossy'}: {self.offer.strategy.summary}"
        yield "folder", f"one of its own in {self.directory}" if self.directory else "none, everything is in memory"
        yield "lifecycle", self.lifecycle
        yield "mode", f"{self.mode or 'not decided yet'}: {self.mode_reason}"
        yield "window", "none, every token is kept" if self.window_tokens is None else f"{self.window_tokens} tokens"
        yield "model", f"{self.model.name}, {len(layers)} layers to store, {self.model.dtype} on {self.model.device}"
        most = "" if facts.lossless else "at most "
        yield (
            "a token",
            (
                f"{most}{format_size(self.disk_bytes_per_token)} on disk"
                if self.directory
                else f"{format_size(self.geometry.bytes_per_token)} in memory"
            ),
        )
        yield (
            "spill policy",
            (
                f"{self.spill_policy}: a layer's tail is flushed at {self.spill.flush_tokens} tokens or "
                f"{format_size(self.spill.flush_bytes)}, {self.spill.hot_tokens} stay"
            ),
        )
        if self._in_pieces:
            prompts = (
                f"{self.piece_tokens} tokens at once in each layer{', in block mode' if self.mode is None else ''}"
            )
        else:
            prompts = f"whole in each layer, about {format_size(self.prompt_bytes_per_token)} for each of their tokens"
        yield "prompts", prompts
        free = f"{format_size(self.free.host_free)} free"
        if self.free.device_type != "cpu":
            free += f" on the host and {format_size(self.free.device_free)} on {self.model.device}"
        grows = f" and {format_size(self.bytes_per_token)} for each token" if self.bytes_per_token else ""
        yield "memory", f"at most {format_size(memory.total)}{grows}, for one sequence, of {free}"
        for field in attrs.fields(CacheMemory):
            yield f"  {field.name.replace('_', ' ')}", format_size(getattr(memory, field.name))
        for warning in self.warnings:
            yield "warning", warning


def plan_cache(request: CacheRequest, model: ModelFacts, free: MemorySnapshot) -> CachePlan:
    """The plan for a request, a model and what is free. Asks plugins for what they state and for their policies, which
    are pure functions too; their modules may be imported for that.

    Raises:
        ConfigurationError: for whatever does not fit together.
        PluginError: a spill policy failed, or answered what it must not.
    """
    names = registry()
    offer = names.get(Kind.KV_STORE, request.cache_strategy)
    name, facts = names.name_of(offer), offer.strategy.facts
    assert facts is not None  # the registry refuses KV stores without
    options = names.options(offer, request.options)
    check_mode(request.mode, request.dense_projection_chunk_rows)
    check_lifecycle(request.cache_lifecycle, name, facts)
    check_window(request.cache_window_tokens, name, facts)
    directory = check_cache_dir(request.cache_dir, name, facts)
    check_budget(request.ram_budget, name, facts)
    budget = None if request.ram_budget is None else min(request.ram_budget, _total(free))
    policy = names.get(Kind.SPILL_POLICY, request.spill_policy or facts.spill_policy)
    plan = CachePlan(
        strategy=name,
        offer=offer,
        options=options,
        directory=directory,
        lifecycle=request.cache_lifecycle,
        window_tokens=request.cache_window_tokens,
        mode=None,
        mode_reason="a trial decides, when the model is there",
        piece_tokens=request.dense_projection_chunk_rows or piece_tokens(model.activation_bytes, free.device_free),
        spill_policy=names.name_of(policy),
        spill=_ask(policy, model.geometry, free, budget),
        model=model,
        free=free,
        requested_mode=request.mode,
        ram_budget=request.ram_budget,
    )
    if request.mode == "tensor":
        return plan._in_tensor_mode("asked for")
    return plan if model.verdict is None else plan.decided(model.verdict)


def piece_tokens(per_token: int, free_bytes: int) -> int:
    """How many tokens of a prompt a layer takes at once, so that its activations, of `per_token` bytes, take a
    sixteenth of what is free.

    A multiple of the attention's tile where there is memory for that: its kernel then sees whole diagonals.
    """
    tokens = free_bytes // 16 // per_token
    return max(_FEWEST_PIECE_TOKENS, min(_MOST_PIECE_TOKENS, 1 << max(tokens.bit_length() - 1, 0)))


def _total(free: MemorySnapshot) -> int:
    """Memory of the machine, or as much as its limits allow, and that of an accelerator."""
    return free.host_total + (0 if free.device_type == "cpu" else free.device_total)


def _ask(policy: Offer, geometry: KVGeometry, free: MemorySnapshot, budget: int | None) -> SpillPlan:
    names = registry()
    built: SpillPolicy = names.build(policy, BuildContext(NoOptions()), SpillPolicy)
    with names.blaming(policy, "plan()"):
        plan = built.plan(geometry, free, budget)
    if not isinstance(plan, SpillPlan) or (
        budget is not None and plan.resident_bytes + plan.resident_bytes_device > budget
    ):
        raise PluginError(
            f"{policy.kind.label} '{names.name_of(policy)}': plan() answered {plan!r}: it must be a SpillPlan"
            + ("." if budget is None else f" within the budget of {budget} bytes.")
        )
    return plan
