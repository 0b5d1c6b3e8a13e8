"""`PartReader`: some heads and some tokens of extents, without reading the rest of them.

What is asked for becomes runs of pieces, each with a hash of its own; neighbours are read together, and many small
reads are in flight, for a flash disk that is asked for one at a time stands still most of the time. Knows where bytes
lie in a block; not why anybody wants them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait

import attrs
from torch import Tensor

from ollm.contracts.blocks import Extent, KVBlock
from ollm.contracts.storage import Pieces, Storage
from ollm.io.buffers import BufferPool, tensor_bytes
from ollm.storage.options import MOST_READ_BYTES, PARTS_IN_FLIGHT
from ollm.storage.tensors import head_spans


@attrs.frozen
class Part:
    """What is wanted of an extent, for all of its rows."""

    extent: Extent
    heads: range
    tokens: range
    """Counted from the first of the extent; both without steps."""


@attrs.frozen
class _Wanted:
    """Bytes of an extent, and where they go."""

    start: int
    stop: int
    target: memoryview

    def take(self, pieces: Pieces, content: memoryview) -> None:
        """What of these pieces is wanted."""
        low, high = max(self.start, pieces.start), min(self.stop, pieces.stop)
        if low < high:  # not torch, whose threads wait for each other longer than so few bytes take
            self.target[low - self.start : high - self.start] = content[low - pieces.start : high - pieces.start]


_Flying = tuple[Future[None], Tensor]
"""A read, and its buffer."""


class PartReader:
    """For one thread, over one storage."""

    def __init__(self, storage: Storage) -> None:
        """Nothing is read yet.

        Raises:
            MemoryLimitError: no memory for the buffers is free.
        """
        self._storage = storage
        self._buffers = BufferPool("Buffers for parts of extents", PARTS_IN_FLIGHT, MOST_READ_BYTES)

    @property
    def buffer_bytes(self) -> int:
        """Memory of the buffers."""
        return self._buffers.nbytes

    def read(self, parts: Sequence[Part]) -> list[KVBlock]:
        """The parts, on the host: keys and values `[rows, len(heads), len(tokens), size]`. Only of extents that are
        stored as they are.

        Raises:
            CorruptDataError, StorageError: as `Storage.read_pieces`; nothing is being read then.
        """
        blocks = [_room_for(part) for part in parts]
        wanted: dict[Extent, list[_Wanted]] = {}
        for part, block in zip(parts, blocks, strict=True):
            wanted.setdefault(part.extent, []).extend(_spans(part, block))
        flying: deque[_Flying] = deque()
        try:
            for extent, spans in wanted.items():
                for pieces in self._runs(extent, spans):
                    if not self._buffers.has_free:
                        self._land(flying)
                    # if asking fails it is dropped, and so free once nobody reads into it
                    buffer = self._buffers.take(pieces.stop - pieces.start)
                    flying.append((self._storage.submit(_read_into, self._storage, pieces, buffer, spans), buffer))
            while flying:
                self._land(flying)
        finally:
            for future, buffer in flying:  # after an error
                if not future.cancel():
                    wait([future])
                self._buffers.give_back(buffer)
        return blocks

    def close(self) -> None:
        """Drop the buffers. May be called twice."""
        self._buffers.close()

    def _runs(self, extent: Extent, spans: Iterable[_Wanted]) -> Iterator[Pieces]:
        """Runs of pieces that hold all of these spans, each piece once."""
        run: Pieces | None = None
        for span in sorted(spans, key=lambda span: span.start):
            for pieces in self._pieces(extent, span):
                if run is None:
                    run = pieces
                elif pieces.stop <= run.stop:  # which an earlier span wanted too
                    continue
                elif pieces.start > run.stop or pieces.stop - run.start > MOST_READ_BYTES:
                    yield run
                    run = pieces
                else:
                    run = attrs.evolve(run, stop=pieces.stop)
        if run is not None:
            yield run

    def _pieces(self, extent: Extent, span: _Wanted) -> Iterator[Pieces]:
        """The pieces of a span, one at a time."""
        at = span.start
        while at < span.stop:
            piece = self._storage.pieces(extent, at, at + 1)
            yield piece
            at = piece.stop

    def _land(self, flying: deque[_Flying]) -> None:
        """Wait for the oldest read."""
        future, buffer = flying[0]
        future.result()
        flying.popleft()
        self._buffers.give_back(buffer)


def _read_into(storage: Storage, pieces: Pieces, buffer: Tensor, spans: Sequence[_Wanted]) -> None:
    """What a worker does."""
    content = tensor_bytes(storage.read_pieces(pieces, buffer))
    for span in spans:
        span.take(pieces, content)


def _room_for(part: Part) -> KVBlock:
    layout = attrs.evolve(part.extent.layout, kv_heads=len(part.heads))
    return KVBlock.empty(layout, part.extent.key.rows, len(part.tokens))


def _spans(part: Part, block: KVBlock) -> Iterator[_Wanted]:
    for number, head in enumerate(part.heads):
        found = head_spans(part.extent, head, part.tokens.start, part.tokens.stop)
        for row in range(part.extent.key.rows):
            for tensor in (block.keys, block.values):
                yield _Wanted(*next(found), tensor_bytes(tensor[row, number]))
