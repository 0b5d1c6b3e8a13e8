"""What is done to a whole model whose weights are streamed, and needs all of them: refused before any part is done.

`WeightStreamer` refuses each single weight; here are the methods that would have saved, moved or loaded half a model by
then. Knows the model's methods, not where weights are.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ollm.weights.streamer import WeightStreamer

Streamer = weakref.ref[WeightStreamer]
Model = weakref.ref[nn.Module]


def guard(models: Iterable[nn.Module], streamer: WeightStreamer) -> None:
    """Until the streamer is removed, refuse with a `WeightsError` what would be done by halves to one of these models,
    each of which has all of its layers."""
    guards: dict[str, Callable[..., Any]] = {"save_pretrained": _save, "_apply": _move, "load_state_dict": _load}
    for model in models:
        for name in guards.keys() & set(dir(model)):
            around = functools.partial(guards[name], weakref.ref(streamer), weakref.ref(model))
            streamer.changes.wrap(model, around, name)


def _save(streamer: Streamer, model: Model, save: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Adapters alone are saved without the weights that they belong to."""
    known = streamer()
    if known is not None and not getattr(model(), "_hf_peft_config_loaded", False):
        known.check_present()
    return save(*args, **kwargs)


def _move(streamer: Streamer, model: Model, move: Callable[..., Any], change: Any, *args: Any, **kwargs: Any) -> Any:
    """To another device or dtype, unless that is where the model is."""
    known = streamer()
    if known is not None:
        for weight in list(known.absent):
            if change(weight) is not weight:
                known.check_present()
                break
    return move(change, *args, **kwargs)


def _load(
    streamer: Streamer, model: Model, load: Callable[..., Any], state_dict: Any, *args: Any, **kwargs: Any
) -> Any:
    """Numbers for weights that are absent."""
    known, target = streamer(), model()
    if known is not None and target is not None:
        absent = set(map(id, known.absent))
        if any(id(weight) in absent and name in state_dict for name, weight in target.named_parameters()):
            known.check_present()
    return load(state_dict, *args, **kwargs)
