"""`WeightStreamer`: gives each decoder layer of a model its weights when a forward pass enters it.

A layer is on disk, in host memory, or on the model's device. Hooks on the layers bind what is needed; the forward of
the module that holds them is wrapped, so that one forward runs at a time. `remove` undoes both (see `ollm.changes`);
nothing else of the model or of torch is changed. What others do to weights that are read again would be lost, and is
refused. Knows modules, layouts and memory; not transformers, not who chooses the layers.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
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
from ollm.weights.binding import Binding, LayerWeights, lost
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
        self._bindings = [
            Binding(layer, device, functools.partial(self._bring, index)) for index, layer in enumerate(layers)
        ]
        self._memory = WeightMemory(folder, device, [binding.layout for binding in self._bindings], self.counters)
        self._finalizer = weakref.finalize(self, self._memory.close)
        self._kept: set[int] = set()  # bound for good
        self._inside: tuple[int, OnDevice | None] | None = None  # the layer that computes, and its copy on the device
        self._stand_ins: dict[Hashable, tuple[Binding, Tensor]] | None = None
        with Changes() as changes:
            changes.wrap(decoder, self._one_at_a_time)
            for index, layer in enumerate(layers):
                changes.hook(layer.module.register_forward_pre_hook, functools.partial(self._enter, index))
                for module in {id(module): module for module, _ in self._bindings[index].owners}.values():
                    load = functools.partial(self._before_load, index)
                    changes.hook(module.register_load_state_dict_pre_hook, load)
            # whoever saves the model wants what it really has
            changes.hook(decoder.register_state_dict_pre_hook, self._decide)
            self.changes = changes.pop_all()
            """What is done to the model, and undone by `remove`."""

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
            WeightsError: a layer that is to leave memory was changed there by somebody, or cannot be compared with
                what the files hold; nothing was changed. Or a layer that comes cannot be read: what was to be kept
                is kept, all other layers are on disk.
        """
        with self._alone(reads=True), torch.inference_mode(False):
            self._leave()
            memory = self._memory
            wanted = {index: self._home(tier) for index, tier in enumerate(tiers) if tier is not Tier.DISK}
            going = [index for index, held in memory.held.items() if wanted.get(index) != held.device]
            coming = [index for index in wanted if index not in memory.held or index in going]
            self._check_room(coming, going, wanted)
            self._checkpoint.check_identity()
            for index in filter(self._bound_for_good, going):
                self._bindings[index].check_unchanged(memory.held[index].buffer, memory.read_again(index))
            memory.stop()
            self.before_first = None
            for index in going:
                self._drop(index)
            arrived: dict[int, Held] = {}
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
        with self._alone(reads=True):
            self._leave()
            self.changes.close()
            for index in list(self._memory.held):
                self._drop(index)
            self._memory.stop()
            end(self._finalizer)

    def check_present(self) -> None:
        """Have the layers placed, if nobody has chosen yet.

        Raises:
            WeightsError: one of them is not where the model computes.
        """
        with self._alone():
            for binding in self._bindings:
                binding.check_present()

    @property
    def absent(self) -> Iterator[nn.Parameter]:
        """The parameters of layers that are not in memory."""
        for index, binding in enumerate(self._bindings):
            if not self._bound_for_good(index):
                yield from (module.get_parameter(name) for module, name in binding.owners)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Meanwhile, one streamed layer of each kind stands in for all of its kind, so that a forward pass reads next
        to nothing: for trials that compare two ways through the model, whatever its weights. Other threads wait."""
        with self._alone():
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

    def _bring(self, index: int) -> bool:
        """Whether a layer is where the model computes, once it is decided."""
        with self._alone():
            self._decide()
            return self._bound_for_good(index)

    def _before_load(self, index: int, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Somebody loads numbers into a module of a layer."""
        names = [name for owner, name in self._bindings[index].owners if owner is module]
        if any(prefix + name in state_dict for name in names):
            self._bindings[index].check_present()

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
        self._kept.discard(index)
        self._bindings[index].unbind()
        self._bindings[index].forget()
        self._memory.drop(index)

    def _settle(self) -> None:
        """Make tiers, bindings and ring agree with what is held. Layers that stay are left as they are."""
        held = self._memory.held
        self.tiers = [Tier.DISK] * len(self._bindings)
        for binding in self._bindings:
            binding.forget()
        for index, layer in held.items():
            self.tiers[index] = Tier.DEVICE if layer.device == self._device else Tier.HOST
            if self._bound_for_good(index) and index not in self._kept:
                self._bindings[index].bind(layer.buffer)
                self._kept.add(index)
        self._memory.start(self._streamed())

    def _one_at_a_time(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._alone():
            self._begin()
            try:
                result = forward(*args, **kwargs)
                self._leave_unchanged()
                return result
            finally:
                self._leave()

    @contextmanager
    def _alone(self, *, reads: bool = False) -> Iterator[None]:
        """One thread at a time. In a forked child a thread of the parent may hold the lock for ever, and nobody reads.

        Args:
            reads: whether weights may have to be read, also where all layers are bound.

        Raises:
            WeightsError: this is a forked child, and the threads that read are its parent's.
        """
        process = os.getpid()
        if process != self._process and (reads or not self._all_bound):
            raise WeightsError("A model whose weights are streamed was used in a forked process: load it there.")
        if process != self._lock_process:
            self._lock, self._lock_process = threading.RLock(), process
        with self._lock:
            yield

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
        self._leave_unchanged()
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

    def _leave_unchanged(self) -> None:
        """The same as `_leave`.

        Raises:
            WeightsError: while the layer had its weights, somebody has changed them.
        """
        changed = self._leave()
        if changed is not None:
            raise lost(changed, "was changed while a forward pass computed with it")

    def _leave(self) -> str | None:
        """Take the weights of the layer that computed last, so that its slot is read into again. The name of one that
        was changed meanwhile, if any was."""
        if self._inside is None:
            return None
        index, copy = self._inside
        changed = self._bindings[index].unbind()
        if copy is not None:
            copy.leave()
        elif self._memory.ring is not None:
            self._memory.ring.release()
        self._inside = None  # after an interrupt before this all of it is done again
        return changed
