"""`Stats`: stage timings and bytes of one loaded model, counted from outside through forward hooks."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from ollm.kv.state import KVCounters
from ollm.units import format_size
from ollm.weights.counters import WeightCounters

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("ollm")


@attrs.define
class Stats:
    """Counters since the model was loaded. A forward of several tokens counts as prefill, one of a single as decode.

    One line per generation is logged (logger `ollm`, level INFO) when the next generation or cache begins, for
    transformers does not say when one ends.
    """

    load_seconds: float = 0.0
    """Loading the model from disk."""
    load_bytes: int = 0
    """Weights of the model. Those of its decoder layers are read when a placement or a forward pass needs them."""
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    generations: int = 0
    caches: list[KVCounters] = attrs.field(factory=list, repr=False)
    """Counters of every cache made for this model."""

    weights: WeightCounters = attrs.field(factory=WeightCounters)
    """What reading decoder layers cost; all zero for a model that was loaded whole."""

    @property
    def kv_saved_bytes(self) -> int:
        """Keys and values handed to stores."""
        return sum(cache.saved_bytes for cache in self.caches)

    @property
    def kv_save_seconds(self) -> float:
        return sum(cache.save_seconds for cache in self.caches)

    @property
    def kv_loaded_bytes(self) -> int:
        """Keys and values read back from stores."""
        return sum(cache.loaded_bytes for cache in self.caches)

    @property
    def kv_load_seconds(self) -> float:
        return sum(cache.load_seconds for cache in self.caches)

    def totals(self) -> tuple[float, ...]:
        """The counters that a generation adds to, in the order of `summary`."""
        return (
            self.prefill_tokens, self.prefill_seconds, self.decode_tokens, self.decode_seconds,
            self.kv_saved_bytes, self.kv_save_seconds, self.kv_loaded_bytes, self.kv_load_seconds,
            self.weights.read_bytes, self.weights.wait_seconds,
        )  # fmt: skip

    def summary(self, since: tuple[float, ...] = (0,) * 10) -> str:
        """The counters in one line; `since`: earlier `totals()` to be subtracted."""
        prefilled, prefill, decoded, decode, saved, save, loaded, load, weights, waited = (
            now - then for now, then in zip(self.totals(), since, strict=True)
        )
        return (
            f"prefill {prefilled:.0f} tokens in {prefill:.2f} s, decode {decoded:.0f} tokens in {decode:.2f} s, "
            f"KV saved {format_size(int(saved))} in {save:.2f} s, "
            f"KV loaded {format_size(int(loaded))} in {load:.2f} s, "
            f"weights read {format_size(int(weights))}, waited {waited:.2f} s"
        )


class Meter:
    """Fills a `Stats` from the forwards of a model. Removable; changes nothing of the model."""

    def __init__(self, model: nn.Module, stats: Stats) -> None:
        self._stats = stats
        self._began = 0.0
        self._counting = True
        self._decoding = True
        self._logged = 0
        self._since = stats.totals()
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def flush(self) -> None:
        """Log the latest generation, unless it was logged before."""
        if self._logged < self._stats.generations:
            logger.info("generation %d: %s", self._stats.generations, self._stats.summary(self._since))
            self._logged = self._stats.generations

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing meanwhile: forwards that the user did not ask for."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self._counting:
            return
        _, length = _shape(args, kwargs)
        if length > 1 and self._decoding:  # else it is a further chunk of the same prompt
            self.flush()
            self._since = self._stats.totals()
            self._stats.generations += 1
        self._decoding = length == 1
        self._began = time.perf_counter()

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self._counting:
            return
        seconds = time.perf_counter() - self._began
        rows, length = _shape(args, kwargs)
        if length == 1:
            self._stats.decode_tokens += rows
            self._stats.decode_seconds += seconds
        else:
            self._stats.prefill_tokens += rows * length
            self._stats.prefill_seconds += seconds


def _shape(args: Any, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Rows and new tokens of a forward; `(0, 0)` where it has neither ids nor embeddings."""
    for inputs in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if inputs is not None:
            return inputs.shape[0], inputs.shape[1]
    return 0, 0
