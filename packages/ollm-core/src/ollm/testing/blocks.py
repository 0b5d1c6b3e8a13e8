"""Random blocks, and the table that the kit keeps in core's place: what a store was given, and must give back.

Knows nothing of how stores keep anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ollm.contracts.blocks import BlockKey, Extent, KVBlock, KVLayout, Location
from ollm.contracts.kv import KVStore
from ollm.io.buffers import aligned_buffer
from ollm.storage.records import run_span


def random_block(
    tokens: int,
    *,
    rows: int = 2,
    heads: int = 3,
    key_size: int = 8,
    value_size: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> KVBlock:
    """A block of standard normal numbers, as attention makes it: not contiguous. The same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        torch.randn(rows, tokens, heads, size, generator=generator).to(dtype).transpose(1, 2)
        for size in (key_size, value_size)
    )
    return KVBlock(keys, values)


def write_blocks(
    store: KVStore, blocks: Iterable[KVBlock], *, layer: int = 0, branch: int = 0, start: int = 0
) -> list[Extent]:
    """Write blocks one behind the other, as core does; the extents that they are in from then on.

    Args:
        store: what is tested.
        blocks: of one layer.
        layer, branch: whose they are.
        start: position of the first token.
    """
    extents = []
    for block in blocks:
        rows, _, tokens, _ = block.keys.shape
        key = BlockKey(layer, branch, start, tokens, rows)
        location = store.write(block, key)
        assert isinstance(location, Location), f"write() gave {location!r}"
        extents.append(Extent.of(key, block.layout, location))
        start += tokens
    return extents


def save_table(table: Mapping[Extent, KVBlock], path: Path) -> None:
    """Write a table down for another process of a test."""
    torch.save(dict(table), path)


def load_table(path: Path) -> dict[Extent, KVBlock]:
    """The table that `save_table` wrote. Nothing but the records of the contract is made of what the file says."""
    with torch.serialization.safe_globals([BlockKey, Extent, KVBlock, KVLayout, Location]):
        table: dict[Extent, KVBlock] = torch.load(path, weights_only=True)
    return table


def read_raw(store: KVStore, extent: Extent) -> Tensor:
    """The raw bytes of an extent, as core reads them: uint8 on the host."""
    if store.storage is None:
        return store.read(extent)
    begin, end = run_span([extent])
    return store.storage.read([extent], aligned_buffer(end - begin))[0]


def read_extent(store: KVStore, extent: Extent) -> KVBlock:
    """All keys and values of an extent, visible or not, read from where the store keeps them and decoded; scales are
    applied."""
    raw = read_raw(store, extent)
    assert (raw.dtype, raw.numel()) == (torch.uint8, extent.location.nbytes), f"raw bytes of {extent}"
    return scaled(store.decode(extent, raw, None))


def scaled(block: KVBlock) -> KVBlock:
    """The same block with its scales applied."""
    keys, values = (
        tensor if scale == 1.0 else tensor * scale
        for tensor, scale in ((block.keys, block.key_scale), (block.values, block.value_scale))
    )
    return KVBlock(keys, values)


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


def _is_same(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    try:
        assert_same(ours, theirs, tolerance)
    except AssertionError:
        return False
    return True


def assert_reads(store: KVStore, extent: Extent, block: KVBlock, tolerance: float, what: str = "") -> None:
    """The store gives this for an extent: all tokens that were written, however few of them are visible."""
    __tracebackhide__ = True
    assert_equal(read_extent(store, extent), block, tolerance, f"{{}} of {extent}{what}")


def assert_equal(ours: KVBlock, theirs: KVBlock, tolerance: float, what: str) -> None:
    """Keys as keys, and values as values. `what` has a place for which of the two."""
    __tracebackhide__ = True
    swapped = _is_same(ours.keys, theirs.values, tolerance) and _is_same(ours.values, theirs.keys, tolerance)
    if swapped and not _is_same(ours.keys, theirs.keys, tolerance):
        raise AssertionError(f"{what.format('keys')} are what its values should be, and the values its keys: swapped")
    for name in ("keys", "values"):
        assert_same(getattr(ours, name), getattr(theirs, name), tolerance, what.format(name))


def assert_holds(store: KVStore, extents: Sequence[Extent], blocks: Sequence[KVBlock], tolerance: float = 0.0) -> None:
    """The store gives back each of these blocks for its extent, and no two are in one place.

    Args:
        store: what is tested.
        extents: as `write_blocks` gave them.
        blocks: what was written, in the same order.
        tolerance: see `KVStoreTests.tolerance`.
    """
    __tracebackhide__ = True
    for extent, block in zip(extents, blocks, strict=True):
        assert_reads(store, extent, block, tolerance)
    places = [extent.location for extent in extents]
    assert len(set(places)) == len(places), f"two blocks are said to be in one place: {places}"


def _bits(tensor: Tensor) -> Tensor:
    """Bytes in order of position, so that NaNs and negative zeros are compared too."""
    return tensor.contiguous().view(-1).view(torch.uint8)
