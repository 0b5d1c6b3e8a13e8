"""Parts of a block, read and verified without the rest: for stores over a storage of ollm's that keep blocks as they
are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
import torch
from torch import Tensor

from ollm.contracts.blocks import Extent, KVBlock
from ollm.contracts.kv import KVStore
from ollm.contracts.storage import Pieces
from ollm.errors import CorruptDataError
from ollm.io.buffers import aligned_buffer
from ollm.kv.parts import Part, PartReader
from ollm.storage.folder import segment_name
from ollm.storage.segments import SegmentedStorage
from ollm.testing.blocks import assert_equal, read_raw, write_blocks
from ollm.testing.case import StoreCase, flip, flush_writes, some

_SIZES = {"heads": 4, "key_size": 512, "value_size": 256}


class PartsTests(StoreCase):
    """Skipped for stores of other kinds."""

    def test_parts_of_a_block_are_those_of_the_whole(self, store: KVStore) -> None:
        """Some heads and some tokens of several extents, in any order, some of them twice."""
        storage, extents, blocks = self._several_pieces(store)
        found = dict(zip(extents, blocks, strict=True))
        parts = [
            Part(extent, heads, tokens)
            for extent in reversed(extents)
            for heads in (range(4), range(1, 2), range(2, 4), range(1, 2))
            for count in [extent.key.tokens]
            for tokens in (range(count), range(count // 2, count), range(count - 1, count), range(1))
        ]
        with closing(PartReader(storage)) as reader:
            for part, ours in zip(parts, reader.read(parts), strict=True):
                heads, tokens = slice(part.heads.start, part.heads.stop), slice(part.tokens.start, part.tokens.stop)
                whole = found[part.extent]
                theirs = KVBlock(whole.keys[:, heads, tokens], whole.values[:, heads, tokens])
                assert_equal(ours, theirs, 0.0, f"{{}} of heads {part.heads} and tokens {part.tokens} of {part.extent}")

    def test_a_flipped_bit_is_noticed_in_the_piece_that_has_it(self, store: KVStore) -> None:
        """And the other pieces are what they were."""
        storage, (extent, *_), _ = self._several_pieces(store)
        raw, pieces = read_raw(store, extent).clone(), _pieces(storage, extent)
        assert len(pieces) > 1, "the test needs a block of several pieces"
        for damaged in some(pieces, 4):
            with _flipped(storage, extent, (damaged.start + damaged.stop) // 2):
                for piece in pieces:
                    if piece == damaged:
                        with pytest.raises(CorruptDataError, match="does not match its hash"):
                            _read(storage, piece)
                    else:
                        assert torch.equal(_read(storage, piece), raw[piece.start : piece.stop]), f"{piece}"
        assert torch.equal(_read(storage, storage.pieces(extent, 1, len(raw) - 1)), raw)

    def _several_pieces(self, store: KVStore) -> tuple[SegmentedStorage, list[Extent], list[KVBlock]]:
        """A store with blocks that have several hashes each."""
        if not isinstance(store.storage, SegmentedStorage):
            pytest.skip("this store is over no storage of ollm's")
        blocks = self.blocks(store, 3, 24, **_SIZES)
        extents = write_blocks(store, blocks)
        if extents[0].location.encoded:
            pytest.skip("no part of an encoded block means anything without the rest")
        flush_writes(store)
        return store.storage, extents, blocks


def _pieces(storage: SegmentedStorage, extent: Extent) -> list[Pieces]:
    pieces, at = [], 0
    while at < extent.location.nbytes:
        pieces.append(storage.pieces(extent, at, at + 1))
        assert pieces[-1].start == at, "a piece begins where the one before ends"
        at = pieces[-1].stop
    return pieces


def _read(storage: SegmentedStorage, pieces: Pieces) -> Tensor:
    return storage.read_pieces(pieces, aligned_buffer(pieces.stop - pieces.start))


@contextmanager
def _flipped(storage: SegmentedStorage, extent: Extent, place: int) -> Iterator[None]:
    """A bit of the block's bytes is another one in the file, for as long as the `with` block."""
    path, at = storage.path / segment_name(extent.location.segment), extent.location.offset + place
    flip(path, at)
    yield
    flip(path, at)
