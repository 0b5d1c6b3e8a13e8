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

    def take_over(self, other: Piece) -> None:
        """Copy all that another piece has into this one, which is empty and begins at the same position or later."""
        block = other.view(self.start, other.stop)
        span = slice(0, other.stop - self.start)
        self.keys[:, :, span] = block.keys
        self.values[:, :, span] = block.values
        self.extents, self.stop, self.claim.used = other.extents, other.stop, other.claim.used

    def drop(self, location: Location) -> None:
        self.claim.used -= self.extents.pop(location).key.tokens * self.bytes_per_token
        self.stop = max((extent.stop for extent in self.extents.values()), default=self.start)

    def view(self, start: int, stop: int) -> KVBlock:
        """Tokens `start … stop - 1`."""
        span = slice(start - self.start, stop - self.start)
        return KVBlock(self.keys[:, :, span], self.values[:, :, span])


@attrs.frozen
class Share:
    """A budget, shared evenly between the layers of a model; a cache and its forks draw on the same shares."""

    nbytes: int
    """Of each layer."""

    @classmethod
    def even(cls, budget: int, layers: int) -> Share:
        """The share of each of so many layers."""
        return cls(budget // layers if layers else 0)


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
        share = self._share.nbytes
        if share < LEAST_EXTENT_BYTES or share % EXTENT_BYTES <= share // 32:
            return EXTENT_BYTES
        return share // -(-share // EXTENT_BYTES)

    @property
    def nbytes(self) -> int:
        """Bytes of all resident blocks."""
        return sum(piece.claim.used for pieces in self._pieces.values() for piece in pieces)

    def offer(self, extent: Extent, block: KVBlock) -> bool:
        """Keep a copy of a block if its layer's share has room; says whether it did."""
        pieces = self._pieces.setdefault((extent.key.layer, extent.key.branch), [])
        last = pieces[-1] if pieces and pieces[-1].is_before(extent) else None
        if last is None or not last.has_room(extent):
            larger = last is not None and self._grow(last, extent)
            piece = None if larger else self._new_piece(extent)
            if piece is not None:
                pieces.append(piece)
            elif not larger:
                return False
        pieces[-1].put(extent, block)
        self._home[extent.location] = pieces[-1]
        self.version += 1
        return True

    def home(self, extent: Extent) -> Piece | None:
        """The piece that has an extent, if it is resident."""
        return self._home.get(extent.location)

    def drop(self, location: Location) -> None:
        """Forget a block."""
        piece = self._home.pop(location, None)
        if piece is None:
            return
        self.version += 1
        key = piece.extents[location].key
        piece.drop(location)
        if not piece.extents:
            pieces = self._pieces[key.layer, key.branch]
            pieces.remove(piece)
            if not pieces:
                del self._pieces[key.layer, key.branch]
            piece.claim.release()

    def clear(self) -> None:
        """Forget everything."""
        for location in list(self._home):
            self.drop(location)

    def _grow(self, piece: Piece, extent: Extent) -> bool:
        """Copy a full piece into a larger one, with room for `extent`; says whether that was possible."""
        if self._staged or piece.nbytes >= MOST_PIECE_BYTES:
            return False
        larger = self._new_piece(extent, before=piece)
        if larger is None:
            return False
        larger.take_over(piece)
        self._home.update(dict.fromkeys(larger.extents, larger))
        pieces = self._pieces[extent.key.layer, extent.key.branch]
        pieces[pieces.index(piece)] = larger
        piece.claim.release()
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
        room = min((self._share.nbytes - taken) // per_token, max(most, needed))
        if room < needed:
            return None
        claim = ledger.try_claim("resident keys and values", room * per_token, self._device)
        if claim is None:
            return None
        shape = (key.rows, layout.kv_heads, room)
        try:
            keys, values = (self._empty((*shape, size), layout.dtype) for size in (layout.key_size, layout.value_size))
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
