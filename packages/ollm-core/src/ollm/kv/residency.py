"""Extents that stay in memory besides being stored.

Decoding reads the same extents in the same order at every step, the worst case of an LRU. So the resident set is
fixed: an extent that found room stays until it is dropped, the rest is read; the hit rate is budget / size. The budget
is spread evenly over the layers, so that every layer has something to compute with while the rest of it is read.

Neighbours lie side by side in pieces much larger than a read: attention then runs one kernel over many extents. With
five pieces of a layer of 128 MiB instead of one, a step takes about a tenth longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from ollm.contracts.kv import Extent, KVBlock
from ollm.io.buffers import aligned_buffer
from ollm.io.ledger import Claim, ledger
from ollm.storage.tensors import LayerLayout

MOST_EXTENT_BYTES = 8 * 2**20
"""Asking for an extent, checking it and starting the kernel cost the same for a large one as for a small one: with 8
instead of 4 MiB, a step at half residency computes for a fifth less (benchmarks/results, decode-profile)."""
LEAST_EXTENT_BYTES = 2**20
"""Reads of 1 MiB and more run at the speed of the disk."""

LEAST_PIECE_BYTES = 8 * 2**20
MOST_PIECE_BYTES = 128 * 2**20
"""A piece that is full is copied into one twice as large, up to this; so what is set aside is at most about twice what
is used, and three times while it is copied."""


@attrs.define(eq=False)
class _Piece:
    """Keys and values of consecutive tokens, in tensors with room for more. Pages that are not filled take no
    memory on a CPU."""

    keys: Tensor
    values: Tensor
    claim: Claim
    start: int
    """Position of its first token."""
    extents: list[Extent] = attrs.field(factory=list)

    @property
    def rows(self) -> int:
        return self.keys.shape[0]

    @property
    def bytes_per_token(self) -> int:
        return (self.keys.nbytes + self.values.nbytes) // self.keys.shape[2]

    @property
    def stop(self) -> int:
        """Position after its last token."""
        return self.extents[-1].stop if self.extents else self.start

    @property
    def nbytes(self) -> int:
        """Bytes of its room."""
        return self.keys.nbytes + self.values.nbytes

    def is_before(self, extent: Extent, block: KVBlock) -> bool:
        """Whether `extent` comes next here, if there is room."""
        layout = LayerLayout.of(self.keys, self.values) == LayerLayout.of(block.keys, block.values)
        return layout and extent.start == self.stop and extent.rows == self.rows

    def has_room(self, extent: Extent) -> bool:
        """Whether `extent` still fits."""
        return extent.stop - self.start <= self.keys.shape[2]

    def put(self, extent: Extent, block: KVBlock) -> None:
        span = slice(extent.start - self.start, extent.stop - self.start)
        self.keys[:, :, span] = block.keys
        self.values[:, :, span] = block.values
        self.extents.append(extent)
        self.claim.used += extent.tokens * self.bytes_per_token

    def take_over(self, other: _Piece) -> None:
        """Copy all that another piece has into this one, which is empty and begins at the same position."""
        block = other.view(self.start, other.stop)
        span = slice(0, other.stop - self.start)
        self.keys[:, :, span] = block.keys
        self.values[:, :, span] = block.values
        self.extents, self.claim.used = other.extents, other.claim.used

    def drop(self, extent: Extent) -> None:
        self.extents.remove(extent)
        self.claim.used -= extent.tokens * self.bytes_per_token

    def view(self, start: int, stop: int) -> KVBlock:
        span = slice(start - self.start, stop - self.start)
        return KVBlock(self.keys[:, :, span], self.values[:, :, span])


@attrs.frozen
class Share:
    """A budget, shared evenly between the layers of a model; a layer's forks draw on the same share."""

    nbytes: int
    """Of each layer."""
    stride: int
    """What the layer numbers of a cache and its forks differ by."""

    @classmethod
    def even(cls, budget: int, layers: Sequence[int]) -> Share:
        """The share of each of these layers in so many bytes."""
        return cls(budget // len(layers) if layers else 0, max(layers, default=0) + 1)

    def owner(self, layer: int) -> int:
        """The layer on whose share an extent of this layer number draws."""
        return layer % self.stride


class Residency:
    """Keeps blocks on one device, within each layer's share."""

    def __init__(self, share: Share, *, device: torch.device, staged: bool = False) -> None:
        """Nothing yet.

        Args:
            share: of each layer. Where the ledger has less by then, less is kept.
            device: where the blocks stay.
            staged: whether blocks are copied to an accelerator for every use: then each extent is a piece of its own,
                contiguous and in page-locked memory.
        """
        self._share = share
        self._device = device
        self._staged = staged
        self._pieces: dict[int, list[_Piece]] = {}
        self._home: dict[Extent, _Piece] = {}

    @property
    def extent_bytes(self) -> int:
        """The largest extent that core should cut: parts that fill a layer's share, within what disks like. The
        largest ones if they fill all but a thirty-second."""
        share = self._share.nbytes
        if share < LEAST_EXTENT_BYTES or share % MOST_EXTENT_BYTES <= share // 32:
            return MOST_EXTENT_BYTES
        return share // -(-share // MOST_EXTENT_BYTES)

    @property
    def nbytes(self) -> int:
        """Bytes of all resident blocks."""
        return sum(piece.claim.used for pieces in self._pieces.values() for piece in pieces)

    def offer(self, extent: Extent, block: KVBlock) -> bool:
        """Keep a copy of a block if its layer's share has room; says whether it did."""
        pieces = self._pieces.setdefault(extent.layer, [])
        last = pieces[-1] if pieces and pieces[-1].is_before(extent, block) else None
        if last is None or not last.has_room(extent):
            larger = last is not None and self._grow(last, extent, block)
            piece = None if larger else self._new_piece(extent, block)
            if piece is not None:
                pieces.append(piece)
            elif not larger:
                return False
        pieces[-1].put(extent, block)
        self._home[extent] = pieces[-1]
        return True

    def holds(self, extent: Extent) -> bool:
        """Whether the extent is resident."""
        return extent in self._home

    def run(self, extents: Sequence[Extent]) -> tuple[int, KVBlock]:
        """How many of `extents`, from the first, which is resident, lie side by side, and all of them as one block."""
        piece = self._home[extents[0]]
        count = 1
        while (
            count < len(extents)
            and self._home.get(extents[count]) is piece
            and extents[count].start == extents[count - 1].stop
        ):
            count += 1
        return count, piece.view(extents[0].start, extents[count - 1].stop)

    def drop(self, extent: Extent) -> None:
        """Forget a block."""
        piece = self._home.pop(extent, None)
        if piece is None:
            return
        piece.drop(extent)
        if not piece.extents:
            self._pieces[extent.layer].remove(piece)
            piece.claim.release()

    def clear(self) -> None:
        """Forget everything."""
        for extent in list(self._home):
            self.drop(extent)

    def _grow(self, piece: _Piece, extent: Extent, block: KVBlock) -> bool:
        """Copy a full piece into a larger one, with room for `extent`; says whether that was possible."""
        if self._staged or piece.nbytes >= MOST_PIECE_BYTES:
            return False
        larger = self._new_piece(extent, block, before=piece)
        if larger is None:
            return False
        larger.take_over(piece)
        self._home.update(dict.fromkeys(larger.extents, larger))
        pieces = self._pieces[extent.layer]
        pieces[pieces.index(piece)] = larger
        piece.claim.release()
        return True

    def _new_piece(self, extent: Extent, block: KVBlock, *, before: _Piece | None = None) -> _Piece | None:
        """Room for `extent` and, if the share has it, for more behind it; and for what is in `before`, which it is to
        replace."""
        (rows, heads, tokens, key_size), value_size = block.keys.shape, block.values.shape[3]
        per_token = (block.keys.nbytes + block.values.nbytes) // tokens
        taken = sum(
            piece.claim.nbytes
            for layer, pieces in self._pieces.items()
            for piece in pieces
            if self._share.owner(layer) == self._share.owner(extent.layer) and piece is not before
        )
        start = extent.start if before is None else before.extents[0].start
        wanted = LEAST_PIECE_BYTES if before is None else min(2 * before.nbytes, MOST_PIECE_BYTES)
        # whole extents of this size, for one that does not fit into the rest of a piece begins the next
        most = 0 if self._staged else wanted // per_token // tokens * tokens
        needed = extent.stop - start
        room = min((self._share.nbytes - taken) // per_token, max(most, needed))
        if room < needed:
            return None
        claim = ledger.try_claim("resident keys and values", room * per_token, self._device)
        if claim is None:
            return None
        try:
            keys, values = (self._empty((rows, heads, room, size), block.keys.dtype) for size in (key_size, value_size))
        except BaseException:
            claim.release()
            raise
        return _Piece(keys, values, claim, start)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=self._device)
        nbytes = math.prod(shape) * dtype.itemsize
        return aligned_buffer(nbytes, pinned=self._staged)[:nbytes].view(dtype).view(shape)
