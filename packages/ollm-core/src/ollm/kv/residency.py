"""Extents that stay in memory besides being stored.

Decoding reads the same extents in the same order at every step, the worst case of an LRU. So the resident set is
fixed: an extent that found room stays until it is dropped, the rest is read; the hit rate is budget / size. The budget
is spread evenly over the layers, so that every layer has something to compute with while the rest of it is read.

Neighbours lie side by side in pieces much larger than a read: attention then runs one kernel over many extents. With
five pieces of a layer of 128 MiB instead of one, a step takes about a tenth longer.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from ollm.contracts.blocks import EXTENT_BYTES, Extent, KVBlock, KVLayout, Location
from ollm.errors import MemoryLimitError
from ollm.io.buffers import aligned_buffer
from ollm.io.ledger import Claim, ledger

LEAST_EXTENT_BYTES = 2**20
"""Reads of 1 MiB and more run at the speed of the disk."""

LEAST_PIECE_BYTES = 8 * 2**20
MOST_PIECE_BYTES = 128 * 2**20
"""A piece that is full is copied into one twice as large, up to this; so what is set aside is at most about twice what
is used, and three times while it is copied."""


@attrs.define(eq=False)
class Piece:
    """Keys and values of consecutive tokens, in tensors with room for more. Pages that are not filled take no
    memory on a CPU."""

    keys: Tensor
    values: Tensor
    claim: Claim
    start: int
    """Position of its first token."""
    extents: dict[Location, Extent] = attrs.field(factory=dict)
    stop: int = attrs.field(default=attrs.Factory(lambda self: self.start, takes_self=True))
    """Position after its last token."""

    @property
    def bytes_per_token(self) -> int:
        return (self.keys.nbytes + self.values.nbytes) // self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of its room."""
        return self.keys.nbytes + self.values.nbytes

    def is_before(self, extent: Extent) -> bool:
        """Whether `extent` comes next here, if there is room."""
        layout = KVLayout.of(self.keys, self.values)
        return (layout, self.stop, self.keys.shape[0]) == (extent.layout, extent.start, extent.key.rows)

    def has_room(self, extent: Extent) -> bool:
        """Whether `extent` still fits."""
        return extent.stop - self.start <= self.keys.shape[2]

    def put(self, extent: Extent, block: KVBlock) -> None:
        span = slice(extent.start - self.start, extent.stop - self.start)
        self.keys[:, :, span] = block.keys
        self.values[:, :, span] = block.values
        self.extents[extent.location] = extent
        self.stop = extent.stop
        self.claim.used += extent.key.tokens * self.bytes_per_token

    def drop(self, location: Location) -> None:
        """Forget an extent, if it is here."""
        self.extents.pop(location, None)
        self.stop = max((extent.stop for extent in self.extents.values()), default=self.start)
        self.claim.used = sum(extent.key.tokens for extent in self.extents.values()) * self.bytes_per_token

    def view(self, start: int, stop: int) -> KVBlock:
        """Tokens `start … stop - 1`."""
        span = slice(start - self.start, stop - self.start)
        return KVBlock(self.keys[:, :, span], self.values[:, :, span])


