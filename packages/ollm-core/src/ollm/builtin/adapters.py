"""Model adapters: where a model keeps its decoder layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from ollm.plugin import ModelAdapter, ModelParts, OllmError


class LlamaAdapter(ModelAdapter):
    """Llama: `model.layers`, or `layers` of a model without a head."""

    def matches(self, config: Any) -> bool:
        return bool(config.model_type == "llama")

    def parts(self, model: nn.Module) -> ModelParts:
        name = "model.layers" if hasattr(model, "model") else "layers"  # the second without a head
        return ModelParts(layers=tuple(model.get_submodule(name).children()), key_prefix=f"{name}.")


class GenericAdapter(ModelAdapter):
    """Any model that holds exactly one list of as many modules as its text config has layers."""

    def matches(self, config: Any) -> bool:
        return True

    def parts(self, model: nn.Module) -> ModelParts:
        config: Any = model.config
        count = config.get_text_config(decoder=True).num_hidden_layers
        found = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        ]
        if len(found) != 1:
            raise OllmError(
                f"Cannot tell the {count} decoder layers of this {type(model).__name__}: "
                f"{', '.join(name for name, _ in found) or 'no list of modules'} would fit. "
                "A model adapter for this family is needed: see docs/how-to/write-a-plugin.md."
            )
        name, layers = found[0]
        return ModelParts(layers=tuple(layers), key_prefix=f"{name}.")
