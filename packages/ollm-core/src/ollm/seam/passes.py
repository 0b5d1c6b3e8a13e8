"""A forward pass is a transaction: it leaves every layer of a cache with what it was given, or as it was before.

Knows what the layers held, and puts that back. Which calls of a model are passes is the business of `watch`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ollm.errors import CacheNotFilledError, InterruptedForwardError
from ollm.kv.history import LayerHistory
from ollm.kv.ids import TokenIds
from ollm.seam.layers import Kept, StoredLayer


class Pass:
    """One forward pass. `begin` comes first, `keep` or `undo` last; `undo` can be called again after an interrupt."""

    def __init__(
        self, layers: list[Any], attention: Iterable[int], histories: Mapping[int, LayerHistory], ids: TokenIds
    ) -> None:
        """Nothing is remembered yet.

        Args:
            layers: all of the cache.
            attention: the indices of those that count tokens.
            histories: of those that are stored.
            ids: of the tokens that the cache holds.
        """
        self.thread = threading.get_ident()
        self.decoder_tokens: int | None = None
        """How many tokens the decoder was given so far; `None` before it was called."""
        self.in_decoder = False
        self._layers, self._attention = layers, tuple(attention)
        self._histories, self._ids = histories, ids
        self._ids_before = ids.tokens
        self._lengths: dict[int, int] = {}
        self._kept: list[Kept] = []
        self._layers_before: list[Any] = []

    @property
    def held(self) -> int:
        """Tokens that the cache held when the pass began."""
        return max(self._lengths.values(), default=0)

    def begin(self, room: dict[int, dict[tuple[str, int], Tensor]]) -> None:
        """Remember what every layer holds.

        Args:
            room: for each layer, where copies of recurrent states go; kept from one pass to the next.

        Raises:
            InterruptedForwardError: the layers do not hold the same tokens.
        """
        self._layers_before = list(self._layers)
        self._lengths = {index: int(self._layers[index].get_seq_length()) for index in self._attention}
        if len({length for length in self._lengths.values() if length}) > 1:
            raise InterruptedForwardError(
                "The layers of this cache hold different numbers of tokens: something was added to some of them only. "
                "Call cache.reset() and start again."
            )
        for history in self._histories.values():
            history.begin()
        for index, layer in enumerate(self._layers):
            if type(layer) is not StoredLayer:
                self._kept.append(Kept(layer, room.setdefault(index, {})))

    def check(self, tokens: int | None) -> int:
        """How many tokens each layer has now beyond what it held.

        Args:
            tokens: how many the model was given; `None` where that cannot be told.

        Raises:
            CacheNotFilledError: a layer has others. One that never holds anything need not.
        """
        given = tokens if self.decoder_tokens is None else self.decoder_tokens
        now = {index: int(self._layers[index].get_seq_length()) for index in self._lengths}
        used = [index for index in now if now[index] or self._lengths[index]]
        wanted = now[used[0]] - self.held if given is None and used else given or 0
        wrong = [index for index in used or now if now[index] != self.held + wanted]
        if wrong:
            raise CacheNotFilledError(
                f"The model was given {wanted} tokens behind {self.held}, and layer {wrong[0]} of the cache now has "
                f"{now[wrong[0]]}: the model used another cache, or none, or filled this one otherwise. The pass was "
                "undone. Was the cache made for this model, and does nothing replace past_key_values on the way?"
            )
        return wanted

    def note(self, ids: Tensor | None, tokens: int) -> None:
        """Remember the ids `[rows, tokens]` of what was passed, or that they are unknown."""
        if ids is not None and ids.shape[1] == tokens:
            self._ids.fill(ids.shape[0], self.held, ids.device)
            self._ids.append(ids)

    def keep(self) -> None:
        """What was appended stays. An interrupt costs space at most."""
        for history in self._histories.values():
            history.keep()

    def undo(self) -> None:
        """Put back what every layer held."""
        self._layers[:] = self._layers_before or self._layers
        for history in self._histories.values():
            history.undo()
        for kept in self._kept:
            kept.put_back()
        self._ids.crop(self._ids_before)
