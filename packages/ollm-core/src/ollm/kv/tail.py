"""The tail: the newest tokens of one layer, exact and in memory, until they are cut into extents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GROWTH = 64  # tokens of spare room, so that a decode step writes one token and copies nothing


class Tail:
    """Keys and values of consecutive tokens, `[rows, kv_heads, tokens, size]`, in buffers with room to grow, which may
    be written to in inference mode and outside of it, in any order."""

    def __init__(self) -> None:
        self.tokens = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, spare room included."""
        if self._keys is None or self._values is None:
            return 0
        return self._keys.nbytes + self._values.nbytes

    @property
    def keys(self) -> Tensor:
        """A view of the keys; only where `tokens` is not 0."""
        assert self._keys is not None
        return self._keys[:, :, : self.tokens]

    @property
    def values(self) -> Tensor:
        """A view of the values; only where `tokens` is not 0."""
        assert self._values is not None
        return self._values[:, :, : self.tokens]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Copy tokens behind those that are here. Of another dtype than these, they are at least as wide."""
        stop = self.tokens + keys.shape[2]
        if (
            self._keys is None
            or self._values is None
            or stop > self._keys.shape[2]
            or self.tokens == 0
            or self._keys.dtype != keys.dtype
        ):
            room = stop + _GROWTH
            grown_keys, grown_values = _room_for(keys, room), _room_for(values, room)
            if self.tokens:
                grown_keys[:, :, : self.tokens] = self.keys
                grown_values[:, :, : self.tokens] = self.values
            self._keys, self._values = grown_keys, grown_values
        self._keys[:, :, self.tokens : stop] = keys
        self._values[:, :, self.tokens : stop] = values
        self.tokens = stop

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens`, or all if there are no more."""
        self.tokens = min(tokens, self.tokens)
        if self.tokens == 0:
            self._keys = self._values = None

    def select_rows(self, index: Tensor) -> None:
        """Make the batch `batch[index]`."""
        if self._keys is not None and self._values is not None:
            index = index.to(self._keys.device)
            with torch.inference_mode(False), torch.no_grad():
                # both or, if there is no such row or no memory, neither
                self._keys, self._values = self._keys.index_select(0, index), self._values.index_select(0, index)


def _room_for(like: Tensor, tokens: int) -> Tensor:
    with torch.inference_mode(False):  # what is made in it can be written to in it only
        return torch.empty((*like.shape[:2], tokens, like.shape[3]), dtype=like.dtype, device=like.device)


class Pending:
    """A tail with new tokens behind it, as if they were one, without joining them."""

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keys and values, in order of position; the last are at least as wide as all others, and all become so."""
        dtype = parts[-1][0].dtype
        parts = [(keys.to(dtype), values.to(dtype)) for keys, values in parts]
        self.tokens = sum(keys.shape[2] for keys, _ in parts)
        self.rows = parts[0][0].shape[0]
        self._parts = parts

    def slice(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens `start … stop - 1`: views, but copies where the slice spans the border."""
        pieces_k, pieces_v, at = [], [], 0
        for keys, values in self._parts:
            low, high = max(start - at, 0), min(stop - at, keys.shape[2])
            if low < high:
                pieces_k.append(keys[:, :, low:high])
                pieces_v.append(values[:, :, low:high])
            at += keys.shape[2]
        if len(pieces_k) == 1:
            return pieces_k[0], pieces_v[0]
        return torch.cat(pieces_k, dim=2), torch.cat(pieces_v, dim=2)
