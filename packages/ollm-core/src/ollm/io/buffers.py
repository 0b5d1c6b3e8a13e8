"""Host buffers that are aligned for unbuffered I/O, made once and used again."""

from __future__ import annotations

import mmap
from contextlib import suppress
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ollm.errors import MemoryLimitError
from ollm.io.ledger import ledger
from ollm.units import format_size

ALIGNMENT = 4096
"""What unbuffered reads and writes demand of addresses, offsets and lengths."""

HUGE_PAGE = 2 * 2**20
"""Of x86 and of most ARM systems. Where it is another size, large buffers are aligned to this for nothing."""

# not shared with forked children, nor counted as shared memory
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


@torch.inference_mode(False)  # what is made in it can be written to in it only, and workers are not
def aligned_buffer(nbytes: int, *, pinned: bool = False) -> Tensor:
    """A new uint8 tensor of at least `nbytes`, at an aligned address; in huge pages, if it is as large as one.

    A disk is told of 512 times fewer places that way: one fills huge pages at 1.35 GB/s and small ones at 0.88
    (benchmarks/results, request-size).

    Args:
        nbytes: length; rounded up to a multiple of `ALIGNMENT`.
        pinned: in page-locked memory, from which a CUDA device copies by itself.

    Raises:
        MemoryLimitError: the system gives no more, whatever it says is free.
    """
    nbytes = max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
    if pinned:
        raw = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, pin_memory=True)
        skip = -raw.data_ptr() % ALIGNMENT
    else:  # pages of the system's own, to which they go back when the tensor is dropped
        huge = nbytes >= HUGE_PAGE
        try:
            pages = mmap.mmap(-1, nbytes + HUGE_PAGE * huge, **_PRIVATE)
        except (OSError, OverflowError) as error:
            raise MemoryLimitError(
                f"The system gives no {format_size(nbytes)} more of memory ({error}): close other programs or caches, "
                "or raise this process's memory limit (ulimit -v)."
            ) from error
        raw = torch.frombuffer(pages, dtype=torch.uint8)
        skip = -raw.data_ptr() % HUGE_PAGE if huge else 0
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # not what is behind the buffer: its rest would take a whole huge page
                pages.madvise(mmap.MADV_HUGEPAGE, skip, nbytes)
    return raw[skip : skip + nbytes]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, not a copy."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        tensor = tensor.reshape(-1).view(torch.uint8)
    return memoryview(tensor.numpy())  # type: ignore[arg-type]  # numpy's stubs hide it


class BufferPool:
    """At most `count` buffers, made when they are first needed. For one thread: who takes one gives it back, or drops
    it, as whatever is interrupted does.

    A buffer is made anew, larger, for a request that it is too small for, so that what it holds is bounded by `count`
    times the largest request.
    """

    def __init__(self, purpose: str, count: int, nbytes: int, *, pinned: bool = False) -> None:
        """For `count` buffers of `nbytes` each, claimed from the ledger.

        Raises:
            MemoryLimitError: so much memory is not free.
        """
        self.count = count
        self._size = nbytes
        self._pinned = pinned
        self._claim = ledger.claim(purpose, count * nbytes, torch.device("cpu"))
        self._free: list[Tensor] = []
        self._lent: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that exist now."""
        return sum(buffer.numel() for buffer in (*self._free, *self._lent.values()))

    @property
    def has_free(self) -> bool:
        """Whether `take` would give one."""
        return len(self._lent) < self.count

    def take(self, nbytes: int) -> Tensor:
        """A free buffer of at least `nbytes`; only where `has_free`."""
        assert self.has_free
        buffer = self._free.pop() if self._free else None
        if buffer is None or buffer.numel() < nbytes:
            buffer = aligned_buffer(max(nbytes, self._size), pinned=self._pinned)
            self._claim.used = self.nbytes + buffer.numel()
        self._lent[buffer.data_ptr()] = buffer
        return buffer

    def give_back(self, buffer: Tensor) -> None:
        """A buffer that `take` gave, which nobody uses any more."""
        if self._lent.pop(buffer.data_ptr(), None) is not None:
            self._free.append(buffer)

    def close(self) -> None:
        """Drop all buffers and give their memory back to the ledger. May be called twice."""
        self._free.clear()
        self._lent.clear()
        self._claim.release()
