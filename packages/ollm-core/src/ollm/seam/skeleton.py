"""A model without the weights of its decoder layers: transformers builds it, ollm reads what is read.

`from_pretrained` decides on everything but the reading: dtype, buffers, tied weights, generation config and what is
missing are its own. Its step that reads is exchanged, on a subclass that exists for this one call. It begins with
holding the model that was built against the headers; where layers cannot be streamed, it ends with transformers' own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import build_glob_alternation
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils.loading_report import LoadStateDictInfo

from ollm.contracts.models import ModelParts
from ollm.errors import ModelDirectoryError, OllmError
from ollm.io.ledger import ledger
from ollm.seam import sizes
from ollm.seam.guards import guard
from ollm.seam.names import CannotStreamError, merged_shape, parameters_of
from ollm.weights.binding import LayerWeights, Owner
from ollm.weights.checkpoint import Checkpoint
from ollm.weights.layout import Parameter
from ollm.weights.memory import read_apart
from ollm.weights.streamer import WeightStreamer

logger = logging.getLogger("ollm")

FindParts = Callable[[nn.Module], ModelParts]


def build(
    path: Path,
    config: Any,
    checkpoint: Checkpoint,
    find_parts: FindParts,
    device: torch.device,
    whole: str,
    settings: Mapping[str, Any],
) -> tuple[Any, dict[str, Any], WeightStreamer | None]:
    """The model of a checked directory on its device, what transformers reports of its weights, and what streams its
    layers; `None` where it was loaded whole.

    Args:
        path, config: the directory and what `load_config` made of it.
        checkpoint: what is in its files.
        find_parts: the decoder layers of a built model.
        device: where it computes.
        whole: why its layers are not to be streamed; empty if they may be.
        settings: for `from_pretrained`.

    Raises:
        ModelDirectoryError: config and files do not belong together, or a file is damaged.
        MemoryLimitError: what does not belong to a layer does not fit, or the whole model where it is loaded whole.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelDirectoryError(f"{path} holds a {type(config).__name__}, of which transformers has no causal model.")
    model_class = _get_model_class(config, AutoModelForCausalLM._model_mapping)
    stock = model_class._load_pretrained_model
    step = _ReadingStep(path, checkpoint, find_parts, device, whole or _why_whole(config, device), stock)
    # transformers looks classes up by name
    body = {
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "_load_pretrained_model": staticmethod(step),
        # an adapter beside the weights is applied as any other, and then
        "load_adapter": lambda *_, **__: step.report,
    }
    one_off: Any = type(model_class.__name__, (model_class,), body)
    with sizes.no_more_modules_than_tensors(checkpoint):
        model, report = one_off.from_pretrained(path, config=config, **settings)
    model.__class__ = model_class
    if step.streamed is None:
        return _to(model, device), report, None
    _move_buffers(model, device)
    decoder, layers = step.streamed
    streamer = WeightStreamer(decoder, layers, checkpoint, device, path)
    guard((model, decoder), streamer)
    return model, report, streamer


def _why_whole(config: Any, device: torch.device) -> str:
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised"
    if type(config).extra_files:
        return "some of its weights are in files of other names"
    return "" if device.type in ("cpu", "cuda") else f"the device is {device}"


def _to(model: Any, device: torch.device) -> Any:
    needed = sum(weight.nbytes for weight in model.parameters() if weight.device != device)
    if needed:
        ledger.check("The weights, which cannot be streamed,", needed, device)
        model.to(device)
    return model


