"""`WeightStreamer`: gives each decoder layer of a model its weights when a forward pass enters it.

A layer is on disk, in host memory, or on the model's device. Hooks on the layers bind what is needed; the forward of
the module that holds them is wrapped, so that one forward runs at a time. `remove` undoes both (see `ollm.changes`);
nothing else of the model or of torch is changed. Knows modules, layouts and memory; not transformers, not who chooses
the layers.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ollm.changes import Changes
from ollm.contracts.offload import Tier
from ollm.endings import end
from ollm.errors import WeightsError
from ollm.io.device_ring import OnDevice
from ollm.io.ledger import ledger
from ollm.weights.binding import Binding, LayerWeights, on_meta
from ollm.weights.checkpoint import Checkpoint
from ollm.weights.counters import WeightCounters
from ollm.weights.memory import HOST, Held, WeightMemory


class WeightStreamer:
    """The decoder layers of one model. All of them are on disk until `place` is called."""

    def __init__(
        self,
        decoder: nn.Module,
        layers: Sequence[LayerWeights],
        checkpoint: Checkpoint,
        device: torch.device,
        folder: Path,
    ) -> None:
        """Hook the layers and wrap the decoder's forward; reads nothing.

        Args:
            decoder: the module whose forward calls the layers.
            layers: all of them, in order.
            checkpoint: where their weights are.
            device: where the model computes.
            folder: on the disk of the checkpoint.
        """
        self.counters = WeightCounters()
        self.tiers: list[Tier] = [Tier.DISK] * len(layers)
        """Where each layer is; changed by `place` alone."""
        self.before_first: Callable[[], None] | None = None
        """Called once, by the first forward pass that finds no placement chosen."""
        self._decoder = decoder
        self._device = device
        self._checkpoint = checkpoint
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._lock_process = self._process
        self._bindings = [Binding(layer, device) for layer in layers]
        self._memory = WeightMemory(folder, device, [binding.layout for binding in self._bindings], self.counters)
        self._finalizer = weakref.finalize(self, self._memory.close)
        self._inside: tuple[int, OnDevice | None] | None = None  # the layer that computes, and its copy on the device
        self._stand_ins: dict[Hashable, tuple[Binding, Tensor]] | None = None
        with Changes() as changes:
            changes.wrap(decoder, self._one_at_a_time)
            for index, layer in enumerate(layers):
                changes.hook(layer.module.register_forward_pre_hook(functools.partial(self._enter, index)))
            # whoever saves the model wants what it really has; torch states no types here
            changes.hook(decoder.register_state_dict_pre_hook(self._decide))  # type: ignore[no-untyped-call]
            self._changes = changes.pop_all()

    @property
    def layer_bytes(self) -> list[int]:
        """Bytes of each layer's weights in memory."""
        return [binding.layout.weight_bytes for binding in self._bindings]

    @property
    def streamed_bytes(self) -> int:
        """Bytes of weights that one forward pass reads."""
        return sum(self._bindings[index].layout.stored_bytes for index in self._streamed())

    def place(self, tiers: Sequence[Tier]) -> None:
        """Choose for every layer where it stays. Waits for a forward pass that is running in another thread.

        Raises:
            MemoryLimitError: it does not fit; nothing was changed.
            WeightsError: a layer cannot be read. What was to be kept is kept, all other layers are on disk.
        """
        self._check_process(reads=True)
        with self._lock, torch.inference_mode(False):
            self._leave()
            memory = self._memory
            wanted = {index: self._home(tier) for index, tier in enumerate(tiers) if tier is not Tier.DISK}
            going = [index for index, held in memory.held.items() if wanted.get(index) != held.device]
            coming = [index for index in wanted if index not in memory.held or index in going]
            self._check_room(coming, going, wanted)
            self._checkpoint.check_identity()
            self.before_first = None
            for index in going:
                self._drop(index)
            arrived: dict[int, Held] = {}
            memory.stop()
            try:
                for index in coming:
                    arrived[index] = memory.read(index, wanted[index])
                memory.held.update(arrived)
            except BaseException:
                for held in arrived.values():
                    held.claim.release()
                raise
            finally:
                self._settle()

    def remove(self) -> None:
        """Take everything off the model, whose decoder layers are left without weights. May be called until it has
        succeeded, and afterwards."""
        self._check_process(reads=True)
        with self._lock:
            self._leave()
            self._changes.close()
            for index in list(self._memory.held):
                self._drop(index)
            self._memory.stop()
            end(self._finalizer)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Meanwhile, one streamed layer of each kind stands in for all of its kind, so that a forward pass reads next
        to nothing: for trials that compare two ways through the model, whatever its weights. Other threads wait."""
        self._check_process()
        with self._lock:
            self._leave()
            self._memory.stop()
            self._memory.start(self._streamed())
            self._stand_ins = {}
            try:
                yield
            finally:
                self._leave()
                self._stand_ins = None

    def _home(self, tier: Tier) -> torch.device:
        return self._device if tier is Tier.DEVICE else HOST

    def _streamed(self) -> list[int]:
        return [index for index, tier in enumerate(self.tiers) if tier is Tier.DISK]

    def _bound_for_good(self, index: int) -> bool:
        held = self._memory.held.get(index)
        return held is not None and held.device == self._device

    def _check_room(self, coming: list[int], going: list[int], wanted: dict[int, torch.device]) -> None:
        sizes, count = [binding.layout.nbytes for binding in self._bindings], len(self._bindings)
        streamed = len(wanted) < count
        copied = sum(device == self._device for device in wanted.values()) < count
        for device in {HOST, self._device}:
            needed = sum(sizes[index] for index in coming if wanted[index] == device)
            needed += self._memory.missing(device, streamed=streamed, copied=copied)
            freed = sum(sizes[index] for index in going if self._memory.held[index].device == device)
            if needed > freed:
                ledger.check(f"{len(wanted)} resident layers, with slots for the others,", needed - freed, device)

    def _drop(self, index: int) -> None:
        self._bindings[index].unbind()
        self._bindings[index].forget()
        self._memory.drop(index)

    def _settle(self) -> None:
        """Make tiers, bindings and ring agree with what is held."""
        held = self._memory.held
        self.tiers = [Tier.DISK] * len(self._bindings)
        for binding in self._bindings:
            binding.forget()
            binding.hide(on_meta)
        for index, layer in held.items():
            self.tiers[index] = Tier.DEVICE if layer.device == self._device else Tier.HOST
            if self._bound_for_good(index):
                self._bindings[index].bind(layer.buffer)
        self._memory.start(self._streamed())

    def _one_at_a_time(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._check_process()
        with self._lock:
            self._begin()
            try:
                return forward(*args, **kwargs)
            finally:
                self._leave()

    def _check_process(self, *, reads: bool = False) -> None:
        """Comes before the lock is asked for: in a forked child a thread of the parent may hold it for ever, and nobody
        reads.

        Args:
            reads: also refuse where all layers are bound, and nothing would be read.

        Raises:
            WeightsError: this is a forked child, and the weights are read by threads that it has not.
        """
        process = os.getpid()
        if process == self._process:
            return
        if reads or not self._all_bound:
            raise WeightsError("A model whose weights are streamed was used in a forked process: load it there.")
        if process != self._lock_process:
            self._lock, self._lock_process = threading.RLock(), process

    def _begin(self) -> None:
        """Check what may have changed since the last forward pass."""
        self._decide()
        if self._all_bound:  # then nothing is read, as with any other model
            return
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self._decoder.parameters()):
            raise WeightsError(
                "Streamed weights are gone by the time a gradient needs them. Run the model under torch.no_grad() or "
                "torch.inference_mode(), as generate() does."
            )
        self._checkpoint.check_identity()

    @property
    def _all_bound(self) -> bool:
        return all(map(self._bound_for_good, range(len(self._bindings))))

    def _decide(self, *_: Any) -> None:
        """Have a placement chosen, if none was."""
        if self.before_first is not None:
            decide, self.before_first = self.before_first, None
            decide()

    def _enter(self, index: int, module: nn.Module, args: Any) -> None:
        """A forward pass has come to a layer: give it its weights, and take those of the layer before."""
        self._leave()
        self.counters.layers_entered += 1
        if self._bound_for_good(index):
            return
        memory = self._memory
        owner, buffer = self._in_host_memory(index)
        copy = None
        if memory.device_ring is not None:
            copy = memory.device_ring.copy([buffer[: owner.layout.nbytes]])
            (buffer,) = copy.tensors
            if memory.ring is not None:
                memory.ring.release(copy.wait_until_copied)
            elif self._stand_ins is not None:
                copy.wait_until_copied()
        self._bindings[index].bind(buffer, owner)
        self._inside = index, copy

    def _in_host_memory(self, index: int) -> tuple[Binding, Tensor]:
        """A buffer that holds the layer, and the layer whose weights they really are."""
        memory, binding = self._memory, self._bindings[index]
        if self.tiers[index] is not Tier.DISK:
            return binding, memory.held[index].buffer
        if self._stand_ins is not None:
            if binding.kind not in self._stand_ins:
                number = len(self._stand_ins) % len(memory.slots)
                if number == 0:  # more kinds than slots
                    self._stand_ins.clear()
                self._stand_ins[binding.kind] = binding, memory.fill(number, index)
            return self._stand_ins[binding.kind]
        if memory.ring is None:
            memory.start(self._streamed())
        assert memory.ring is not None
        self.counters.layers_streamed += 1
        return binding, memory.slots[memory.ring.take(index)]

    def _leave(self) -> None:
        """Take the weights of the layer that computed last, so that its slot is read into again."""
        if self._inside is None:
            return
        index, copy = self._inside
        self._bindings[index].unbind()
        if copy is not None:
            copy.leave()
        elif self._memory.ring is not None:
            self._memory.ring.release()
        self._inside = None  # after an interrupt before this all of it is done again
