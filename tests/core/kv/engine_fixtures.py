"""Sessions over real stores with several layers, as a decode step uses them."""

from __future__ import annotations

import weakref
from pathlib import Path

import torch

from core.storage.storage_fixtures import open_storage
from ollm.builtin.chunked import ChunkedStore
from ollm.contracts.blocks import Extent
from ollm.contracts.spill import SpillPlan
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession
from ollm.kv.table import take

HEADS, SIZE = 2, 64
TOKENS = 16
"""Of an extent."""
ANY = torch.empty(0)
"""A query, where all extents are attended to anyway."""
EXTENT_BYTES = 2 * HEADS * TOKENS * SIZE * 4


def tokens(count: int, seed: int = 0, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, HEADS, count, SIZE, generator=generator) for _ in range(2))
    return keys, values


def make_session(folder: Path, *, layers: int = 3, extents: int = 0, store_type=ChunkedStore, **plan):
    """A session and its layers, each with so many extents of `TOKENS` tokens that are on the disk."""
    store = store_type(open_storage(folder))
    settings = {"flush_tokens": TOKENS, "flush_bytes": 2**30, "read_buffers": 4, **plan}
    session = KVSession(store, SpillPlan(**settings), strategy="test", layers=range(layers))
    histories = [LayerHistory(layer, session) for layer in range(layers)]
    for history, following in zip(histories, histories[1:] + histories[:1], strict=True):
        history.next = weakref.ref(following)
    for number in range(extents):
        for layer, history in enumerate(histories):
            history.append(*tokens(TOKENS, seed=100 * layer + number))
    store.storage.flush()
    return session, histories


def extents_of(history: LayerHistory) -> list[Extent]:
    """What a layer holds, in order."""
    return [entry.extent for entry in history.table.entries]


def walk(history: LayerHistory, seed: int = 0) -> dict[int, torch.Tensor]:
    """All keys of a layer by position, as attention meets them in a decode step with one more token."""
    handle = history.handle(*tokens(1, seed))
    return {block.start: take(block.keys, block.row_map).clone() for block in handle.blocks(ANY)}


def expected(layer: int, extents: int) -> torch.Tensor:
    """The keys that `make_session` put into a layer."""
    return torch.cat([tokens(TOKENS, seed=100 * layer + number)[0] for number in range(extents)], dim=2)


def joined(blocks: dict[int, torch.Tensor], length: int) -> torch.Tensor:
    """The keys before `length`, in order of position; they must leave no gap."""
    parts = [blocks[start] for start in sorted(blocks) if start < length]
    assert [start for start in sorted(blocks) if start < length] == [
        sum(part.shape[2] for part in parts[:place]) for place in range(len(parts))
    ]
    return torch.cat(parts, dim=2)
