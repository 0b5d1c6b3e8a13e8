"""Memory for formats that must be decoded: records that stay as they are stored, and a buffer for what they become.

A store that loses something gives other numbers than it was given, so that only its own bytes may stay in memory. They
are also the smaller ones: a byte of the budget holds more tokens.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from ollm.contracts.kv import Extent, KVBlock
from ollm.io.buffers import aligned_buffer
from ollm.io.ledger import Claim, ledger
from ollm.kv.residency import Share
from ollm.storage.tensors import LayerLayout, unpack


class EncodedResidency:
    """Keeps raw bytes of extents on the host within a budget that is shared evenly between layers. The set is fixed:
    what found room stays until it is dropped."""

    def __init__(self, share: Share, *, pinned: bool) -> None:
        """Nothing yet.

        Args:
            share: of each layer.
            pinned: in page-locked memory.
        """
        self._share = share
        self._pinned = pinned
        self._raw: dict[Extent, tuple[Tensor, Claim]] = {}
        self._used: Counter[int] = Counter()

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(raw.numel() for raw, _ in self._raw.values())

    def holds(self, extent: Extent) -> bool:
        """Whether the extent is kept."""
        return extent in self._raw

    def raw(self, extent: Extent) -> Tensor:
        """The bytes of an extent that is kept: uint8 on the host."""
        return self._raw[extent][0]

    def offer(self, extent: Extent, raw: Tensor) -> None:
        """Keep a copy of an extent's bytes if its layer's share has room."""
        if self._used[self._share.owner(extent.layer)] + extent.nbytes > self._share.nbytes:
            return
        claim = ledger.try_claim("resident encoded keys and values", extent.nbytes, torch.device("cpu"))
        if claim is None:
            return
        try:
            copy = aligned_buffer(extent.nbytes, pinned=self._pinned)[: extent.nbytes]
        except BaseException:
            claim.release()
            raise
        copy.copy_(raw)
        claim.used = extent.nbytes
        self._raw[extent] = copy, claim
        self._used[self._share.owner(extent.layer)] += extent.nbytes

    def drop(self, extent: Extent) -> None:
        """Forget an extent."""
        if extent in self._raw:
            self._raw.pop(extent)[1].release()
            self._used[self._share.owner(extent.layer)] -= extent.nbytes

    def clear(self) -> None:
        """Forget everything."""
        for extent in list(self._raw):
            self.drop(extent)


class Scratch:
    """The place where extents are decoded, one after the other: each is valid until the next one. Grows to the largest
    that was decoded; ends when a store turns out to have no use for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wanted = True
        self._buffer: Tensor | None = None
        self._claim: Claim | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that were set aside."""
        return 0 if self._buffer is None else self._buffer.numel()

    def block(self, extent: Extent, layout: LayerLayout) -> KVBlock | None:
        """Room for the keys and values of an extent, whatever is in it; `None` where it is not used."""
        if not self._wanted:
            return None
        nbytes = layout.nbytes(extent.rows, extent.tokens)
        if self._buffer is None or self._buffer.numel() < nbytes:
            self.close()
            self._claim = ledger.try_claim("a decoded block", nbytes, self._device)
            on_cpu = self._device.type == "cpu"
            self._buffer = (
                aligned_buffer(nbytes) if on_cpu else torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            )
        return unpack(layout, extent, self._buffer[:nbytes])

    def used(self, block: KVBlock) -> None:
        """What the store made of it: a view of something else tells that it is not needed."""
        if self._buffer is not None and block.keys.untyped_storage().data_ptr() != self._buffer.data_ptr():
            self._wanted = False
            self.close()

    def close(self) -> None:
        """Give the memory back."""
        self._buffer = None
        if self._claim is not None:
            self._claim.release()
            self._claim = None
