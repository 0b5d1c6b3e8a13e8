"""The memory of streamed weights: slots, resident layers, and what is claimed for them.

Holds no module, so that it can be given back when the model that it served is collected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from ollm.io.buffers import aligned_buffer
from ollm.io.device_ring import DeviceRing
from ollm.io.devices import is_accelerator
from ollm.io.ledger import Claim, ledger
from ollm.io.scheduler import IOScheduler, scheduler_of
from ollm.io.streams import CudaStreams
from ollm.weights.counters import WeightCounters
from ollm.weights.layout import Parameter, WeightLayout
from ollm.weights.ring import RING_SLOTS, Ring

HOST = torch.device("cpu")
_DEVICE_BUFFERS = 2
"""One is being computed with, one is filled."""


@attrs.define(eq=False)
class Held:
    """A resident layer."""

    buffer: Tensor
    claim: Claim

    @property
    def device(self) -> torch.device:
        return self.buffer.device


class WeightMemory:
    """What one model's weights take on the host and on its device."""

    def __init__(self, folder: Path, device: torch.device, layouts: list[WeightLayout], counters: WeightCounters):
        self.device = device
        self.held: dict[int, Held] = {}
        self.ring: Ring | None = None
        self.slots: list[Tensor] = []
        self.device_ring: DeviceRing | None = None
        self._layouts = layouts
        self._counters = counters
        self._scheduler = scheduler_of(folder)
        self._slots_claim: Claim | None = None

    @property
    def on_accelerator(self) -> bool:
        return is_accelerator(self.device)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: the largest layer."""
        return max(layout.nbytes for layout in self._layouts)

    def missing(self, device: torch.device, *, streamed: bool, copied: bool) -> int:
        """Bytes that slots and device buffers still need on a device.

        Args:
            device: the host or the model's.
            streamed: whether any layer is to be read from disk.
            copied: whether any is to be copied to the accelerator each time.
        """
        slots = RING_SLOTS if device == HOST and streamed and not self.slots else 0
        if self.on_accelerator and device == self.device and copied and self.device_ring is None:
            slots += _DEVICE_BUFFERS
        return slots * self.slot_bytes

    def read(self, index: int, device: torch.device) -> Held:
        """Bring a layer into memory of its own.

        Raises:
            MemoryLimitError: so much is not free.
            WeightsError: it cannot be read.
        """
        layout = self._layouts[index]
        claim = ledger.claim("Resident weights", layout.nbytes, device)
        try:
            buffer = _read(layout, self._scheduler, self._counters, pinned=self.on_accelerator)
            held = Held(buffer if device == HOST else buffer.to(device), claim)
            claim.used = held.buffer.numel()
            return held
        except BaseException:
            claim.release()
            raise

    def read_again(self, index: int) -> Tensor:
        """What the files hold of a layer, for comparison, in memory that nobody keeps.

        Raises:
            MemoryLimitError: so much is not free.
            WeightsError: it cannot be read.
        """
        layout = self._layouts[index]
        ledger.check("Weights to compare with", layout.nbytes, HOST)
        return _read(layout, self._scheduler, self._counters, pinned=False)

    def fill(self, number: int, index: int) -> Tensor:
        """Read a layer into a slot, when nothing else reads into slots. Returns the slot.

        Raises:
            WeightsError: it cannot be read.
        """
        _read_into(self.slots[number], self._layouts[index], self._scheduler, self._counters)
        return self.slots[number]

    def drop(self, index: int) -> None:
        """Give a resident layer's memory back."""
        self.held.pop(index).claim.release()

    def stop(self) -> None:
        """Read nothing more."""
        if self.ring is not None:
            self.ring.close()
            self.ring = None

    def start(self, streamed: list[int]) -> None:
        """Be ready to read these layers, in this order; without any, give the slots back. Only when stopped.

        Raises:
            MemoryLimitError: the slots find no room.
        """
        if not streamed:
            self._free_slots()
        elif not self.slots:
            self._slots_claim = ledger.claim("Slots for streamed weights", RING_SLOTS * self.slot_bytes, HOST)
            try:
                self.slots = [aligned_buffer(self.slot_bytes, pinned=self.on_accelerator) for _ in range(RING_SLOTS)]
            except BaseException:
                self._free_slots()
                raise
            self._slots_claim.used = RING_SLOTS * self.slot_bytes
        if self.on_accelerator and self.device_ring is None and any(map(self._is_copied, range(len(self._layouts)))):
            self.device_ring = DeviceRing(
                "Device buffers for weights", self.device, self.slot_bytes, CudaStreams(self.device),
                count=_DEVICE_BUFFERS,
            )  # fmt: skip
        if streamed:
            reads = {index: self._layouts[index].reads for index in streamed}
            self.ring = Ring(reads, self.slots, self._scheduler, self._counters)

    def close(self) -> None:
        """Give everything back, without waiting. May be called until it has succeeded, and afterwards."""
        if self.ring is not None:
            self.ring.abandon()
            self.ring = None
        for index in list(self.held):
            self.drop(index)
        self._free_slots()
        if self.device_ring is not None:
            self.device_ring.close()
            self.device_ring = None
        self._scheduler.release()

    def _is_copied(self, index: int) -> bool:
        """Whether a layer is copied to the accelerator each time."""
        return index not in self.held or self.held[index].device != self.device

    def _free_slots(self) -> None:
        self.slots = []
        if self._slots_claim is not None:
            self._slots_claim.release()
            self._slots_claim = None


def read_apart(parameters: Sequence[Parameter], device: torch.device) -> Iterator[tuple[Parameter, Tensor]]:
    """Parameters that belong to no layer, each in memory of its own on `device`.

    Raises:
        MemoryLimitError: they do not fit; none is read.
        WeightsError: names the tensor and the file that cannot be read.
    """
    layouts = [WeightLayout([parameter]) for parameter in parameters]
    if not layouts:
        return
    claim = ledger.claim("Embeddings and what else is in no layer", sum(layout.nbytes for layout in layouts), device)
    scheduler = scheduler_of(parameters[0].sources[0].stored.file.path.parent)
    try:
        for layout in layouts:
            buffer = _read(layout, scheduler, WeightCounters(), pinned=False)
            claim.used += layout.nbytes
            yield layout.parameters[0], layout.views(buffer)[0].to(device)
    finally:
        scheduler.release()
        claim.release()


def _read(layout: WeightLayout, scheduler: IOScheduler, counters: WeightCounters, *, pinned: bool) -> Tensor:
    """A new buffer with everything in it that a layout describes."""
    buffer = aligned_buffer(layout.nbytes, pinned=pinned)
    _read_into(buffer, layout, scheduler, counters)
    return buffer


def _read_into(buffer: Tensor, layout: WeightLayout, scheduler: IOScheduler, counters: WeightCounters) -> None:
    ring = Ring({0: layout.reads}, [buffer], scheduler, counters)
    try:
        ring.take(0)
    finally:
        ring.close()
