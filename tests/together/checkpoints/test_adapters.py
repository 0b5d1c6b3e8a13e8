"""PEFT adapters: a kind that changes what layers compute gives what peft gives; what does not fit is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ollm.errors import ModelDirectoryError
from ollm.seam.adapters import _is_quick
from ollm.testing.case import depth
from together.streamed_models import load, save_checkpoint, stock
from together.tiny_models import make_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
IDS = torch.arange(3, 23).reshape(2, 10)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = ["q_proj", "v_proj"]
LAYER = "base_model.model.model.layers.1.self_attn.q_proj"


def lora(**settings):
    return peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": ATTENTION, **settings})


def of(kind, **settings):
    return getattr(peft, kind)(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **settings})


KINDS = {
    "LoRA": (lora, "streamed"),
    "rsLoRA of all layers": (lambda: lora(use_rslora=True, target_modules="all-linear"), "streamed"),
    "patterns": (
        lambda: lora(
            target_modules=r".*\.(q_proj|up_proj)$", rank_pattern={r"model.layers.1.*up_proj": 3},
            exclude_modules=r".*layers\.0.*",
        ),
        "streamed",
    ),
    "some layers": (lambda: lora(layers_to_transform=[1]), "streamed"),
    "DoRA": (lambda: lora(use_dora=True), "whole"),
    "PiSSA": (lambda: lora(init_lora_weights="pissa"), "whole"),
    "OLoRA": (lambda: lora(init_lora_weights="olora"), "whole"),
    "bias of all": (lambda: lora(bias="all"), "whole"),
    "bias of LoRA": (lambda: lora(bias="lora_only"), "whole"),
    "embeddings": (lambda: lora(target_modules=["q_proj", "embed_tokens", "lm_head"]), "streamed"),
    "tokens": (lambda: lora(trainable_token_indices=[3, 4]), "streamed"),
    "saved head": (lambda: lora(modules_to_save=["lm_head", "embed_tokens"]), "streamed"),
    "saved norms": (lambda: lora(modules_to_save=["input_layernorm"]), "whole"),
    "IA3": (lambda: of("IA3Config", feedforward_modules=[]), "whole"),
    "VeRA": (lambda: of("VeraConfig", r=4), "whole"),
    "OFT": (lambda: of("OFTConfig", oft_block_size=8), "whole"),
    "LoHa": (lambda: of("LoHaConfig", r=4), "whole"),
    "BOFT": (lambda: of("BOFTConfig", boft_block_size=4), "whole"),
    "layer norms": (lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"), "whole"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A model with biases."""
    config = make_model("llama").config
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return save_checkpoint(tmp_path_factory.mktemp("model"), model)


@torch.inference_mode(False)
def train(model, config, folder):
    """An adapter as a trainer leaves it, with weights that count."""
    tuned = peft.get_peft_model(model, config)
    torch.manual_seed(9)
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    tuned.save_pretrained(folder)
    return folder


@torch.inference_mode(False)
def by_peft(model, folder, rows=None):
    if rows:
        model.resize_token_embeddings(rows)
    return peft.PeftModel.from_pretrained(model, str(folder)).eval()


@pytest.mark.parametrize(("config", "way"), KINDS.values(), ids=KINDS)
def test_an_adapter_gives_what_peft_gives(model_dir, config, way, tmp_path):
    train(stock(model_dir), config(), tmp_path / "adapter")
    o = load(model_dir, adapter_dir=tmp_path / "adapter")
    assert torch.equal(o.model(IDS).logits, by_peft(stock(model_dir), tmp_path / "adapter")(IDS).logits)
    assert not torch.equal(o.model(IDS).logits, stock(model_dir)(IDS).logits)
    assert ("streamed" if o._streamer else "whole") == way


