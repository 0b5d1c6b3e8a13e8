"""Checkpoints on disk of tiny models, loaded with transformers for the truth and with ollm for what is tested."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ollm import AutoInference
from together.tiny_models import make_model


def save_checkpoint(folder, model, **settings):
    """A complete model directory."""
    model.save_pretrained(folder, **settings)
    vocabulary = {f"w{index}": index for index in range(model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0").save_pretrained(folder)
    return folder


def longer(family, layers=8, **changes):
    """A model of a family, with more layers than there are slots."""
    model = make_model(family)
    config = model.config
    changes = {"num_hidden_layers": layers, **changes}
    if getattr(config, "layer_types", None):
        changes["layer_types"] = (list(config.layer_types) * layers)[:layers]
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


@torch.inference_mode(False)  # as users load models: what is loaded in it takes other kernels
def load(folder, **settings):
    return AutoInference(folder, device="cpu", **{"logging": False, **settings})


@torch.inference_mode(False)
def stock(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
