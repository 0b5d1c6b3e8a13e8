"""A model whose layers are streamed, and the same model in memory."""

from __future__ import annotations

import pytest
import torch

from core.weights.streamed_decoder import make_streamed, make_truth


@pytest.fixture
def truth():
    return make_truth()


@pytest.fixture
def streamed(tmp_path, truth):
    decoder, streamer = make_streamed(tmp_path, truth)
    yield decoder, streamer
    streamer.remove()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