@pytest.mark.parametrize("saved", [None, ["lm_head", "embed_tokens"]])
def test_a_grown_vocabulary_comes_with_its_tokenizer_and_its_template(model_dir, saved, tmp_path):
    model = stock(model_dir)
    model.resize_token_embeddings(201)
    # peft looks at the config of the model that it names
    train(model, lora(modules_to_save=saved), tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens(["new", "newer"])
    tokenizer.chat_template = "{{ messages[0]['content'] }} new"
    tokenizer.save_pretrained(tmp_path / "adapter")
    o = load(model_dir, adapter_dir=tmp_path / "adapter")
    ids = o.tokenizer("w5 new w6 newer", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[5, 199, 6, 200]]
    assert o.tokenizer.apply_chat_template([{"role": "user", "content": "w7"}], tokenize=False) == "w7 new"
    assert torch.equal(o.model(ids).logits, by_peft(stock(model_dir), tmp_path / "adapter", rows=201)(ids).logits)


def test_an_adapter_beside_the_weights_is_applied_as_transformers_does(model_dir, tmp_path):
    both = shutil.copytree(model_dir, tmp_path / "both")
    adapter = train(stock(model_dir), lora(), tmp_path / "adapter")
    for name in (CONFIG, WEIGHTS):
        shutil.copy(adapter / name, both / name)
    assert torch.equal(load(both).model(IDS).logits, stock(both)(IDS).logits)
    with pytest.raises(ModelDirectoryError, match=r"both holds an adapter beside the model, and adapter_dir=.*another"):
        load(both, adapter_dir=adapter)


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    train(stock(model_dir), lora(), folder / "LoRA")
    train(stock(model_dir), lora(use_dora=True), folder / "DoRA")
    return folder


def weights(change, kind="LoRA"):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return kind, damage


def config(kind="LoRA", **changes):
    def damage(folder):
        content = json.loads((folder / CONFIG).read_text())
        content.update(changes)
        (folder / CONFIG).write_text(json.dumps(content))

    return kind, damage


def text(content):
    return "LoRA", lambda folder: (folder / CONFIG).write_text(content)


def rename(tensors):
    for name in list(tensors):
        tensors[name.replace("self_attn", "attn")] = tensors.pop(name)


def drop(part):
    def change(tensors):
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def add(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


SLOW = (
    r"(.*a)*(.*b)*$",
    "(a|aa)+$",
    ".*.*.*.*.*x",
    "a?" * 30,
    r"(.*)\1x",
    "(.|.|.)" * 8,
    "(.*|a)x",
    "x" * 2000,
    "(?=a)b",
)
UNFIT = {
    "no tensors": (weights(lambda tensors: tensors.clear()), "lora_A.* is in its config, and not in its file"),
    "renamed": (weights(rename), "not in its file"),
    "no lora_A": (weights(drop("1.self_attn.q_proj.lora_A")), r"1\.self_attn\.q_proj\.lora_A.*not in its file"),
    "no lora_B": (weights(drop("1.self_attn.q_proj.lora_B")), r"1\.self_attn\.q_proj\.lora_B.*not in its file"),
    "another shape": (weights(add(f"{LAYER}.lora_A.weight", 4, 63)), "size mismatch"),
    "another layer": (weights(add(LAYER.replace("1", "7") + ".lora_A.weight", 4, 64)), r"layers\.7.*has no place"),
    "a head": (weights(add("base_model.model.lm_head.weight", 199, 64)), r"lm_head\.weight' would overwrite"),
    "a norm": (weights(add("base_model.model.model.norm.weight", 64)), r"norm\.weight' would overwrite"),
    "a bias": (weights(add(f"{LAYER}.base_layer.bias", 64)), r"base_layer\.bias' would overwrite"),
    "a weight": (weights(add(f"{LAYER}.base_layer.weight", 64, 64)), r"base_layer\.weight' would overwrite"),
    "DoRA without magnitudes": (weights(drop("magnitude"), "DoRA"), "lora_magnitude_vector.*not in its file"),
    "magnitudes without DoRA": (config("DoRA", use_dora=False), "lora_magnitude_vector.weight' is in its file"),
    "DoRA of LoRA": (config(use_dora=True), "lora_magnitude_vector.*not in its file"),
    "fewer targets": (config(target_modules=["q_proj"]), "v_proj.*is in its file, and has no place"),
    "more targets": (config(target_modules=[*ATTENTION, "k_proj"]), "k_proj.*not in its file"),
    "targets that are not there": (config(target_modules=["mystery"]), "not found in the base model"),
    "another kind": (config(peft_type="IA3", feedforward_modules=[], target_modules=["q_proj"]), "ia3_l"),
    "another rank": (config(r=8), "size mismatch"),
    "no rank": (config(r=0), "positive"),
    "a billion ranks": (config(r=10**9), "r=1000000000, and its largest tensor has 64"),
    "a billion ranks of some": (config(rank_pattern={"q_proj": 10**9}), "its largest tensor has 64"),
    "a rank in words": (config(r="four"), "TypeError"),
    "bias that is not there": (config(bias="all"), "bias.*not in its file"),
    "a head that is not there": (config(modules_to_save=["lm_head"]), "lm_head"),
    "tokens that are not there": (config(trainable_token_indices=[3]), "trainable_tokens_delta"),
    "another task": (config(task_type="SEQ_CLS"), "for the task 'SEQ_CLS'"),
    "prefix tuning": (config(peft_type="PREFIX_TUNING", num_virtual_tokens=4), "adds to the prompt"),
    "prompt tuning": (config(peft_type="PROMPT_TUNING", num_virtual_tokens=4), "adds to the prompt"),
    "adapters of adapters": (config(peft_type="XLORA", adapters={"a": "/"}), "chooses among adapters"),
    "a newer kind": (config(peft_type="NEWER"), "'NEWER', which the installed peft does not have"),
    "a kind of a list": (config(peft_type=["LORA"]), "which the installed peft does not have"),
    "other layers": (config(layer_replication=[[0, 3], [0, 3]]), "sets layer_replication"),
    "a module by name": (config(megatron_config={"a": 1}, megatron_core="antigravity"), "sets megatron_config"),
    "a quantiser": (config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "."),
    "an init that is none": (config(init_lora_weights={"a": 1}), "."),
    "many targets": (config(target_modules=[f"x{n}" for n in range(100_000)]), "holds 100000 names"),
    "nested": (text('{"peft_type":"LORA","x":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested deeper"),
    "a list": (text("[]"), "not a JSON object"),
    "nothing": (text(""), "Expecting value"),
    "no numbers": (config(lora_alpha=float("nan")), "NaN is no JSON"),
    "no pattern": (config(target_modules="("), "unterminated"),
    **{f"slow: {pattern[:20]}": (config(target_modules=pattern), "ollm takes names of modules") for pattern in SLOW},
    "slow to exclude": (config(exclude_modules=SLOW[0]), "exclude_modules.*ollm takes names"),
    "slow ranks": (config(rank_pattern={SLOW[0]: 4}), "rank_pattern.*ollm takes names"),
    "slow layers": (config(layers_to_transform=[1], layers_pattern=[SLOW[0]]), "layers_pattern.*ollm takes names"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "message"), UNFIT.values(), ids=UNFIT)
def test_an_adapter_that_does_not_fit_is_refused(model_dir, adapters, case, message, tmp_path, monkeypatch):
    kind, damage = case
    adapter = shutil.copytree(adapters / kind, tmp_path / "adapter")
    damage(adapter)
    monkeypatch.setattr("ollm.api.inference.load_model", lambda *_, **__: pytest.fail("something was loaded before"))
    with pytest.raises(ModelDirectoryError, match=message) as caught:
        load(model_dir, adapter_dir=adapter)
    assert len(str(caught.value)) <= 2000


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r".*\.(q_proj|v_proj)$",
        r"model\.layers\.[0-9]+\.self_attn\.(?:q|k|v)_proj",
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:attn)\.(?:(?:k|v)))",
    ],
)
def test_patterns_in_use_are_taken(pattern):
    assert _is_quick(pattern)


def test_an_adapter_is_the_same_at_every_load(model_dir, tmp_path):
    """Also where peft draws numbers for it."""
    train(stock(model_dir), lora(init_lora_weights="pissa_niter_2"), tmp_path)
    first = load(model_dir, adapter_dir=tmp_path).model(IDS).logits
    for _ in range(depth(2)):
        assert torch.equal(load(model_dir, adapter_dir=tmp_path).model(IDS).logits, first)
