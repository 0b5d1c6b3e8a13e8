"""Which weights and how much memory: as transformers chooses, and as what they become."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Gemma3nTextConfig, LlamaConfig

from ollm import disk_cache
from ollm.contracts.spill import MemorySnapshot
from ollm.errors import ConfigurationError, MemoryLimitError, ModelDirectoryError
from ollm.io.ledger import MemoryLedger
from ollm.seam import sizes
from ollm.seam.geometry import kv_geometry, largest
from together.comparison import assert_same, generate, stock_cache, tokens
from together.streamed_models import load, save_checkpoint, stock
from together.tiny_models import make_model

IDS = tokens(2, 12)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("llama"), make_model("llama"))


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def other_weights(folder, name, factor=2.0):
    """All weights again, as others."""
    (folder / name).parent.mkdir(exist_ok=True)
    others = {key: weight * factor for key, weight in load_file(folder / SINGLE).items()}
    save_file(others, folder / name, {"format": "pt"})
    return dict.fromkeys(others, name)


def with_index(folder):
    weight_map = other_weights(folder, "other-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def with_variants(folder):
    for name in ("model.fp16.safetensors", "consolidated.safetensors", "adapter_model.safetensors"):
        other_weights(folder, name)
    (folder / "pytorch_model.bin").write_bytes(b"never to be read")


def in_folders(folder):
    weight_map = other_weights(folder, "parts/all.safetensors")
    (folder / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {**weight_map, "nobody.needs": "parts/all.safetensors"}})
    )
    (folder / SINGLE).unlink()


def twice(folder):
    first = other_weights(folder, "a.safetensors")
    other_weights(folder, "b.safetensors", 3.0)
    weight_map = {**first, "lm_head.weight": "a.safetensors", "model.norm.weight": "b.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / SINGLE).unlink()


def named(folder):
    other_weights(folder, "chosen.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "chosen.safetensors"}))


@pytest.mark.parametrize("add", [with_index, with_variants, in_folders, twice, named])
def test_of_several_candidates_that_of_transformers_is_loaded(folder, add):
    add(folder)
    assert torch.equal(load(folder).model(IDS).logits, stock(folder)(IDS).logits)


def test_a_distributed_checkpoint_beside_the_weights_is_refused(folder):
    other_weights(folder, "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(ModelDirectoryError, match=r"holds shard-00001-model-00001-of-00001\.safetensors.*model\.safet"):
        load(folder)


class SmallLedger(MemoryLedger):
    """A machine with so much free."""

    def __init__(self, free):
        super().__init__()
        self.free = free

    def measure(self, device):
        return MemorySnapshot(
            device_type="cpu", host_total=self.free, host_free=self.free, device_total=self.free, device_free=self.free
        )


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1), (torch.float32, 2)])
def test_what_is_loaded_whole_needs_the_memory_of_what_it_becomes(tmp_path, monkeypatch, dtype, factor):
    """A checkpoint in bf16 takes twice its size as fp32. 64 MiB stay free in any case."""
    folder = save_checkpoint(tmp_path, make_model("llama").to(torch.bfloat16))
    size = sum(weight.nbytes for weight in load_file(folder / SINGLE).values())
    monkeypatch.setattr("ollm.api.inference.find_adapter", lambda config: ("none", NoParts()))
    monkeypatch.setattr(sizes, "ledger", SmallLedger(64 * 2**20 + size * factor + 5000))
    assert load(folder, dtype=dtype).model.dtype == dtype
    monkeypatch.setattr(sizes, "ledger", SmallLedger(64 * 2**20 + size * factor - 5000))
    with pytest.raises(MemoryLimitError, match=r"The weights, which cannot be streamed \(nobody knows"):
        load(folder, dtype=dtype)


class NoParts:
    """A model adapter that knows nothing."""

    def parts(self, model):
        raise ConfigurationError("nobody knows its layers")


def test_what_is_dequantised_needs_the_memory_of_what_it_becomes(tmp_path, monkeypatch):
    """MXFP4 on a CPU becomes bf16: nearly four times as many bytes."""
    model = make_model("gpt_oss").to(torch.bfloat16)
    experts = [layer.mlp.experts for layer in model.model.layers]
    dense = sum(weight.nbytes for weight in model.parameters())
    folder = save_checkpoint(tmp_path, model)
    weights = load_file(folder / SINGLE)
    for index in range(len(experts)):
        for name in ("gate_up_proj", "down_proj"):
            full = weights.pop(f"model.layers.{index}.mlp.experts.{name}")
            count, columns, rows = full.shape
            blocks = torch.zeros(count, rows, columns // 32, 16, dtype=torch.uint8)
            weights[f"model.layers.{index}.mlp.experts.{name}_blocks"] = blocks
            weights[f"model.layers.{index}.mlp.experts.{name}_scales"] = blocks[..., 0].clone()
    save_file(weights, folder / SINGLE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["lm_head", "model.embed_tokens"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sizes, "ledger", SmallLedger(64 * 2**20 + dense - 5000))
    with pytest.raises(MemoryLimitError, match=r"its weights are quantised"):
        load(folder)


def test_a_model_without_a_head_takes_a_cache(original, tmp_path):
    model = AutoModel.from_pretrained(original).eval()
    with disk_cache(model, cache_dir=tmp_path, ram_budget=0) as cache:
        ours = model(IDS, past_key_values=cache).last_hidden_state
    assert torch.allclose(ours, model(IDS).last_hidden_state, atol=1e-5)


def gemma3n(rows_share):
    """With a list of sizes of its layers, and layers that use what others keep."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = Gemma3nTextConfig(
        vocab_size=199, vocab_size_per_layer_input=199, hidden_size=32, hidden_size_per_layer_input=8, laurel_rank=8,
        intermediate_size=[48, 64, 48, 64, 48, 64], num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_kv_shared_layers=rows_share, sliding_window=12, activation_sparsity_pattern=[0.0] * 6,
        layer_types=["sliding_attention", "full_attention"] * 3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sharing", [0, 2])
def test_a_list_of_sizes_in_a_config(rows, sharing, tmp_path):
    model = gemma3n(sharing)
    ids = tokens(rows, 30)
    with disk_cache(model, cache_dir=tmp_path, ram_budget=0) as cache:
        assert_same(generate(model, ids, cache), generate(model, ids, stock_cache(model)))


def test_sizes_that_a_config_lists_for_its_layers():
    config = LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4)
    listed = {"num_key_value_heads": [1, 2, 4], "head_dim": [8, 16, 32], "intermediate_size": [10, 30, 20]}
    vars(config).update(listed)  # some configs have such lists; this one would check
    shapes = [(layer.kv_heads, layer.key_size) for layer in kv_geometry(config, torch.float32).layers]
    assert shapes == [(1, 8), (2, 16), (4, 32)]
    assert largest(config, "intermediate_size") == 30
    vars(config)["head_dim"] = ["8", 16, 32]
    with pytest.raises(ConfigurationError, match=r"head_dim is .*one for all layers or one for each"):
        kv_geometry(config, torch.float32)
