"""Random keys and values, and what a store must give back for them. Knows nothing of how stores keep anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ollm.contracts.kv import Extent, KVStore
from ollm.io.buffers import aligned_buffer
from ollm.storage.records import record_span

Pair = tuple[Tensor, Tensor]
"""Keys `[rows, heads, tokens, key_size]` and values `[rows, heads, tokens, value_size]`."""


def random_block(
    tokens: int,
    *,
    rows: int = 2,
    heads: int = 3,
    key_size: int = 8,
    value_size: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Pair:
    """Keys and values of standard normal numbers, as attention makes them: not contiguous. The same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        torch.randn(rows, tokens, heads, size, generator=generator).to(dtype).transpose(1, 2)
        for size in (key_size, value_size)
    )
    return keys, values


def read_raw(store: KVStore, extent: Extent) -> Tensor:
    """The raw bytes of an extent, as core reads them: uint8 on the host."""
    if store.storage is None:
        return store.read(extent)
    begin, end = record_span(extent)
    return store.storage.read([extent], aligned_buffer(end - begin))[0]


def read_extent(store: KVStore, extent: Extent) -> Pair:
    """Keys and values of an extent, read from where the store keeps them and decoded; scales are applied."""
    raw = read_raw(store, extent)
    assert (raw.dtype, raw.numel()) == (torch.uint8, extent.nbytes), f"raw bytes of {extent}"
    decoded = store.decode(extent, raw, None)
    keys, values = (
        tensor if scale == 1.0 else tensor * scale
        for tensor, scale in ((decoded.keys, decoded.key_scale), (decoded.values, decoded.value_scale))
    )
    return keys, values


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float, what: object = "") -> None:
    """Equal bit for bit, or, with a tolerance, within that part of the largest magnitude.

    Args:
        ours: what a store gave.
        theirs: what it was given.
        tolerance: 0 for lossless stores.
        what: for the message.
    """
    __tracebackhide__ = True
    assert ours.shape == theirs.shape, f"{what}: shape"
    assert ours.dtype == theirs.dtype, f"{what}: dtype"
    if tolerance:
        scale = theirs.double().abs().max() if theirs.numel() else torch.tensor(0.0)
        error = (ours.double() - theirs.double()).abs().max() if theirs.numel() else torch.tensor(0.0)
        assert error <= tolerance * scale, f"{what}: off by {error:.3g} of {scale:.3g}, the tolerance is {tolerance}"
        return
    same = torch.equal(_bits(ours), _bits(theirs))
    assert same, f"{what}: {int((_bits(ours) != _bits(theirs)).sum())} of {theirs.nbytes} bytes differ"


def assert_holds(store: KVStore, layer: int, blocks: Sequence[Pair], tolerance: float = 0.0) -> None:
    """The store lists and gives back exactly these blocks, in order, as extents from position 0.

    Args:
        store: what is tested.
        layer: the number that they were appended under.
        blocks: keys and values, one pair per extent.
        tolerance: see `KVStoreTests.tolerance`.
    """
    __tracebackhide__ = True
    extents = store.extents(layer)
    listed, appended = [extent.tokens for extent in extents], [keys.shape[2] for keys, _ in blocks]
    assert listed == appended, f"layer {layer}: tokens of the extents, against what was appended"
    position = 0
    for extent, block in zip(extents, blocks, strict=True):
        place = (extent.layer, extent.start, extent.rows)
        assert place == (layer, position, block[0].shape[0]), f"layer, start and rows of {extent}"
        position = extent.stop
        assert_reads(store, extent, block, tolerance)


def assert_reads(store: KVStore, extent: Extent, block: Pair, tolerance: float) -> None:
    """The store gives this for an extent."""
    __tracebackhide__ = True
    ours = read_extent(store, extent)
    for name, mine, theirs in zip(("keys", "values"), ours, block, strict=True):
        assert_same(mine, theirs, tolerance, f"{name} of {extent}")


def _bits(tensor: Tensor) -> Tensor:
    """Bytes in order of position, so that NaNs and negative zeros are compared too."""
    return tensor.contiguous().view(-1).view(torch.uint8)
