"""What a checkpoint's tensors are called in the model, and which parameters are made of several of them.

transformers' own renaming decides. Of its conversions those are understood that stack and concatenate tensors, as the
experts of a layer, so that each stored tensor lies in the parameter in one piece; any other has to be carried out on
whole tensors, by transformers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ollm.weights.layout import Source
from ollm.weights.shards import StoredTensor


class CannotStreamError(Exception):
    """Why a checkpoint cannot be read tensor by tensor. Caught where it is loaded whole instead."""


Parts = list[tuple[str | None, StoredTensor]]
"""A parameter's tensors, each with the pattern of the conversion that it was found by."""


def parameters_of(
    model: Any, transforms: Sequence[Any], tensors: Mapping[str, StoredTensor]
) -> dict[str, tuple[Source, ...]]:
    """For every name in the model's state dict that the checkpoint has, what it is made of.

    Raises:
        CannotStreamError: for a conversion that is more than putting tensors together.
        ModelDirectoryError: one of these tensors is damaged.
    """
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    if len(renamings) + len(converters) != len(transforms):
        raise CannotStreamError("its weights are renamed in a way that ollm does not know")
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, Parts] = defaultdict(list)
    for name in sorted(tensors, key=dot_natural_key):  # the order in which transformers puts experts together
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if renamed not in expected and name in expected:
            renamed, pattern = rename_source_key(name, [], [], prefix, expected)
        if renamed in expected:
            tensors[name].check()
            found[renamed].append((pattern, tensors[name]))
        elif pattern is not None and len(by_pattern[pattern].target_patterns) > 1:
            raise CannotStreamError(f"{name} is converted into several weights")
    return {name: _sources(name, parts, by_pattern) for name, parts in found.items()}


def _sources(name: str, parts: Parts, by_pattern: Mapping[str, WeightConverter]) -> tuple[Source, ...]:
    pattern = parts[0][0]
    if pattern is None:
        return (Source(parts[-1][1]),)
    converter = by_pattern[pattern]
    if len(converter.target_patterns) > 1 or not all(map(_puts_together, converter.operations)):
        raise CannotStreamError(f"{name} is converted by {', '.join(map(_name, converter.operations))}")
    if len({part.shape[1:] for _, part in parts}) > 1:
        raise CannotStreamError(f"{name} is put together from tensors of different shapes")
    return tuple(_places(parts, converter))


def _puts_together(operation: Any) -> bool:
    """Exactly these classes: a subclass may do more."""
    return type(operation) in (MergeModulelist, Concatenate)


def _name(operation: Any) -> str:
    return type(operation).__name__


def _places(parts: Parts, converter: WeightConverter) -> Iterable[Source]:
    """Where each tensor lies in the parameter: the conversion itself is asked, with the numbers of their rows."""
    labels: dict[str, list[torch.Tensor]] = defaultdict(list)
    first, starts = 0, []
    for pattern, stored in parts:
        if pattern is None or len(stored.shape) < 2:
            raise CannotStreamError(f"{stored.name} is put together in an unknown way")
        rows = math.prod(stored.shape[:-1])
        labels[pattern].append(torch.arange(first, first + rows).view(*stored.shape[:-1], 1))
        starts.append(first)
        first += rows
    collected: Any = dict(labels)
    for operation in converter.operations:
        collected = operation.convert(
            collected, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns
        )
    (merged,) = collected.values()
    rows_in_order = torch.as_tensor(merged[0] if isinstance(merged, list) else merged).reshape(-1)
    place_of_row = torch.empty(first, dtype=torch.long)
    if len(rows_in_order) != first:
        raise CannotStreamError(f"{parts[0][1].name} is used more than once")
    place_of_row[rows_in_order] = torch.arange(first)
    for start, (_, stored) in zip(starts, parts, strict=True):
        rows = math.prod(stored.shape[:-1])
        places = place_of_row[start : start + rows]
        if not torch.equal(places, places[0] + torch.arange(rows)):
            raise CannotStreamError(f"{stored.name} does not lie in one piece in what it becomes")
        yield Source(stored, int(places[0]) * stored.shape[-1])


def merged_shape(sources: Sequence[Source], expected: Sequence[int]) -> tuple[int, ...]:
    """The shape that the sources have as a parameter, for comparison with the one expected."""
    if len(sources) == 1 and sources[0].at == 0:
        return sources[0].stored.shape
    covered = sum(math.prod(source.stored.shape) for source in sources)
    same_rows = all(source.stored.shape[-1] == expected[-1] for source in sources)
    return tuple(expected) if same_rows and covered == math.prod(expected) else (covered,)
