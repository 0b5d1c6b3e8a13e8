"""`Staging`: raw bytes on their way from the host to an accelerator, copied on a stream of their own.

Nothing here waits: the copy stream waits for the kernel that read a device buffer before it overwrites it, the compute
stream waits for the copy, and who wants to reuse the host's bytes gets what waits for the copy. Streams and events are
passed in, so that the order of all this can be tested without an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from ollm.io.ledger import ledger
from ollm.io.streams import Streams

SLOTS = 3
"""Device buffers: one is being computed with, one is filled, one waits."""


@attrs.define(eq=False)
class _Slot:
    """A device buffer, and the event after the last kernel that used its memory."""

    buffer: Tensor
    free: Any


class Staging:
    """A ring of device buffers. For one thread."""

    def __init__(self, device: torch.device, nbytes: int, streams: Streams) -> None:
        """Buffers of `nbytes` each on `device`; larger ones are made when they are needed.

        Raises:
            MemoryLimitError: the device has no room.
        """
        self._device = device
        self._streams = streams
        self._claim = ledger.claim("Staging buffers", SLOTS * nbytes, device)
        self._slots = [
            _Slot(torch.empty(nbytes, dtype=torch.uint8, device=device), streams.computing().record_event())
            for _ in range(SLOTS)
        ]
        self._claim.used = SLOTS * nbytes
        self._next = 0

    @contextmanager
    def on_device(self, tensors: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], Callable[[], None]]]:
        """Contiguous host tensors as tensors on the device, for kernels that are started in the `with` block.

        The second is what waits until the host's bytes are no longer read.
        """
        slot = self._slots[self._next]
        self._next = (self._next + 1) % SLOTS
        self._streams.copying.wait_event(slot.free)
        needed = sum(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)
        with self._streams.on_copying():
            if slot.buffer.numel() < needed:
                slot.buffer = torch.empty(needed, dtype=torch.uint8, device=self._device)
            views = _views(slot.buffer, tensors)
            for view, tensor in zip(views, tensors, strict=True):
                view.copy_(tensor, non_blocking=True)
            copied = self._streams.copying.record_event()
        self._streams.computing().wait_event(copied)
        try:
            yield views, copied.synchronize
        finally:
            slot.free = self._streams.computing().record_event()

    def close(self) -> None:
        """Drop the buffers. May be called twice."""
        self._slots.clear()
        self._claim.release()


_ALIGNMENT = 256


def _views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a byte buffer with the shapes and dtypes of other tensors."""
    views, at = [], 0
    for tensor in like:
        views.append(buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        at += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return views
