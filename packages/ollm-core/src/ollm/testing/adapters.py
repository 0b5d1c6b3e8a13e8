"""What every model adapter must find in a model that it claims."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from ollm.contracts.models import ModelAdapter


class ModelAdapterTests(ABC):
    """Tests of one model adapter.

    ```python
    class TestMyAdapter(ModelAdapterTests):
        def adapter(self):
            return MyAdapter()

        def config(self):
            return MyConfig(hidden_size=64, num_hidden_layers=3, ...)
    ```
    """

    @abstractmethod
    def adapter(self) -> ModelAdapter:
        """The adapter under test."""

    @abstractmethod
    def config(self) -> Any:
        """A transformers config of its family; without weights being made, so of any size."""

    def test_it_claims_its_family(self) -> None:
        assert self.adapter().matches(self.config()) is True

    def test_it_claims_nothing_else(self) -> None:
        config = self.config()
        config.model_type = "some-other-family"
        assert self.adapter().matches(config) is False

    def test_the_layers_are_those_of_the_model_in_order(self) -> None:
        model = self._model()
        parts = self.adapter().parts(model)
        text = model.config.get_text_config(decoder=True)
        assert len(parts.layers) == text.num_hidden_layers
        names = {id(module): name for name, module in model.named_modules()}
        found = [names.get(id(layer)) for layer in parts.layers]
        expected = [f"{parts.key_prefix}{index}" for index in range(len(parts.layers))]
        assert found == expected, "key_prefix and the number of a layer must be its name in the model"

    def test_the_prefix_is_that_of_the_weights(self) -> None:
        model = self._model()
        parts = self.adapter().parts(model)
        keys = [key for key in model.state_dict() if key.startswith(parts.key_prefix)]
        assert len(keys) >= len(list(parts.layers)), f"weights whose names begin with {parts.key_prefix!r}"

    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):  # no memory
            return AutoModelForCausalLM.from_config(self.config())
