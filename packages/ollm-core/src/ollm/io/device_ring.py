"""`DeviceRing`: bytes on their way from the host to an accelerator, copied on a stream of their own.

Nothing here waits: the copy stream waits for the last kernel that used a device buffer before it overwrites it, the
compute stream waits for the copy, and who wants to reuse the host's bytes gets what waits for the copy. Streams and
events are passed in, so that the order of all this can be tested without an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from ollm.io.ledger import ledger
from ollm.io.streams import Streams

_ALIGNMENT = 256


@attrs.define(eq=False)
class _Slot:
    """A device buffer, and the event after the last kernel that used its memory."""

    buffer: Tensor
    free: Any


@attrs.frozen(eq=False)
class OnDevice:
    """Tensors in a buffer of a ring, for kernels that are started before `leave`, which the end of a `with` calls."""

    tensors: list[Tensor]
    wait_until_copied: Callable[[], None]
    """Waits until the host's bytes are no longer read."""
    leave: Callable[[], None]
    """All kernels that use the tensors have been started: the buffer may be overwritten after them."""

    def __enter__(self) -> OnDevice:
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()


class DeviceRing:
    """Device buffers that take turns. For one thread."""

    def __init__(self, purpose: str, device: torch.device, nbytes: int, streams: Streams, *, count: int) -> None:
        """Buffers of `nbytes` each on `device`; larger ones are made when they are needed.

        Args:
            purpose: what they are for, in the ledger and in messages.
            device, nbytes, count: where, how large, how many.
            streams: of the device.

        Raises:
            MemoryLimitError: the device has no room.
        """
        self._device = device
        self._streams = streams
        self._claim = ledger.claim(purpose, count * nbytes, device)
        self._slots = [_Slot(self._buffer(nbytes), streams.computing().record_event()) for _ in range(count)]
        self._claim.used = count * nbytes
        self._next = 0

    def copy(self, tensors: Sequence[Tensor]) -> OnDevice:
        """Start copying contiguous host tensors into the next buffer; kernels started from now on see them.

        As many copies as there are buffers may be on the device at a time: call `leave` on each before its turn comes
        again.
        """
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        self._streams.copying.wait_event(slot.free)
        needed = sum(map(_aligned_bytes, tensors))
        with self._streams.on_copying():
            if slot.buffer.numel() < needed:
                slot.buffer = self._buffer(needed)
            views = _views(slot.buffer, tensors)
            for view, tensor in zip(views, tensors, strict=True):
                view.copy_(tensor, non_blocking=True)
            copied = self._streams.copying.record_event()
        self._streams.computing().wait_event(copied)

        def leave() -> None:
            slot.free = self._streams.computing().record_event()

        return OnDevice(views, copied.synchronize, leave)

    def close(self) -> None:
        """Drop the buffers. May be called twice."""
        self._slots.clear()
        self._claim.release()

    def _buffer(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):  # what is made in it can be written to in it only
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)


def _aligned_bytes(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a byte buffer with the shapes and dtypes of other tensors."""
    views, at = [], 0
    for tensor in like:
        views.append(buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        at += _aligned_bytes(tensor)
    return views
