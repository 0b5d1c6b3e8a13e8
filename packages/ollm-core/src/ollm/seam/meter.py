"""`Meter`: counts the forwards of a model, from outside, through hooks. Knows when; `Stats` knows what is counted."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
from torch import nn

from ollm.changes import Changes
from ollm.seam.geometry import without_adapter
from ollm.stats import Stats

logger = logging.getLogger("ollm")


@attrs.define
class _Log:
    """What was said of generations so far."""

    stats: Stats
    since: tuple[float, ...]
    """Totals when the latest one began."""
    logged: int = 0

    def flush(self) -> None:
        """Log the latest generation, unless it was logged before."""
        if self.logged < self.stats.generations:
            logger.info("generation %d: %s", self.stats.generations, self.stats.summary(self.since))
            self.logged = self.stats.generations


class Meter:
    """Fills a `Stats` from the forwards of a model, until `remove`. Of a model with an adapter those of the base model:
    PEFT's `generate` passes its own `forward` by."""

    def __init__(self, model: nn.Module, stats: Stats) -> None:
        self._stats = stats
        self._began = 0.0
        self._counting = True
        self._decoding = True
        self._log = _Log(stats, stats.totals())
        weakref.finalize(self, self._log.flush)  # the last one, when the process ends
        model = without_adapter(model)
        with Changes() as changes:
            changes.hook(model.register_forward_pre_hook, self._before, with_kwargs=True)
            changes.hook(model.register_forward_hook, self._after, with_kwargs=True)
            self._changes = changes.pop_all()

    def flush(self) -> None:
        """Log the latest generation, unless it was logged before."""
        self._log.flush()

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
        self._changes.close()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self._counting:
            return
        _, length = _shape(args, kwargs)
        if length > 1 and self._decoding:  # else it is a further chunk of the same prompt
            self.flush()
            self._log.since = self._stats.totals()
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
