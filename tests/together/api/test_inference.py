"""`Inference` and `AutoInference` on local directories: the guide's first example, and all that can be wrong."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ollm import AutoInference, Inference, TextStreamer
from ollm.errors import (
    ConfigurationError,
    DeviceError,
    ModelDirectoryError,
    NotLoadedError,
    UnknownStrategyError,
)
from ollm.registry import Registry, registry
from ollm.registry.catalog import discover
from ollm.weights.absent import AbsentWeight
from together.comparison import tokens
from together.tiny_models import VOCABULARY, make_model

ALIAS = "llama3-1B-chat"


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory):
    """A models directory that holds the alias, sharded, with a tokenizer of one token per word."""
    folder = tmp_path_factory.mktemp("models")
    make_model("llama").save_pretrained(folder / ALIAS, max_shard_size="50KB")
    vocabulary = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0").save_pretrained(folder / ALIAS)
    assert len(list((folder / ALIAS).glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def copied(models_dir, tmp_path):
    """A copy of the model directory, to be damaged."""
    return shutil.copytree(models_dir / ALIAS, tmp_path / "model")


def load(models_dir, **more):
    o = Inference(ALIAS, device="cpu", **more)
    o.ini_model(models_dir=models_dir, force_download=False)
    return o


def test_the_first_example_of_the_guide(models_dir, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, "ollm")
    o = load(models_dir)
    o.offload_layers_to_cpu(layers_num=2, policy="middle-band")
    past_key_values = o.DiskCache(cache_dir=tmp_path, cache_strategy="chunked", ram_budget=0, spill_policy="tiny")
    text_streamer = TextStreamer(o.tokenizer, skip_prompt=True, skip_special_tokens=False)
    inputs = o.tokenizer("w5 w6 w7 w8 w9 w10 w11 w12 w13 w14", return_tensors="pt", return_token_type_ids=False)
    output = o.model.generate(
        **inputs, past_key_values=past_key_values, streamer=text_streamer, max_new_tokens=9, do_sample=False
    )
    assert capsys.readouterr().out.split() == o.tokenizer.decode(output[0, 10:]).split()
    stock = o.model.generate(**inputs, max_new_tokens=9, do_sample=False)
    assert torch.equal(output, stock)
    assert o.processor is None
    assert o.device == torch.device("cpu")
    assert o.adapter == "llama"
    assert (o.stats.prefill_tokens, o.stats.decode_tokens, o.stats.generations) == (20, 16, 2)
    assert o.stats.kv_saved_bytes == past_key_values.counters.saved_bytes > 0
    assert o.stats.kv_loaded_bytes > 0
    assert o.stats.load_bytes == sum(weight.nbytes for weight in o.model.parameters())
    past_key_values.close()
    o.DiskCache(cache_strategy="resident")  # a new cache ends the second generation
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("generation")]
    assert len(lines) == 2
    assert "generation 1: prefill 10 tokens" in lines[0]
    assert "decode 8 tokens" in lines[0]
    assert "KV saved 0 B" not in lines[0]
    assert "KV saved 0 B in 0.00 s, KV loaded 0 B" in lines[1]


def test_logging_off_takes_no_timings(models_dir):
    o = load(models_dir, logging=False)
    o.model(tokens(1, 5))
    assert o.stats.prefill_tokens == 0
    assert not o.model._forward_hooks


def test_auto_inference_loads_any_directory_in_its_constructor(models_dir, tmp_path):
    o = AutoInference(models_dir / ALIAS, device="cpu", logging=False)
    with o.DiskCache(tmp_path) as cache:
        o.model(tokens(1, 5), past_key_values=cache)
        assert cache.get_seq_length() == 5


def test_a_local_directory_and_a_hub_id_find_their_folder(models_dir, tmp_path):
    Inference(str(models_dir / ALIAS), device="cpu").ini_model()
    shutil.copytree(models_dir / ALIAS, tmp_path / "acme" / "tiny")
    Inference("acme/tiny", device="cpu").ini_model(tmp_path)


def test_dtype_is_the_checkpoints_unless_given(models_dir):
    assert load(models_dir).model.dtype == torch.float32
    assert load(models_dir, dtype=torch.bfloat16).model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model_id": "llama9"}, ConfigurationError, "no alias .llama3-1B-chat, .*no directory, and no Hub id"),
        ({"model_id": ""}, ConfigurationError, "no alias"),
        ({"device": "cuda:99"}, DeviceError, "device='cuda:99'.*Use device='auto' or 'cpu'"),
        ({"device": "abacus"}, DeviceError, "is no device: use 'auto'"),
        ({"dtype": "float32"}, ConfigurationError, "give a floating-point torch.dtype"),
        ({"dtype": torch.int8}, ConfigurationError, "give a floating-point torch.dtype"),
        ({"multimodality": True}, ConfigurationError, "text models only"),
    ],
)
def test_bad_arguments_fail_in_the_constructor(arguments, error, message):
    with pytest.raises(error, match=message):
        Inference(**{"model_id": ALIAS, "device": "cpu", **arguments})


def test_a_device_that_is_there_and_that_we_cannot_copy_to_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(DeviceError, match=r"device='mps': .* not supported: use 'auto', 'cpu' or 'cuda:0'"):
        Inference(ALIAS, device="mps")


def test_nothing_works_before_a_model_is_loaded(tmp_path):
    o = Inference(ALIAS, device="cpu")
    with pytest.raises(NotLoadedError, match=r"DiskCache.*call ini_model"):
        o.DiskCache(cache_dir=tmp_path)
    with pytest.raises(NotLoadedError, match=r"offload_layers_to_cpu.*call ini_model"):
        o.offload_layers_to_cpu(1)


def test_a_missing_model_directory_says_how_to_get_it(tmp_path):
    o = Inference(ALIAS, device="cpu")
    with pytest.raises(ModelDirectoryError, match=r"no model directory .*hf download unsloth/Llama-3\.2-1B-Instruct"):
        o.ini_model(tmp_path)
    with pytest.raises(ConfigurationError, match="does not download"):
        o.ini_model(tmp_path, force_download=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ModelDirectoryError, match="no model directory"):
        AutoInference(tmp_path / "nothing", device="cpu")


def test_an_incomplete_directory_lists_everything_that_is_missing(copied):
    (copied / "config.json").unlink()
    (copied / "tokenizer.json").unlink()
    next(copied.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(ModelDirectoryError, match=r"missing: config\.json, model-00002-of-.*, a tokenizer"):
        AutoInference(copied, device="cpu")


def test_pickled_weights_are_refused(copied):
    for weights in copied.glob("*.safetensors*"):
        weights.unlink()
    (copied / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelDirectoryError, match=r"pytorch_model\.bin only.*refused.*safetensors"):
        AutoInference(copied, device="cpu")


def rewrite(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def shard_outside(copied):
    rewrite(
        copied / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"lm_head.weight": "../x.safetensors"}),
    )


def cut_a_shard(copied):
    shard = next(copied.glob("model-00001-of-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def drop_a_weight(copied):
    rewrite(copied / "model.safetensors.index.json", lambda index: index["weight_map"].pop("model.norm.weight"))
    for shard in copied.glob("model-*.safetensors"):
        from safetensors.torch import load_file, save_file

        weights = load_file(shard)
        if weights.pop("model.norm.weight", None) is not None:
            save_file(weights, shard, {"format": "pt"})


def remote_code(copied):
    rewrite(
        copied / "config.json",
        lambda config: config.update(model_type="mystery", auto_map={"AutoConfig": "configuration_mystery.C"}),
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shard_outside, r"names '\.\./x\.safetensors', which is not a safetensors file beside it"),
        (cut_a_shard, r"Cannot read the weights in .*model-00001-of-.*ends at byte .*get it again"),
        (drop_a_weight, r"lacks 1 of the model's weights.*model\.norm\.weight"),
        (remote_code, "ollm runs no code from model directories"),
        (lambda copied: (copied / "config.json").write_text("{"), "Cannot read .*config.json"),
        (lambda copied: (copied / "config.json").write_text("[]"), "is not a JSON object"),
        (lambda copied: (copied / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    ],
)
def test_a_damaged_directory_is_an_error_not_a_guess(copied, damage, message):
    damage(copied)
    with pytest.raises(ModelDirectoryError, match=message):
        AutoInference(copied, device="cpu")


@pytest.mark.parametrize(
    ("layers", "policy", "expected"),
    [
        (2, "prefix", (0, 1)),
        (2, "suffix", (1, 2)),
        (1, "middle-band", (1,)),
        (1, "auto", (1,)),
        (99, "suffix", (0, 1, 2)),
        (0, "auto", ()),
    ],
)
def test_placement_is_recorded_truthfully(models_dir, layers, policy, expected):
    o = load(models_dir, logging=False)
    record = o.offload_layers_to_cpu(layers_num=layers, policy=policy)
    assert o.placement is record
    assert record.layer_indices == expected
    assert (record.requested_layers, record.applied_layers, record.total_layers) == (layers, len(expected), 3)
    assert record.requested_policy == policy
    assert record.resolved_policy == ("middle-band" if policy == "auto" else policy)
    one_layer = sum(weight.nbytes for weight in o.model.model.layers[0].parameters())
    assert record.placed_bytes == one_layer * len(expected)
    assert record.tiers == tuple("device" if index in expected else "disk" for index in range(3))
    assert record.resident_bytes == record.placed_bytes
    assert record.streamed_bytes == one_layer * (3 - len(expected))
    assert isinstance(o.model.model.layers[2].mlp.up_proj.weight, AbsentWeight) == (2 not in expected)


@pytest.mark.parametrize("count", [-1, 1.5, True, "2", None])
def test_a_bad_layer_count_is_refused(models_dir, count):
    with pytest.raises(ConfigurationError, match=f"layers_num={count!r}"):
        load(models_dir).offload_layers_to_cpu(count)


def test_an_unknown_policy_lists_the_choices(models_dir):
    with pytest.raises(UnknownStrategyError, match=r"'center'.*auto, fit, interleaved, middle-band, prefix, suffix"):
        load(models_dir).offload_layers_to_cpu(1, policy="center")


def test_without_ollm_offload_the_error_says_how_to_install_it(models_dir, monkeypatch):
    o = load(models_dir)
    without = Registry(tuple(report for report in discover() if report.distribution != "ollm-offload"))
    monkeypatch.setattr("ollm.plan.placement.registry", lambda: without)
    with pytest.raises(UnknownStrategyError, match=r"pip install 'ollm-core\[offload\]'"):
        o.offload_layers_to_cpu(2, policy="middle-band")
    assert registry() is not without


def test_a_peft_adapter_is_applied(models_dir, tmp_path):
    """As a trainer leaves it: with files beside it that must not be read."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(load(models_dir).model, config).eval()
    checkpoint = tmp_path / "checkpoint-20"
    tuned.save_pretrained(checkpoint)
    (checkpoint / "optimizer.pt").write_bytes(b"not to be read")
    o = AutoInference(models_dir / ALIAS, adapter_dir=checkpoint, device="cpu")
    ids = tokens(1, 30)
    assert torch.equal(o.model(ids).logits, tuned(ids).logits)
    with o.DiskCache(tmp_path / "kv", ram_budget=0, spill_policy="tiny") as cache:
        ours = o.model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    # with the forward above as its first part; PEFT generates with the base model
    assert (o.stats.prefill_tokens, o.stats.decode_tokens, o.stats.generations) == (60, 7, 1)
    assert torch.equal(ours, tuned.generate(ids, max_new_tokens=8, do_sample=False))
    assert o.offload_layers_to_cpu(1).layer_indices == (1,)


def test_an_incomplete_adapter_is_refused(models_dir, tmp_path):
    with pytest.raises(ModelDirectoryError, match=r"missing: adapter_config\.json, adapter_model\.safetensors"):
        AutoInference(models_dir / ALIAS, adapter_dir=tmp_path, device="cpu")
