"""Model directories that are damaged, foreign or made to harm: a short, typed error each, before much is read."""

from __future__ import annotations

import json
import os
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ollm.errors import ConfigurationError, MemoryLimitError, MissingExtraError, ModelDirectoryError
from ollm.io.ledger import ledger
from together.streamed_models import load, save_checkpoint
from together.tiny_models import make_model

MOST_CHARACTERS = 2000
MOST_GROWTH = 700 * 2**20
"""Bytes of memory that a refusal may take in passing."""
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("llama"), make_model("llama"))


@pytest.fixture
def folder(original, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(original, tmp_path / "model")


def change(name, **changes):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        content.update(changes)
        (folder / name).write_text(json.dumps(content))

    return damage


def without(name, *keys):
    def damage(folder):
        content = {key: value for key, value in json.loads((folder / name).read_text()).items() if key not in keys}
        (folder / name).write_text(json.dumps(content))

    return damage


def write(name, text):
    def damage(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return damage


def grow(name, size):
    """Without taking room on the disk."""

    def damage(folder):
        with (folder / name).open("ab") as file:
            file.truncate(size)

    return damage


def config(**changes):
    return change(CONFIG, **changes)


def nested(depth):
    return '{"x":' * depth + "{}" + "}" * depth


def header(text):
    """A file of weights that is nothing but a header."""
    return write(WEIGHTS, len(text).to_bytes(8, "little") + text.encode())


def with_shape(shape):
    def damage(folder):
        raw = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        content = json.loads(raw[8 : 8 + length])
        content["model.norm.weight"]["shape"] = shape
        text = json.dumps(content).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return damage


def index(weight_map):
    def damage(folder):
        (folder / WEIGHTS).rename(folder / "one.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return damage


def tokenizer_part(part, value):
    def damage(folder):
        content = json.loads((folder / TOKENIZER).read_text())
        content[part] = value
        (folder / TOKENIZER).write_text(json.dumps(content))

    return damage


def extra_words(folder):
    content = json.loads((folder / TOKENIZER).read_text())
    content["model"]["vocab"]["surplus"] = 199
    (folder / TOKENIZER).write_text(json.dumps(content))


CONFIGS = {
    "nested": (write(CONFIG, nested(100_000)), "nested deeper|recursion"),
    "nested a little": (write(CONFIG, nested(80)), "nested deeper than 64"),
    "empty": (write(CONFIG, ""), "Cannot read"),
    "not UTF-8": (write(CONFIG, b"\xff\xfe"), "Cannot read"),
    "a list": (write(CONFIG, "[]"), "not a JSON object"),
    "50 GB": (grow(CONFIG, 50 * 2**30), r"config\.json is 53687091200 bytes long"),
    "many values": (write(CONFIG, '{"x":[' + "0," * 3_000_000 + "0]}"), "bytes long"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers=0"),
    "fewer than no layers": (config(num_hidden_layers=-1), "num_hidden_layers=-1|num_hidden_layers"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "a number of 4000 digits": (config(num_hidden_layers=10**4000), "num_hidden_layers=1000"),
    "60,000 layers": (config(num_hidden_layers=60_000), "more than .* parts"),
    "one layer too many": (config(num_hidden_layers=4), r"lacks 9 of the model's weights.*model\.layers\.3"),
    "one layer too few": (config(num_hidden_layers=2), r"2 decoder layers.*model\.layers\.2\."),
    "half a layer": (config(num_hidden_layers=2.5), "config.json|num_hidden_layers"),
    "layers in words": (config(num_hidden_layers="three"), "config.json|num_hidden_layers"),
    "no layers at all": (config(num_hidden_layers=None), "config.json|num_hidden_layers"),
    "true layers": (config(num_hidden_layers=True), "num_hidden_layers"),
    "a billion heads": (config(num_attention_heads=10**9), "num_attention_heads=1000000000"),
    "no heads": (config(num_attention_heads=0), "config.json|weights"),
    "no heads of keys": (config(num_key_value_heads=0), "config.json|weights"),
    "a billion wide": (config(hidden_size=10**9), "in another shape|weights"),
    "no width": (config(hidden_size=0), "in another shape|weights|config.json"),
    "a negative width": (config(hidden_size=-64), "weights|config.json"),
    "a billion words": (config(vocab_size=10**9), "in another shape"),
    "a billion labels": (config(num_labels=10**9), "num_labels=1000000000"),
    "wide layers": (config(intermediate_size=10**12), "in another shape|weights"),
    "wide heads": (config(head_dim=10**9), "head_dim=1000000000"),
    "a list of sizes": (config(intermediate_size=[96] * 3), "config.json|weights"),
    "another model": (config(model_type="gpt2"), "weights|tables"),
    "an unknown model": (config(model_type="mystery"), "ollm runs no code"),
    "a model of a number": (config(model_type=5), "config.json"),
    "a model without text": (config(model_type="vit"), "config.json|no causal model"),
    "no model": (without(CONFIG, "model_type", "architectures"), "config.json"),
    "an unknown activation": (config(hidden_act="mystery"), "KeyError"),
    "an unknown kind of rope": (config(rope_parameters={"rope_type": "mystery", "rope_theta": 1.0}), "weights|config"),
    "rope without a base": (config(rope_parameters={"rope_type": "default", "rope_theta": 0}), None),
    "a dtype that is none": (config(dtype="mystery"), "config.json|weights"),
    "a dtype that is a number": (config(dtype=7), "config.json|weights"),
    "a quantiser that is none": (config(quantization_config={"quant_method": "mystery"}), None),
    "a quantiser of a number": (config(quantization_config=5), "weights|config"),
    "a quantiser that is not installed": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "weights"),
    "an empty quantiser": (config(quantization_config={}), "weights|config"),
    "kinds of layers": (config(layer_types=["mystery"] * 3), "config.json|weights|layers"),
    "other weights": (config(transformers_weights="../x.safetensors"), "not a safetensors file beside it"),
    "weights of a number": (config(transformers_weights=5), "no name of a file"),
    "weights that are not there": (config(transformers_weights="x.safetensors"), r"missing: x\.safetensors"),
    "remote code": (config(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}), None),
}  # fmt: skip

FILES = {
    "no header": (write(WEIGHTS, b""), "it has 0 bytes only"),
    "a header of 90 MB": (header('{"__metadata__":{' + '"":"",' * 14_000_000 + '"x":""}}'), "more than 4000000 values"),
    "80,000 dimensions": (with_shape([9] * 80_000), "too many"),
    "huge dimensions": (with_shape([10**4000]), "of shape"),
    "no dimensions": (with_shape("x" * 10**6), "not whole numbers"),
    "50 GB of nothing": (grow(WEIGHTS, 50 * 2**30), "its tensors end at byte"),
    "an index of a list": (index([]), "no weight_map"),
    "an index of numbers": (index({"a": 5}), "names 5"),
    "an index of elsewhere": (index({"a": "/etc/passwd"}), "not a safetensors file"),
    "an index of many files": (index({str(n): f"{n}.safetensors" for n in range(50_000)}), "missing: .* more"),
    "a nested index": (lambda folder: (index({})(folder), write(INDEX, nested(100_000))(folder)), "nested deeper"),
    "two kinds of weights": (write("shard-00001-model-00001-of-00001.safetensors", b"x"), "distributed checkpoint"),
    "an adapter beside it": (write("adapter_config.json", "{}"), r"missing: adapter_model\.safetensors"),
    "a nested generation config": (write("generation_config.json", nested(100_000)), "weights"),
    "a generation config of a list": (write("generation_config.json", "[]"), None),
    "a generation config of nonsense": (write("generation_config.json", '{"max_length": "x", "num_beams": []}'), None),
    "a generation config of 50 GB": (grow("generation_config.json", 50 * 2**30), "bytes long"),
}  # fmt: skip

TOKENIZERS = {
    "nested": (write(TOKENIZER, nested(100_000)), "tokenizer"),
    "empty": (write(TOKENIZER, ""), "tokenizer"),
    "a list": (write(TOKENIZER, "[]"), "tokenizer"),
    "nothing": (write(TOKENIZER, "{}"), "tokenizer"),
    "50 GB": (grow(TOKENIZER, 50 * 2**30), r"tokenizer\.json is 53687091200 bytes long"),
    "many values": (write(TOKENIZER, "[" + "[]," * 5_000_000 + "[]]"), "more than 4000000 values"),
    "a newer model": (tokenizer_part("model", {"type": "Newer", "vocab": {}}), "tokenizer"),
    "a newer normaliser": (tokenizer_part("normalizer", {"type": "Newer"}), "tokenizer"),
    "a pattern that is none": (
        tokenizer_part(
            "pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
        ),
        "tokenizer",
    ),
    "more words than embeddings": (extra_words, "'surplus' the number 199, and the model has 199 embeddings"),
    "a nested config": (write("tokenizer_config.json", nested(100_000)), "tokenizer"),
    "a config of a list": (write("tokenizer_config.json", "[]"), "tokenizer"),
    "a class that is none": (change("tokenizer_config.json", tokenizer_class="Mystery"), None),
    "a class of a number": (change("tokenizer_config.json", tokenizer_class=5), None),
    "a nested token": (change("tokenizer_config.json", unk_token={"a": {"b": 1}}), None),
    "an added token of nonsense": (change("tokenizer_config.json", added_tokens_decoder={"x": 5}), None),
    "a template of a number": (change("tokenizer_config.json", chat_template=5), None),
    "a template of 50 GB": (grow("chat_template.jinja", 50 * 2**30), r"chat_template\.jinja is 53687091200 bytes"),
    "another template of 50 GB": (
        lambda folder: (write("additional_chat_templates/x.jinja", "x")(folder),
                        grow("additional_chat_templates/x.jinja", 50 * 2**30)(folder)),
        r"x\.jinja is 53687091200 bytes",
    ),
    "a template that is none": (write("chat_template.jinja", b"\xff\xfe{% for"), "tokenizer"),
}  # fmt: skip

ALL = {
    f"{kind}: {name}": case
    for kind, table in (("config", CONFIGS), ("file", FILES), ("tokenizer", TOKENIZERS))
    for name, case in table.items()
}


@pytest.mark.filterwarnings("ignore")  # of what transformers thinks of such files
@pytest.mark.parametrize(("damage", "message"), ALL.values(), ids=ALL)
def test_a_hostile_folder_is_refused_with_a_short_error(folder, damage, message):
    """`None`: transformers makes something of it, and so may ollm. Nothing else than a model or a typed error comes."""
    damage(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load(folder)
    except (ModelDirectoryError, ConfigurationError, MemoryLimitError, MissingExtraError) as error:
        assert len(str(error)) <= MOST_CHARACTERS
        assert message is None or pytest.raises(type(error), match=message).matches(error), str(error)
    else:
        assert message is None
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_GROWTH
    assert not ledger._claims or all(claim.nbytes < 2**30 for claim in ledger._claims)


def test_what_a_refusal_says_is_cut_in_its_middle():
    said = str(ModelDirectoryError("begins " + "x" * 10**6 + " and what to do next"))
    assert len(said) <= MOST_CHARACTERS
    assert said.startswith("begins x")
    assert said.endswith("x and what to do next")


def test_pipes_and_devices_are_not_read(folder):
    for name in ("generation_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    load(folder)


def test_an_added_token_without_an_embedding_is_no_reason_to_refuse(folder, caplog):
    """As the image token of text models of the Gemma family has none: no text holds it by accident."""
    content = json.loads((folder / TOKENIZER).read_text())
    content["added_tokens"].append(
        {"id": 199, "content": "<image>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    )  # fmt: skip
    (folder / TOKENIZER).write_text(json.dumps(content))
    load(folder)
    assert "tokens without an embedding, which no text may hold: ['<image>']" in caplog.text


def test_a_config_that_is_right_and_large_is_not_refused(folder):
    """Positions, bases and what nobody knows are no counts."""
    config(max_position_embeddings=10**9, rope_theta=10**12, num_of_nothing=10**15, bos_token_id=5)(folder)
    load(folder)


def test_a_damaged_tensor_that_nobody_needs_is_no_reason_to_refuse(folder, original):
    weights = load_file(folder / WEIGHTS)
    weights["nobody.needs.this"] = torch.zeros(6)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8 : 8 + length])
    content["nobody.needs.this"]["dtype"] = "F4"
    text = json.dumps(content).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    ids = torch.arange(3, 20)[None]
    assert torch.equal(load(folder).model(ids).logits, load(original).model(ids).logits)
