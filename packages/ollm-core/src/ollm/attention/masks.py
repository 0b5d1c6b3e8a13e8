"""Which keys a query sees, evaluated tile by tile: never a mask of queries times keys.

A `TileMask` stands where transformers expects a mask tensor. It holds the mask function, the padding and the offsets,
and answers for one tile at a time: everything is visible, nothing is, the tile is an exact causal diagonal, or a bool
tensor. Answers are kept, because all layers of one kind share the mask; of those that are tensors only the newest.
"""

from __future__ import annotations

import copy
import enum
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(batch, head, query, key)` indices, broadcastable, to visible or not."""


class Visible(enum.Enum):
    """The answers for a tile that need no tensor."""

    ALL = "all"
    NONE = "none"
    DIAGONAL = "diagonal"
    """Query i of the tile sees its keys 0 … i."""


Answer = Visible | Tensor
"""Of a tile; a tensor is bool, broadcastable to `[rows, heads, queries, keys]`."""


KEPT_BYTES = 32 * 2**20
"""Tensors among the answers that a mask keeps: those of a decode step over a window for every tile, and no more of a
long prompt than its tiles take at once."""


class _Answers:
    """Of one mask: all that need no tensor, and of tensors the newest `KEPT_BYTES`."""

    def __init__(self) -> None:
        self._plain: dict[tuple[int, int, int, int], Visible] = {}
        self._tensors: OrderedDict[tuple[int, int, int, int], Tensor] = OrderedDict()
        self._nbytes = 0

    def get(self, place: tuple[int, int, int, int]) -> Answer | None:
        return self._plain.get(place) or self._tensors.get(place)

    def put(self, place: tuple[int, int, int, int], answer: Answer) -> None:
        if isinstance(answer, Visible):
            self._plain[place] = answer
            return
        self._tensors[place] = answer
        self._nbytes += answer.untyped_storage().nbytes()
        while self._nbytes > KEPT_BYTES and len(self._tensors) > 1:
            _, oldest = self._tensors.popitem(last=False)
            self._nbytes -= oldest.untyped_storage().nbytes()


class TileMask:
    """A mask as a function of positions. Positions are absolute: query 0 of a forward is at `query_offset`."""

    def __init__(
        self,
        *,
        rows: int,
        queries: int,
        query_offset: int,
        keys: int,
        key_offset: int,
        function: MaskFunction | None,
        padding: Tensor | None,
        device: torch.device,
    ) -> None:
        """A mask for one forward.

        Args:
            rows, queries, keys: sizes of the batch, of the new tokens, and of all keys.
            query_offset, key_offset: positions of the first of each.
            function: the mask function; `None` for plain causal attention.
            padding: bool `[rows, positions]`, False where a token is padding; `None` if there is none.
            device: where answers are made.
        """
        self.rows, self.queries, self.keys = rows, queries, keys
        self.query_offset = query_offset
        self.key_offset: int | None = key_offset
        self._function = function
        self._padding = padding
        self._device = device
        self.base: TileMask | None = None
        """The mask of the whole forward, for a part of it."""
        self._windowed: dict[tuple[int, int], TileMask] = {}
        self._answers = _Answers()

    @property
    def is_causal(self) -> bool:
        """Whether it is plain causal attention, whose answers need no tensor away from the diagonal."""
        return self._function is None and self._padding is None

    def queries_between(self, low: int, high: int) -> TileMask:
        """The same mask for queries `low … high - 1` of this forward, whose keys end with the last of them; both share
        their answers."""
        part = copy.copy(self)
        part.base = self.base or self
        part.queries, part.query_offset, part.key_offset = high - low, self.query_offset + low, None
        return part

    def windowed(self, window: int, sinks: int) -> TileMask:
        """The same mask where a query also sees no more than the newest `window` keys, itself included, and the first
        `sinks`. Made once, so that layers share its answers."""
        inner = self.base or self
        if (window, sinks) not in inner._windowed:
            part = copy.copy(inner)
            part._answers, part._function = _Answers(), _within(inner._function, window, sinks)
            inner._windowed[window, sinks] = part
        part = copy.copy(inner._windowed[window, sinks])
        part.queries, part.query_offset, part.key_offset = self.queries, self.query_offset, self.key_offset
        return part

    def first_key(self, keys: int) -> int:
        """Position of the first of `keys` keys."""
        return self.query_offset + self.queries - keys if self.key_offset is None else self.key_offset

    def tile(self, query: int, query_stop: int, key: int, key_stop: int) -> Answer:
        """The answer for queries and keys of these positions."""
        place = (query, query_stop, key, key_stop)
        answer = self._answers.get(place)
        if answer is None:
            answer = self._evaluate(*place)
            self._answers.put(place, answer)
        return answer

    def _evaluate(self, query: int, query_stop: int, key: int, key_stop: int) -> Answer:
        pattern = self._pattern(query, query_stop, key, key_stop)
        if self._padding is None or pattern is Visible.NONE:
            return pattern
        real = self._padding[:, key:key_stop]
        if bool(real.all()):
            return pattern
        if not bool(real.any()):
            return Visible.NONE
        dense = self._dense(pattern, query_stop - query, key_stop - key)
        return real[:, None, None, :] if dense is None else dense & real[:, None, None, :]

    def _pattern(self, query: int, query_stop: int, key: int, key_stop: int) -> Answer:
        """The answer of the mask function alone."""
        if self._function is None:
            return _causal(query, query_stop, key, key_stop, self._device)
        tile = self._call(query, query_stop, key, key_stop)
        if bool(tile.all()):
            return Visible.ALL
        return tile if bool(tile.any()) else Visible.NONE

    def _call(self, query: int, query_stop: int, key: int, key_stop: int) -> Tensor:
        assert self._function is not None
        tile = self._function(
            torch.arange(self.rows, device=self._device)[:, None, None, None],
            torch.zeros(1, dtype=torch.long, device=self._device)[:, None, None],
            torch.arange(query, query_stop, device=self._device)[:, None],
            torch.arange(key, key_stop, device=self._device),
        )
        shape = (query_stop - query, key_stop - key)
        return (
            tile.to(torch.bool).expand(*tile.shape[:-2], *shape)
            if tile.dim() >= 2
            else tile.to(torch.bool).expand(shape)
        )

    def _dense(self, pattern: Answer, queries: int, keys: int) -> Tensor | None:
        if pattern is Visible.ALL:
            return None
        if pattern is Visible.DIAGONAL:
            return torch.ones(queries, keys, dtype=torch.bool, device=self._device).tril()[None, None]
        assert isinstance(pattern, Tensor)
        return pattern


def _within(function: MaskFunction | None, window: int, sinks: int) -> MaskFunction:
    def visible(rows: Tensor, heads: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        near = (keys > queries - window) | (keys < sinks)
        return near & ((keys <= queries) if function is None else function(rows, heads, queries, keys))

    return visible


def _causal(query: int, query_stop: int, key: int, key_stop: int, device: torch.device) -> Answer:
    if key_stop <= query + 1:
        return Visible.ALL
    if key >= query_stop:
        return Visible.NONE
    if (query, query_stop) == (key, key_stop):
        return Visible.DIAGONAL
    queries = torch.arange(query, query_stop, device=device)
    return (queries[:, None] >= torch.arange(key, key_stop, device=device))[None, None]
