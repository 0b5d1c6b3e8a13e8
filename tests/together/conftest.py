"""Models made once per session, and a real third-party plugin on the path."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

from ollm.registry import registry
from together.tiny_models import make_model

PLUGINS = Path(__file__).parent / "plugins"


@pytest.fixture(scope="module", autouse=True)  # other tests of this process are to find what is really installed
def tiny_spill_installed():
    """The policy `tiny` of the distribution in `plugins/`, discovered like any other."""
    sys.path.insert(0, str(PLUGINS))
    registry.cache_clear()
    yield
    sys.path.remove(str(PLUGINS))
    registry.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and threads that wait for each other cost much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def model_of():
    """`model_of("llama")`: the tiny model of a family, made once."""
    return functools.cache(make_model)


@pytest.fixture
def model(request, model_of):
    """The model of the parametrized family; `llama` without parameters."""
    return model_of(getattr(request, "param", "llama"))
