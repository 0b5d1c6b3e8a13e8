"""`Binding`: the parameters of one decoder layer, bound to its modules as views of a buffer, and taken off again.

Modules are held by reference, so that it does not matter what somebody calls them, or wraps around them, later. A layer
that is not bound has placeholders, which hold no bytes. Knows modules and buffers, not how these are filled.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import attrs
import torch
from torch import Tensor, nn

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


Placeholder = Callable[[Parameter], Tensor]


def on_meta(parameter: Parameter) -> Tensor:
    """Fails loudly in whatever it is used by, rather than give another layer's weights."""
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")


def like_real(device: torch.device) -> Placeholder:
    """Holds one element, which is NaN."""

    def placeholder(parameter: Parameter) -> Tensor:
        value = torch.nan if parameter.dtype.is_floating_point else 0
        return torch.full((1,) * len(parameter.shape), value, dtype=parameter.dtype, device=device).expand(
            parameter.shape
        )

    return placeholder


class Binding:
    """One layer's parameters and where they are now."""

    def __init__(self, weights: LayerWeights, device: torch.device) -> None:
        """Placeholders at first look as if they were on `device`: for code that puts weights of its own beside them."""
        self.layout = WeightLayout(weights.parameters)
        self._places = weights.places
        self._bound: dict[Hashable, list[nn.Parameter]] = {}
        self.hide(like_real(device))

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What two layers have in common of which one may stand in for the other."""
        return tuple((parameter.shape, parameter.dtype) for parameter in self.layout.parameters)

    def bind(self, buffer: Tensor, owner: Binding | None = None) -> None:
        """Let the parameters be views of a buffer that holds the layer, or the layer `owner` of the same kind."""
        self._set((owner or self)._within(buffer))

    def unbind(self) -> None:
        """Let the parameters be placeholders."""
        self._set(self._hidden)

    def hide(self, placeholder: Placeholder) -> None:
        """Let the parameters be placeholders of this kind, now and after each `unbind`."""
        with torch.inference_mode(False):
            self._hidden = _parameters([placeholder(parameter) for parameter in self.layout.parameters])
        self._set(self._hidden)

    def forget(self) -> None:
        """Keep no views of buffers that are to be dropped."""
        self._bound.clear()

    def _within(self, buffer: Tensor) -> list[nn.Parameter]:
        """Made once per buffer."""
        key = buffer.data_ptr()
        if key not in self._bound:
            with torch.inference_mode(False):  # what is made in it may be used in it only
                self._bound[key] = _parameters(self.layout.views(buffer))
        return self._bound[key]

    def _set(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter, places in zip(parameters, self._places, strict=True):
            module, name = places[0]
            # kernels are chosen by it, and whoever froze a layer froze what is bound later, too
            parameter.requires_grad_(module.get_parameter(name).requires_grad)
            for module, name in places:
                module._parameters[name] = parameter


def _parameters(tensors: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(tensor, requires_grad=False) for tensor in tensors]
