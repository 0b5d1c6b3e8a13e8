"""Whether a config can be that of a checkpoint: its numbers are held against the headers, before a model is built,
while it is built without weights, and before it gets any. So a refusal takes neither long nor much memory.

Knows configs, modules without weights and headers; reads no tensor.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.utils.loading_report import LoadStateDictInfo

from ollm.errors import ModelDirectoryError
from ollm.io.ledger import ledger
from ollm.weights.checkpoint import Checkpoint
from ollm.weights.shards import brief

_COUNTS = re.compile(r"layer|block|expert|head|depth|group|label|stage|codebook|mtp|nextn", re.IGNORECASE)
"""Numbers with such names say how often something is made."""
_HARMLESS = 2**16
"""Whatever is made so often, it takes no second."""
_MODULES_PER_TENSOR = 16
_MOST_SMALL_MODULES = 20_000
_WEIGHTS_PER_BYTE = 16
"""What is quantised has several weights in a byte; no model has more than so many."""
_MOST_SMALL_BYTES = 2**30


def check_numbers(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Check that nothing in a config is to be made more often than the checkpoint has tensors, or numbers in a row.

    Args:
        config: as `config.json` says it, before a config object loops over it.
        checkpoint: the headers.

    Raises:
        ModelDirectoryError: names the number.
    """
    longest = max((size for tensor in checkpoint.tensors.values() for size in tensor.shape), default=0)
    most = max(len(checkpoint.tensors), longest, _HARMLESS)
    for name, number in _counts(config):
        if number > most:
            raise ModelDirectoryError(
                f"The config says {name[:80]}={brief(number)}, and the checkpoint holds {len(checkpoint.tensors)} "
                f"tensors with at most {longest} numbers in a row: they do not belong together. Get the model again."
            )


def check_has_layers(config: Any) -> None:
    """Check that the model of a config object has any decoder layers.

    Raises:
        ModelDirectoryError: it has none, or what it has is no number.
    """
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 1)
    if isinstance(layers, int) and not isinstance(layers, bool) and layers >= 1:
        return
    raise ModelDirectoryError(
        f"The config says num_hidden_layers={brief(layers)}; a model has at least one. Get the model again."
    )


@contextmanager
def no_more_modules_than_tensors(checkpoint: Checkpoint) -> Iterator[None]:
    """Meanwhile, this thread makes only as many modules as the tensors of a checkpoint can be for.

    Raises:
        ModelDirectoryError: where it would make more.
    """
    most = _MODULES_PER_TENSOR * len(checkpoint.tensors) + _MOST_SMALL_MODULES
    thread, made = threading.get_ident(), 0

    def count(*_: object) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > most:
            raise ModelDirectoryError(
                f"The config describes a model of more than {most} parts, and the checkpoint has "
                f"{len(checkpoint.tensors)} tensors: they do not belong together. Get the model again."
            )

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def check_layers(key_prefix: str, layers: int, model: Any, config: Any, checkpoint: Checkpoint) -> None:
    """Check that the checkpoint holds no more decoder layers than the model has: it would answer without the others.

    Args:
        key_prefix: of the layers' weights in the model.
        layers: how many the model has.
        model: knows what transformers leaves out on purpose, as the layers of DeepSeek that predict further tokens.
        config: its config object.
        checkpoint: the headers.

    Raises:
        ModelDirectoryError: names a tensor of such a layer.
    """
    extra = sum(number for name, number in _counts(config.to_dict()) if re.search(r"nextn|mtp", name, re.IGNORECASE))
    stem = key_prefix.removeprefix(f"{model.base_model_prefix}.")
    number = re.compile(rf"(?:{re.escape(model.base_model_prefix)}\.)?{re.escape(stem)}(\d{{1,9}})\.")
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for name in checkpoint.tensors:
        found = number.match(name)
        if found and int(found[1]) >= layers + extra and not any(pattern.search(name) for pattern in ignored):
            raise ModelDirectoryError(
                f"The config says that there are {layers} decoder layers, and the checkpoint holds {brief(name)}: they "
                "do not belong together. Get the model again."
            )


def check_memory(model: nn.Module, dtype_of: Any, checkpoint: Checkpoint, reason: str) -> None:
    """Check that a model that is loaded whole finds room as what it becomes: dequantised, and in the dtype asked for.

    Args:
        model: without weights.
        dtype_of: the dtype that a parameter of a name gets.
        checkpoint: the headers.
        reason: why it is loaded whole.

    Raises:
        ModelDirectoryError: it is far larger than the checkpoint can be.
        MemoryLimitError: so much is not free.
    """
    weights = {id(weight): (name, weight) for name, weight in model.named_parameters()}.values()
    needed = sum(weight.numel() * dtype_of(name, weight).itemsize for name, weight in weights)
    elements = sum(weight.numel() for _, weight in weights)
    if elements > _WEIGHTS_PER_BYTE * checkpoint.nbytes + _MOST_SMALL_BYTES:
        raise ModelDirectoryError(
            f"The config describes a model of {elements} weights, and the checkpoint has {checkpoint.nbytes} bytes: "
            "they do not belong together. Get the model again."
        )
    ledger.check(f"The weights, which cannot be streamed ({reason}),", needed, torch.device("cpu"))


def check_buffers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Check that what a model computes for itself, such as tables of positions, is not far larger than its checkpoint.

    Raises:
        ModelDirectoryError: it is.
        MemoryLimitError: so much is not free.
    """
    needed = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers() if buffer.is_meta)
    if needed > 4 * checkpoint.nbytes + _MOST_SMALL_BYTES:
        raise ModelDirectoryError(
            f"By its config, the model would compute {needed} bytes of tables for itself, and the checkpoint has "
            f"{checkpoint.nbytes} bytes: they do not belong together. Get the model again."
        )
    ledger.check("Tables that the model computes for itself", needed, torch.device("cpu"))


def missing_weights(model: Any, expected: Mapping[str, Tensor], found: Iterable[str]) -> list[str]:
    """The names that a model needs and nobody gives it: neither found, nor tied to what is, nor computed."""
    there = set(found)
    report = LoadStateDictInfo(
        missing_keys=set(expected) - there, unexpected_keys=set(), mismatched_keys=set(), error_msgs=[],
        conversion_errors={}, skipped_pp_keys=set(),
    )  # fmt: skip
    model._adjust_missing_and_unexpected_keys(report)
    shared = {id(expected[name]) for name in there}  # modules that are one and the same
    tied = model.all_tied_weights_keys
    sources = {source for target, source in tied.items() if target in there} | there
    return sorted(
        name
        for name in report.missing_keys
        if id(expected[name]) not in shared and name not in sources and tied.get(name) not in sources
    )


def refuse_wrong(
    path: Any, missing: Sequence[str], mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]], hint: str = ""
) -> None:
    """Refuse weights that stock loading would fill with random numbers.

    Raises:
        ModelDirectoryError: names the first of them, if there are any.
    """
    wrong = [*missing, *(f"{name} ({list(there)}, not {list(wanted)})" for name, there, wanted in mismatched)]
    if wrong:
        raise ModelDirectoryError(
            f"The checkpoint in {path} lacks {len(wrong)} of the model's weights, or has them in another shape: "
            f"{', '.join(map(str, wrong[:4]))}{' …' if len(wrong) > 4 else ''}.{hint} Get the model again."
        )


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The numbers of a config that say how often something is made, those of its parts too."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif _COUNTS.search(str(name)):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int):
                    yield str(name), number
