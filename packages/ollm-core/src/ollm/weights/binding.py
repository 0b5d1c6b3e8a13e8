"""`Binding`: the parameters of one decoder layer, bound to its modules as views of a buffer, and taken off again.

Modules are held by reference, so that it does not matter what somebody calls them, or wraps around them, later. A layer
that is not bound has absent weights, and what somebody else does to its parameters is noticed, for it would be lost.
Knows modules and buffers, not how these are filled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import cast

import attrs
import torch
from torch import Tensor, nn

from ollm.errors import WeightsError
from ollm.weights.absent import AbsentWeight
from ollm.weights.layout import Parameter, WeightLayout

Owner = tuple[nn.Module, str]
"""A module, and the name that one of its own parameters has in it."""


@attrs.frozen(eq=False)
class LayerWeights:
    """A decoder layer, and what its parameters are made of."""

    module: nn.Module
    parameters: tuple[Parameter, ...]
    places: tuple[tuple[Owner, ...], ...]
    """For every parameter all places that share it."""


class Binding:
    """One layer's parameters and where they are now."""

    def __init__(self, weights: LayerWeights, device: torch.device, bring: Callable[[], bool]) -> None:
        """The layer is nowhere.

        Args:
            weights: the layer.
            device: where it seems to be while it is not bound.
            bring: have it kept in memory, if that is not decided yet; whether it is.
        """
        self.layout = WeightLayout(weights.parameters)
        self._places = weights.places
        self._bring = bring
        self._bound: dict[Hashable, list[nn.Parameter]] = {}
        # what others have noted of a parameter stays true of what takes its place
        self._notes = [dict(vars(module._parameters[name])) for (module, name), *_ in weights.places]
        self._absent: list[nn.Parameter] = [
            AbsentWeight(parameter.shape, parameter.dtype, device, functools.partial(self._find, number))
            for number, parameter in enumerate(weights.parameters)
        ]
        self._annotate(self._absent)
        self._now: Sequence[nn.Parameter] = [
            cast(nn.Parameter, module._parameters[name]) for (module, name), *_ in weights.places
        ]
        self._state: list[tuple[int, int]] = []
        self._set(self._absent)

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What two layers have in common of which one may stand in for the other."""
        return tuple((parameter.shape, parameter.dtype) for parameter in self.layout.parameters)

    @property
    def owners(self) -> Iterator[tuple[nn.Module, str]]:
        """The modules that hold the parameters, each with the name of one of them."""
        return (place for places in self._places for place in places)

    def bind(self, buffer: Tensor, owner: Binding | None = None) -> None:
        """Let the parameters be views of a buffer that holds the layer, or the layer `owner` of the same kind.

        Raises:
            WeightsError: somebody has put others in their place.
        """
        changed = self._replaced()
        if changed is not None:
            raise lost(changed, "was replaced")
        self._set((owner or self)._within(buffer))
        self._state = list(map(_state, self._now))

    def unbind(self) -> str | None:
        """Let the parameters be absent. The name of one that was changed since `bind`, if any was, so far as one can
        tell without comparing."""
        changed = self._replaced()
        if self._now is not self._absent:
            for parameter, now, before in zip(self.layout.parameters, self._now, self._state, strict=True):
                if _state(now) != before:
                    changed = changed or parameter.name
        if changed is not None:
            self.forget()
        self._set(self._absent)
        return changed

    def forget(self) -> None:
        """Keep no views of buffers that are to be dropped."""
        self._bound.clear()

    def check_present(self) -> None:
        """Have the layer kept in memory, if that is not decided yet.

        Raises:
            WeightsError: it is on disk.
        """
        if not self._bring():
            raise WeightsError(
                f"{self.layout.parameters[0].name} and the other weights of its layer are on disk, and are read only "
                "while a forward pass computes with them: they cannot be copied, saved, changed or looked at. Keep all "
                "layers in memory (offload_layers_to_cpu, or offload_layers_to_gpu, with as many as there are), or "
                "load the model with transformers."
            )

    def check_unchanged(self, buffer: Tensor, truth: Tensor) -> None:
        """Whether the layer may be dropped, whose parameters are views of `buffer`; `truth` holds what was read.

        Raises:
            WeightsError: somebody has changed it, which would be lost.
        """
        changed = self._replaced()
        views = zip(self.layout.parameters, self._now, self.layout.views(buffer), self.layout.views(truth), strict=True)
        for parameter, now, ours, read in views:
            same = now.data_ptr() == ours.data_ptr() and now.dtype == ours.dtype and now.shape == ours.shape
            if not same or not torch.equal(_bytes(ours), _bytes(read).to(ours.device)):
                changed = changed or parameter.name
        if changed is not None:
            raise lost(changed, "was changed while its layer was in memory")

    def _find(self, number: int) -> nn.Parameter:
        self.check_present()
        module, name = self._places[number][0]
        return module.get_parameter(name)

    def _replaced(self) -> str | None:
        """The name of a parameter that is not the one that was put there."""
        for parameter, now, places in zip(self.layout.parameters, self._now, self._places, strict=True):
            if any(module._parameters.get(name) is not now for module, name in places):
                return parameter.name
        return None

    def _within(self, buffer: Tensor) -> list[nn.Parameter]:
        """Made once per buffer."""
        key = buffer.data_ptr()
        if key not in self._bound:
            with torch.inference_mode(False):  # what is made in it may be used in it only
                # each with a counter of its own for changes in place, which views have together
                made = [nn.Parameter(view.data, requires_grad=False) for view in self.layout.views(buffer)]
            self._annotate(made)
            self._bound[key] = made
        return self._bound[key]

    def _annotate(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter, notes in zip(parameters, self._notes, strict=True):
            vars(parameter).update(notes)

    def _set(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter, before, places in zip(parameters, self._now, self._places, strict=True):
            module, name = places[0]
            there = module._parameters.get(name)
            # kernels are chosen by it, and whoever froze a layer froze what is bound later, too
            parameter.requires_grad_((before if there is None else there).requires_grad)
            for module, name in places:
                module._parameters[name] = parameter
        self._now = parameters


def _state(parameter: Tensor) -> tuple[int, int]:
    """What is another after a change in place, and after other memory was put in."""
    return parameter._version, parameter.data_ptr()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def lost(name: str, what: str) -> WeightsError:
    """The error for a change that was made to a parameter."""
    return WeightsError(
        f"{name} {what}. Its layer is read from the checkpoint again when it is needed, so the change would be lost: "
        "load the model again, and keep all layers in memory (offload_layers_to_cpu, or offload_layers_to_gpu, with as "
        "many as there are) before you change weights."
    )
