"""`Stats`: stage timings and bytes of one loaded model. Knows what is counted; `ollm.seam.meter` counts."""

from __future__ import annotations

import attrs

from ollm.kv.state import KVCounters
from ollm.units import format_size
from ollm.weights.counters import WeightCounters


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
