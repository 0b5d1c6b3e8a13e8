"""`TokenIds`: which tokens a cache holds, row by row, so that a text that does not continue them can be told.

Knows numbers; not what is done with them, nor where the tokens' keys and values are.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNKNOWN = -1
"""The id of a token that came as an embedding, or from somebody who did not say."""
_GROWTH = 256


class TokenIds:
    """Ids `[rows, tokens]`, int64, in a buffer with room to grow."""

    def __init__(self) -> None:
        """None."""
        self.tokens = 0
        self._buffer: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """All of them, `[rows, tokens]`: a view."""
        if self._buffer is None:
            return torch.empty(0, 0, dtype=torch.int64)
        return self._buffer[:, : self.tokens]

    def append(self, ids: Tensor) -> None:
        """Add tokens `[rows, new]`; takes their device if there were none."""
        stop = self.tokens + ids.shape[1]
        if self._buffer is None or stop > self._buffer.shape[1]:
            with torch.inference_mode(False):  # it is written to later, in whatever mode that is
                room = torch.empty(ids.shape[0], stop + stop // 4 + _GROWTH, dtype=torch.int64, device=ids.device)
                if self.tokens:
                    room[:, : self.tokens] = self.ids
            self._buffer = room
        self._buffer[:, self.tokens : stop] = ids
        self.tokens = stop

    def fill(self, rows: int, tokens: int, device: torch.device) -> None:
        """Have as many rows and tokens: those that nobody said are unknown."""
        if self.ids.shape[0] != rows:
            self.crop(0)
        if tokens > self.tokens:
            self.append(torch.full((rows, tokens - self.tokens), UNKNOWN, device=device))

    def crop(self, tokens: int) -> None:
        """Keep the first so many, or all if there are no more."""
        self.tokens = min(tokens, self.tokens)
        if self.tokens == 0:
            self._buffer = None

    def select_rows(self, index: Tensor) -> None:
        """Make the batch `batch[index]`."""
        if self._buffer is not None:
            with torch.inference_mode(False):
                self._buffer = self._buffer.index_select(0, index.to(self._buffer.device))

    def fork(self) -> TokenIds:
        """The same again."""
        fork = TokenIds()
        if self.tokens:
            fork.append(self.ids)
        return fork

    def first_difference(self, ids: Tensor) -> tuple[int, int] | None:
        """Position and row of the first token of `ids` `[rows, any number]` that is another one than here; `None` if
        there is none, as far as is known."""
        common = min(self.tokens, ids.shape[1])
        if common == 0:
            return None
        held = self.ids[:, :common]
        given = ids[:, :common].to(held.device)
        if torch.equal(held, given):
            return None
        differs = (held != given) & (held != UNKNOWN)
        if not bool(differs.any()):
            return None
        position = int(differs.any(0).int().argmax())
        return position, int(differs[:, position].int().argmax())
