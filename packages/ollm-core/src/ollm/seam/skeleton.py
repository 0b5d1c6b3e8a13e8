"""A model without the weights of its decoder layers: transformers builds it, ollm reads what is read.

`from_pretrained` decides on everything but the reading: dtype, buffers, tied weights, generation config and what is
missing are its own. Its step that reads is exchanged, on a subclass that exists for this one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import build_glob_alternation
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils.loading_report import LoadStateDictInfo

from ollm.errors import OllmError
from ollm.seam.guards import guard
from ollm.seam.names import CannotStreamError, merged_shape, parameters_of
from ollm.weights.binding import LayerWeights, Owner
from ollm.weights.checkpoint import Checkpoint
from ollm.weights.layout import Parameter
from ollm.weights.memory import read_apart
from ollm.weights.streamer import WeightStreamer

FindLayers = Callable[[nn.Module], Sequence[nn.Module]]


def build_streamed(
    path: Path, config: Any, find_layers: FindLayers, device: torch.device, settings: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], WeightStreamer]:
    """The model of a checked directory, what transformers reports of its weights, and what streams its layers.

    Args:
        path, config: the directory and what `load_config` made of it.
        find_layers: the decoder layers of a built model, in order.
        device: a CPU or a CUDA device.
        settings: for `from_pretrained`.

    Raises:
        CannotStreamError: the model has to be loaded by transformers alone.
        ModelDirectoryError: for damaged files.
        MemoryLimitError: what does not belong to a layer does not fit.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise CannotStreamError("its weights are quantised")
    if (path / "adapter_config.json").exists():
        raise CannotStreamError("its directory holds an adapter")
    if device.type not in ("cpu", "cuda"):
        raise CannotStreamError(f"the device is {device}")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise CannotStreamError("it has no causal model")
    model_class = _get_model_class(config, AutoModelForCausalLM._model_mapping)
    step = _ReadingStep(Checkpoint.open(path), find_layers, device)
    # transformers looks classes up by name
    body = {
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
        "_load_pretrained_model": staticmethod(step),
    }
    one_off: Any = type(model_class.__name__, (model_class,), body)
    model, report = one_off.from_pretrained(path, config=config, **settings)
    model.__class__ = model_class
    _move_buffers(model, device)
    streamer = WeightStreamer(step.decoder, step.layers, step.checkpoint, device, path)
    guard((model, step.decoder), streamer)
    return model, report, streamer


class _ReadingStep:
    """Stands in for `PreTrainedModel._load_pretrained_model`: reads what belongs to no decoder layer."""

    def __init__(self, checkpoint: Checkpoint, find_layers: FindLayers, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.decoder: nn.Module
        self.layers: list[LayerWeights]
        self._find_layers = find_layers
        self._device = device

    def __call__(
        self, model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> tuple[LoadStateDictInfo, None]:
        transforms = load_config.weight_mapping or []
        expected = model.state_dict(keep_vars=True)
        found = parameters_of(model, transforms, self.checkpoint.tensors)
        plan = load_config.dtype_plan or {}
        ready: dict[str, Parameter] = {}
        mismatched = set()
        for name, sources in found.items():
            shape, wanted = merged_shape(sources, expected[name].shape), tuple(expected[name].shape)
            if shape != wanted:
                mismatched.add((name, shape, wanted))
            else:
                ready[name] = Parameter(name, _dtype(name, expected[name], plan), wanted, sources)
        self.layers, streamed = _layer_weights(model, self._decoder_layers(model), ready)
        others = [parameter for name, parameter in ready.items() if name not in streamed]
        for parameter, tensor in read_apart(others, self._device):
            _set(model, parameter.name, tensor)
        model._weight_conversions = [entry for entry in transforms if entry.was_used()]
        return LoadStateDictInfo(
            missing_keys=set(expected) - set(found) - streamed,
            unexpected_keys=set(),
            mismatched_keys=mismatched,
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        ), None

    def _decoder_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        try:
            layers = self._find_layers(model)
        except OllmError as error:
            raise CannotStreamError(str(error)) from error
        ours = {id(layer) for layer in layers}
        holders = [
            parent
            for parent in model.modules()
            if any({id(layer) for layer in child.children()} >= ours for child in parent.children())
        ]
        if not ours or not holders:
            raise CannotStreamError("its decoder layers are not in one list")
        self.decoder = holders[-1]
        return layers


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


def _dtype(name: str, expected: Tensor, plan: Mapping[str, torch.dtype]) -> torch.dtype:
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
