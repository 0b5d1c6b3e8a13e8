"""`Lift`: layers on their way from host memory to an accelerator, copied on a stream of their own.

As `kv.staging` does for keys and values: the copy stream waits for the last kernel that used a device buffer before it
overwrites it, the compute stream waits for the copy, and the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ollm.io.ledger import ledger
from ollm.io.streams import Streams

SLOTS = 2
"""Device buffers: one is being computed with, one is filled."""


class Lift:
    """Device buffers that layers take turns in. For one thread."""

    def __init__(self, device: torch.device, nbytes: int, streams: Streams) -> None:
        """Two buffers of `nbytes` each.

        Raises:
            MemoryLimitError: the device has no room.
        """
        self._streams = streams
        self._claim = ledger.claim("Device buffers for weights", SLOTS * nbytes, device)
        self.buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._free: list[Any] = [streams.computing().record_event() for _ in range(SLOTS)]
        self._claim.used = SLOTS * nbytes
        self._turn = 0

    def copy(self, host: Tensor) -> tuple[int, Callable[[], None]]:
        """Start copying a layer's bytes; kernels started from now on see them.

        Returns the number of the buffer that they are in, and what waits until the host's bytes are no longer read.
        """
        number = self._turn
        self._turn = (self._turn + 1) % SLOTS
        self._streams.copying.wait_event(self._free[number])
        with self._streams.on_copying():
            self.buffers[number][: host.numel()].copy_(host, non_blocking=True)
            copied = self._streams.copying.record_event()
        self._streams.computing().wait_event(copied)
        return number, copied.synchronize

    def leave(self, number: int) -> None:
        """All kernels that use a buffer have been started."""
        self._free[number] = self._streams.computing().record_event()

    def close(self) -> None:
        """Drop the buffers. May be called twice."""
        self.buffers.clear()
        self._claim.release()
