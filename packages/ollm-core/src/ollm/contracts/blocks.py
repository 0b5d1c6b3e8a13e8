"""The two ideas of the KV contract: a block is data, an extent is where data is. Records, which do nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from ollm.errors import StoreContractError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EXTENT_BYTES = 8 * 2**20
"""Core cuts no extent larger than this, unless a store wants so many tokens in one or a single token takes more. Asking
for an extent, checking it and starting the kernel cost the same for a large one as for a small one: with 8 instead of
4 MiB, a step at half residency computes for a fifth less (benchmarks/results, decode-profile)."""


@attrs.frozen(cache_hash=True)
class KVLayout:
    """What turns the bytes of an extent back into tensors: dtype and shapes of one layer's keys and values.

    Attributes:
        dtype: of keys and values alike.
        kv_heads: heads of keys and values.
        key_size: elements of a key.
        value_size: elements of a value.
    """

    dtype: torch.dtype
    kv_heads: int
    key_size: int
    value_size: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> KVLayout:
        """The layout of keys `[rows, kv_heads, tokens, key_size]` and values of the same rows, heads and tokens.

        Raises:
            StoreContractError: when the two do not belong together.
        """
        if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
            raise StoreContractError(
                f"Keys {tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} {values.dtype} do not belong "
                "together: a store takes [rows, kv_heads, tokens, size], both of one dtype."
            )
        return cls(keys.dtype, keys.shape[1], keys.shape[3], values.shape[3])

    @property
    def dtype_name(self) -> str:
        """`bfloat16`, `float32`, …: the name in manifests and records."""
        return str(self.dtype).removeprefix("torch.")

    def nbytes(self, rows: int, tokens: int) -> int:
        """Bytes of keys and values of so many tokens."""
        return rows * self.kv_heads * tokens * (self.key_size + self.value_size) * self.dtype.itemsize


@attrs.frozen
class KVBlock:
    """Data: keys and values of some tokens of one layer.

    Attributes:
        keys: `[rows, kv_heads, tokens, key_size]`.
        values: `[rows, kv_heads, tokens, value_size]`.
        key_scale: what all keys must be multiplied by. Attention multiplies few scores instead of many keys.
        value_scale: the same for values.
    """

    keys: Tensor
    values: Tensor
    key_scale: float = 1.0
    value_scale: float = 1.0

    @classmethod
    def empty(
        cls, layout: KVLayout, rows: int, tokens: int, *, into: Tensor | None = None, device: torch.device | None = None
    ) -> KVBlock:
        """Room for keys and values, each contiguous, whatever is in it: the first of the bytes `into` (uint8), keys
        before values, or new memory on `device`."""
        import torch  # not before it is needed: entry modules of plugins stay light

        nbytes = layout.nbytes(rows, tokens)
        raw = torch.empty(nbytes, dtype=torch.uint8, device=device) if into is None else into[:nbytes]
        flat, shape = raw.view(layout.dtype), (rows, layout.kv_heads, tokens)
        border = rows * layout.kv_heads * tokens * layout.key_size
        return cls(flat[:border].view(*shape, layout.key_size), flat[border:].view(*shape, layout.value_size))

    @property
    def layout(self) -> KVLayout:
        """Its dtype and shapes.

        Raises:
            StoreContractError: when keys and values do not belong together.
        """
        return KVLayout.of(self.keys, self.values)


@attrs.frozen(cache_hash=True)
class BlockKey:
    """Which block it is that a store writes. Not unique: after a crop a cache writes other tokens under a key that a
    fork, or whoever still reads, goes on to have. What tells blocks apart is where they are.

    Attributes:
        layer: of the model.
        branch: which of the caches over this store wrote it: 0 for the first, others for its forks, each another. A
            hint of what is dropped together.
        start: position of its first token in the sequence.
        tokens: how many it holds.
        rows: rows of the batch that it was written with. Core maps those of today onto them.
    """

    layer: int
    branch: int
    start: int
    tokens: int
    rows: int


@attrs.frozen(cache_hash=True)
class Location:
    """Where the bytes of a block are, as its store says.

    Attributes:
        nbytes: length of the bytes that `decode` takes.
        segment: which file of the storage holds them; -1 when they are in none.
        offset: where they begin in that file. A store without files numbers its blocks here: no two that were not
            freed have the same location.
        encoded: whether they are in an encoding of the store's own, so that no part of them means anything without
            the rest.
    """

    nbytes: int
    segment: int = -1
    offset: int = -1
    encoded: bool = False


@attrs.frozen(cache_hash=True)
class Extent:
    """Where data is: one row of the table of a layer. Immutable; compared by value.

    Attributes:
        key: which block it is.
        layout: its dtype and shapes.
        location: where its bytes are.
        visible: how many of its tokens still count, from the first: a crop inside an extent changes this and no
            byte.
    """

    key: BlockKey
    layout: KVLayout
    location: Location
    visible: int

    @classmethod
    def of(cls, key: BlockKey, layout: KVLayout, location: Location) -> Extent:
        """The extent of a block that was just written: all of it is visible."""
        return cls(key, layout, location, key.tokens)

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.key.start

    @property
    def stop(self) -> int:
        """Position after the last token that is visible."""
        return self.key.start + self.visible

    def __str__(self) -> str:
        return f"layer {self.key.layer}, tokens {self.start}..{self.start + self.key.tokens}"


@attrs.frozen(kw_only=True)
class StoreStats:
    """Counters of a store. Sizes in bytes; counters since the store was made.

    Attributes:
        disk_bytes: bytes that the store's files take now, headers, alignment and holes included.
        memory_bytes: bytes of keys and values that the store itself holds in memory.
        bytes_written: to files.
        bytes_read: from files.
        compactions: how often rows of the table became fewer in what was committed last.
        representation: how cold keys and values are represented, such as `exact` or `int8-symmetric-per-tensor`.
    """

    disk_bytes: int = 0
    memory_bytes: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    compactions: int = 0
    representation: str = "exact"
