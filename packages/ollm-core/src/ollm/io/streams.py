"""Streams and events of an accelerator, as far as copying to it needs them.

What copies takes them as arguments, so that the order of copies and kernels can be tested without an accelerator.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Stream(Protocol):
    """As `torch.cuda.Stream`."""

    def wait_event(self, event: Any) -> None: ...

    def record_event(self) -> Any: ...


class Streams(Protocol):
    """What of `torch.cuda` is needed."""

    copying: Stream

    def computing(self) -> Stream: ...

    def on_copying(self) -> AbstractContextManager[Any]: ...


class CudaStreams:
    """The real ones of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.copying: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def computing(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def on_copying(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = torch.cuda.stream(self.copying)
        return context
