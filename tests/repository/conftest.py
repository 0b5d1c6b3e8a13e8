"""A tiny model directory, and where the repository is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
_TEXTS = ["Keys and values live on disk, in extents of some tokens each.", "user assistant And then? And a longer one."]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Path:
    """A Llama with two layers and random weights, with a trained byte-level tokenizer. Not to be changed."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", chat_template=_CHAT_TEMPLATE
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=299,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def adapter_directory(tmp_path_factory, model_directory) -> Path:
    """A LoRA checkpoint for that model, as a trainer leaves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(directory)
    (directory / "optimizer.pt").write_bytes(b"not read")
    return directory


@pytest.fixture
def shallow(monkeypatch):
    """Children of this test that run the kit do so with the plugin `shallow`."""
    tests = str(ROOT / "tests")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), tests])))
    monkeypatch.setenv("PYTEST_PLUGINS", "repository.shallow")


@pytest.fixture
def docs_folder(tmp_path, monkeypatch, model_directory, adapter_directory) -> Path:
    """A working directory as the pages assume it: models and an adapter where they say."""
    shutil.copytree(model_directory, tmp_path / "models" / "llama3-1B-chat")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    shutil.copytree(adapter_directory, tmp_path / "myadapter" / "checkpoint-20")
    monkeypatch.chdir(tmp_path)
    return tmp_path
