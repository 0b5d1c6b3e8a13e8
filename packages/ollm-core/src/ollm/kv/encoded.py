"""Memory for formats that must be decoded: records that stay as they are stored, and a buffer for what they become.

A store that loses something gives other numbers than it was given, so that only its own bytes may stay in memory. They
are also the smaller ones: a byte of the budget holds more tokens.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from ollm.contracts.blocks import Extent, KVBlock, Location
from ollm.errors import MemoryLimitError
from ollm.io.buffers import aligned_buffer
from ollm.io.ledger import Claim, ledger


class EncodedResidency:
    """Keeps raw bytes of extents on the host within a budget that is shared evenly between layers. The set is fixed:
    what found room stays until it is dropped."""

    def __init__(self, share: int, *, pinned: bool) -> None:
        """Nothing yet.

        Args:
            share: bytes of each layer.
            pinned: in page-locked memory.
        """
        self.version = 0
        """Counts the changes."""
        self._share = share
        self._pinned = pinned
        self._kept: dict[Location, tuple[int, Tensor, Claim]] = {}  # with its layer
        self._used: Counter[int] = Counter()

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(location.nbytes for location in self._kept)

    def holds(self, extent: Extent) -> bool:
        """Whether the extent is kept."""
        return extent.location in self._kept

    def raw(self, extent: Extent) -> Tensor:
        """The bytes of an extent that is kept: uint8 on the host."""
        return self._kept[extent.location][1]

    def offer(self, extent: Extent, raw: Tensor) -> None:
        """Keep a copy of an extent's bytes if its layer's share has room."""
        layer, nbytes = extent.key.layer, extent.location.nbytes
        if self._used[layer] + nbytes > self._share:
            return
        claim = ledger.try_claim("resident encoded keys and values", nbytes, torch.device("cpu"))
        if claim is None:
            return
        try:
            copy = aligned_buffer(nbytes, pinned=self._pinned)[:nbytes]
            copy.copy_(raw)
            claim.used = nbytes
            self.version += 1
            self._kept[extent.location] = layer, copy, claim
            self._used[layer] += nbytes
        except MemoryLimitError:  # less is free than was said
            claim.release()
        except BaseException:
            self._kept.pop(extent.location, None)
            claim.release()
            raise

    def drop(self, location: Location) -> None:
        """Forget an extent."""
        if location in self._kept:
            self.version += 1
            layer, raw, claim = self._kept.pop(location)
            self._used[layer] -= raw.numel()
            claim.release()

    def clear(self) -> None:
        """Forget everything."""
        self.version += 1
        for _, _, claim in self._kept.values():
            claim.release()
        self._kept.clear()
        self._used.clear()


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

    def block(self, extent: Extent) -> KVBlock | None:
        """Room for the keys and values of an extent, whatever is in it; `None` where it is not used."""
        if not self._wanted:
            return None
        key, layout = extent.key, extent.layout
        nbytes = layout.nbytes(key.rows, key.tokens)
        if self._buffer is None or self._buffer.numel() < nbytes:
            self.close()
            self._claim = ledger.try_claim("a decoded block", nbytes, self._device)
            on_cpu = self._device.type == "cpu"
            with torch.inference_mode(False):  # what is made in it can be written to in it only
                self._buffer = (
                    aligned_buffer(nbytes) if on_cpu else torch.empty(nbytes, dtype=torch.uint8, device=self._device)
                )
            if self._claim is not None:
                self._claim.used = nbytes
        return KVBlock.empty(layout, key.rows, key.tokens, into=self._buffer)

    def used(self, block: KVBlock) -> None:
        """What the store made of it: tensors in other memory tell that it is not needed."""
        if self._buffer is None:
            return
        if block.keys.untyped_storage().data_ptr() != self._buffer.untyped_storage().data_ptr():
            self._wanted = False
            self.close()

    def close(self) -> None:
        """Give the memory back."""
        self._buffer = None
        if self._claim is not None:
            self._claim.release()
            self._claim = None