class Residency:
    """Keeps blocks on one device, within each layer's share."""

    def __init__(self, share: int, *, device: torch.device, staged: bool = False) -> None:
        """Nothing yet.

        Args:
            share: bytes of each layer. Where the ledger has less by then, less is kept.
            device: where the blocks stay.
            staged: whether blocks are copied to an accelerator for every use: then each extent is a piece of its own,
                contiguous and in page-locked memory.
        """
        self.version = 0
        """Counts the changes."""
        self._share = share
        self._device = device
        self._staged = staged
        self._pieces: dict[tuple[int, int], list[Piece]] = {}  # of a layer and branch
        self._home: dict[Location, Piece] = {}

    @property
    def extent_bytes(self) -> int:
        """The largest extent that core should cut: parts that fill a layer's share, within what disks like. The
        largest ones if they fill all but a thirty-second."""
        share = self._share
        if share < LEAST_EXTENT_BYTES or share % EXTENT_BYTES <= share // 32:
            return EXTENT_BYTES
        return share // -(-share // EXTENT_BYTES)

    @property
    def nbytes(self) -> int:
        """Bytes of all resident blocks."""
        return sum(piece.claim.used for pieces in self._pieces.values() for piece in pieces)

    def offer(self, extent: Extent, block: KVBlock) -> bool:
        """Keep a copy of a block if its layer's share has room; says whether it did. Whoever is interrupted in this
        drops the extent."""
        key = extent.key.layer, extent.key.branch
        pieces = self._pieces.get(key, [])
        last = pieces[-1] if pieces and pieces[-1].is_before(extent) else None
        fits = last is not None and (last.has_room(extent) or self._grow(last, extent))
        piece = last if fits else self._new_piece(extent)
        if piece is None:
            return False
        self.version += 1
        # at once, and before anything of it is kept, so that `drop` finds all
        self._home[extent.location], self._pieces[key] = piece, pieces if fits else [*pieces, piece]
        piece.put(extent, block)
        return True

    def home(self, extent: Extent) -> Piece | None:
        """The piece that has an extent, if it is resident."""
        return self._home.get(extent.location)

    def drop(self, location: Location) -> None:
        """Forget a block."""
        piece = self._home.get(location)
        if piece is None:
            return
        self.version += 1
        piece.drop(location)
        if not piece.extents:
            kept = {key: [one for one in pieces if one is not piece] for key, pieces in self._pieces.items()}
            self._pieces = {key: pieces for key, pieces in kept.items() if pieces}
            piece.claim.release()
        del self._home[location]

    def clear(self) -> None:
        """Forget everything."""
        self.version += 1
        for pieces in self._pieces.values():
            for piece in pieces:
                piece.claim.release()
        self._pieces.clear()
        self._home.clear()

    def _grow(self, piece: Piece, extent: Extent) -> bool:
        """Move what a full piece has into larger tensors, with room for `extent`; says whether that was possible."""
        if self._staged or piece.nbytes >= MOST_PIECE_BYTES:
            return False
        larger = self._new_piece(extent, before=piece)
        if larger is None:
            return False
        try:
            block, span = piece.view(larger.start, piece.stop), slice(0, piece.stop - larger.start)
            larger.keys[:, :, span] = block.keys
            larger.values[:, :, span] = block.values
            larger.claim.used = piece.claim.used
        except BaseException:
            larger.claim.release()
            raise
        self.version += 1  # routes have views of the smaller ones
        smaller = piece.claim
        piece.keys, piece.values, piece.claim, piece.start = larger.keys, larger.values, larger.claim, larger.start
        smaller.release()
        return True

    def _new_piece(self, extent: Extent, *, before: Piece | None = None) -> Piece | None:
        """Room for `extent` and, if the share has it, for more behind it; and for what is in `before`, which it is to
        replace."""
        key, layout = extent.key, extent.layout
        per_token = layout.nbytes(key.rows, 1)
        taken = sum(
            piece.claim.nbytes
            for (layer, _), pieces in self._pieces.items()
            for piece in pieces
            if layer == key.layer and piece is not before
        )
        start = extent.start if before is None else min(one.start for one in before.extents.values())
        wanted = LEAST_PIECE_BYTES if before is None else min(2 * before.nbytes, MOST_PIECE_BYTES)
        # whole extents of this size, for one that does not fit into the rest of a piece begins the next
        most = 0 if self._staged else wanted // per_token // key.tokens * key.tokens
        needed = extent.stop - start
        room = min((self._share - taken) // per_token, max(most, needed))
        if room < needed:
            return None
        claim = ledger.try_claim("resident keys and values", room * per_token, self._device)
        if claim is None:
            return None
        shape = (key.rows, layout.kv_heads, room)
        try:
            keys, values = (self._empty((*shape, size), layout.dtype) for size in (layout.key_size, layout.value_size))
        except MemoryLimitError:  # less is free than was said
            claim.release()
            return None
        except BaseException:
            claim.release()
            raise
        return Piece(keys, values, claim, start)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._device.type != "cpu":
            with torch.inference_mode(False):  # what is made in it can be written to in it only
                return torch.empty(shape, dtype=dtype, device=self._device)
        nbytes = math.prod(shape) * dtype.itemsize
        return aligned_buffer(nbytes, pinned=self._staged)[:nbytes].view(dtype).view(shape)