class _ReadingStep:
    """Stands in for `PreTrainedModel._load_pretrained_model`: reads what belongs to no decoder layer."""

    def __init__(
        self,
        path: Path,
        checkpoint: Checkpoint,
        find_parts: FindParts,
        device: torch.device,
        whole: str,
        stock: Callable[..., tuple[LoadStateDictInfo, Any]],
    ) -> None:
        self.streamed: tuple[nn.Module, list[LayerWeights]] | None = None
        """The module that calls the decoder layers, and their weights."""
        self.report: LoadStateDictInfo
        self._path = path
        self._checkpoint = checkpoint
        self._find_parts = find_parts
        self._device = device
        self._whole = whole
        self._stock = stock

    def __call__(
        self, model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> tuple[LoadStateDictInfo, Any]:
        sizes.check_buffers(model, self._checkpoint)
        layers = self._layers(model)
        dtype_of = functools.partial(_dtype, load_config.dtype_plan or {})
        offload_index = None
        try:
            if self._whole:
                raise CannotStreamError(self._whole)
            self.report = self._read(model, layers, load_config.weight_mapping or [], dtype_of)
        except CannotStreamError as reason:
            logger.info("%s is loaded whole, its layers cannot be streamed: %s", self._path, reason)
            sizes.check_memory(model, dtype_of, self._checkpoint, str(reason))
            self.report, offload_index = self._stock(model, state_dict, checkpoint_files, load_config, expected_keys)
        return self.report, offload_index

    def _read(self, model: Any, layers: Sequence[nn.Module] | str, transforms: Any, dtype_of: Any) -> LoadStateDictInfo:
        expected = model.state_dict(keep_vars=True)
        found = parameters_of(model, transforms, self._checkpoint.tensors)
        ready: dict[str, Parameter] = {}
        mismatched = []
        for name, sources in found.items():
            shape, wanted = merged_shape(sources, expected[name].shape), tuple(expected[name].shape)
            if shape != wanted:
                mismatched.append((name, shape, wanted))
            else:
                ready[name] = Parameter(name, dtype_of(name, expected[name]), wanted, sources)
        missing = sizes.missing_weights(model, expected, found)
        sizes.refuse_wrong(self._path, missing, mismatched, self._index_says(missing))
        if isinstance(layers, str):
            raise CannotStreamError(layers)
        decoder = _decoder_of(model, layers)
        weights, streamed = _layer_weights(model, layers, ready)
        others = [parameter for name, parameter in ready.items() if name not in streamed]
        for parameter, tensor in read_apart(others, self._device):
            _set(model, parameter.name, tensor)
        model._weight_conversions = [entry for entry in transforms if entry.was_used()]
        self.streamed = decoder, weights
        return LoadStateDictInfo(
            missing_keys=set(expected) - set(found) - streamed,
            unexpected_keys=set(),
            mismatched_keys=set(),
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        )

    def _layers(self, model: Any) -> Sequence[nn.Module] | str:
        """The decoder layers, as many as the checkpoint has, or why nobody knows them."""
        try:
            parts = self._find_parts(model)
        except OllmError as error:
            return str(error)
        sizes.check_layers(parts.key_prefix, len(parts.layers), model, model.config, self._checkpoint)
        return parts.layers

    def _index_says(self, missing: Sequence[str]) -> str:
        names = self._checkpoint.names
        for name in missing:
            if name in names.weight_map:
                return (
                    f" {names.index} says that {name} is in {names.weight_map[name]}: that file was swapped, or is of "
                    "another version."
                )
        return ""


def _decoder_of(model: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
    ours = {id(layer) for layer in layers}
    holders = [
        parent
        for parent in model.modules()
        if any({id(layer) for layer in child.children()} >= ours for child in parent.children())
    ]
    if not ours or not holders:
        raise CannotStreamError("its decoder layers are not in one list")
    return holders[-1]


def _layer_weights(
    model: Any, layers: Sequence[nn.Module], ready: Mapping[str, Parameter]
) -> tuple[list[LayerWeights], set[str]]:
    """What each layer's parameters are made of, and all names that these have in the model."""
    names = {id(module): name for name, module in model.named_modules()}
    owner: dict[int, int] = {}  # of each parameter: the layer
    weights, streamed = [], set()
    for index, layer in enumerate(layers):
        places: dict[int, list[tuple[str, Owner]]] = {}
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if owner.setdefault(id(parameter), index) != index:
                    raise CannotStreamError("its decoder layers share weights")
                full_name = f"{names[id(module)]}.{name}"
                places.setdefault(id(parameter), []).append((full_name, (module, name)))
        made = []
        for shared in places.values():
            found = [ready[full_name] for full_name, _ in shared if full_name in ready]
            if found:
                made.append((found[0], tuple(place for _, place in shared)))
                streamed |= {full_name for full_name, _ in shared}
                module, name = shared[0][1]
                # transformers' own mark, as if it were loaded: it fills in only what is not
                module.get_parameter(name)._is_hf_initialized = True  # type: ignore[attr-defined]
        weights.append(LayerWeights(layer, tuple(p for p, _ in made), tuple(where for _, where in made)))
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    if tied & streamed:
        raise CannotStreamError(f"a decoder layer shares {sorted(tied & streamed)[0]} with another part of the model")
    return weights, streamed


def _dtype(plan: Mapping[str, torch.dtype], name: str, expected: Tensor) -> torch.dtype:
    """The dtype that transformers loads a weight in: some stay in fp32 whatever the model is."""
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan))
        match = pattern.search(name)
        if match is not None and match.lastgroup is not None:
            return plan[by_group[match.lastgroup]]
    return expected.dtype


def _set(model: Any, name: str, tensor: Tensor) -> None:
    """Give a module a parameter or persistent buffer that was read."""
    path, _, own_name = name.rpartition(".")
    module = model.get_submodule(path)
    value: Any = tensor if own_name in module._buffers else nn.Parameter(tensor, tensor.is_floating_point())
    value._is_hf_initialized = True
    setattr(module, own_name, value)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """What transformers computed, such as rotary tables, goes where the weights are."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
