"""The adapter contract (the guide's "specialization provider"): what core must know about a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from torch import nn


@attrs.frozen(kw_only=True)
class ModelParts:
    """Where a loaded model keeps the parts that core places, streams or measures.

    Attributes:
        layers: the decoder layers, in order.
        key_prefix: prefix of the layers' weights in the model's state dict, such as `model.layers.`.
        text_key_prefix: prefix of the text model in a multimodal checkpoint, such as `language_model.`.
    """

    layers: Sequence[nn.Module]
    key_prefix: str
    text_key_prefix: str = ""


class ModelAdapter(ABC):
    """Knows one model family. Holds no model and no state."""

    @abstractmethod
    def matches(self, config: Any) -> bool:
        """Whether this adapter is for models of this (transformers) config. Reads the config, loads nothing."""

    @abstractmethod
    def parts(self, model: nn.Module) -> ModelParts:
        """Find the parts of a loaded model.

        Raises:
            OllmError: when the model is not built as the adapter expects.
        """
