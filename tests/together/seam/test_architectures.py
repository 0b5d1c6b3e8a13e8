"""Breadth: fifty architectures, each in the mode that core itself chooses, token for token and logit for logit."""

from __future__ import annotations

import re

import pytest
import torch
import transformers

from together.architectures import TESTED, make
from together.comparison import assert_same, cache_for, generate, stock_cache

TENSOR_MODE = {
    "bloom": "its attention cannot be exchanged",
    "codegen": "its attention cannot be exchanged",
    "xglm": "its attention cannot be exchanged",
    "deepseek_v3": r"\.shape: keys and values",  # latent attention expands keys after the cache
    "diffllama": "chunk: keys and values",
    **(
        {"gemma2": "its logits differ"} if transformers.__version__.startswith("5.17") else {}
    ),  # stock lacks its softcap
    "jetmoe": r"\.repeat: keys and values",
}

if transformers.__version__.startswith("5.17"):
    TENSOR_MODE["gemma2"] = "its logits differ"  # from stock sdpa, which leaves out the softcap there


@pytest.mark.parametrize("model_type", TESTED)
def test_generation_is_that_of_transformers(model_type, tmp_path):
    model = make(model_type)
    ids = torch.randint(3, 101, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    stock = generate(model, ids, stock_cache(model), new_tokens=10, attention_mask=mask, pad_token_id=0)
    with cache_for(model, tmp_path) as cache:
        assert_same(generate(model, ids, cache, new_tokens=10, attention_mask=mask, pad_token_id=0), stock)
        state = cache.state()
    assert state.mode == ("tensor" if model_type in TENSOR_MODE else "block"), state.mode_reason


@pytest.mark.parametrize("model_type", TENSOR_MODE)
def test_why_a_model_is_in_tensor_mode_is_told(model_type, tmp_path):
    with cache_for(make(model_type), tmp_path) as cache:
        reason = cache.state().mode_reason
    assert re.search(TENSOR_MODE[model_type], reason), reason
