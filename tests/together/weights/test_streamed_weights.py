"""Models whose layers are read from disk give the logits of stock transformers, bit for bit."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from ollm.contracts.offload import Tier
from ollm.io.ledger import ledger
from together.architectures import make as make_architecture
from together.comparison import generate, stock_cache, tokens
from together.streamed_models import load, longer, save_checkpoint, stock
from together.tiny_models import FAMILIES

IDS = tokens(2, 30)
LAYERS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(family)`: a directory with a model of `LAYERS` layers, in many shards."""

    @functools.cache
    def make(family):
        return save_checkpoint(tmp_path_factory.mktemp(family), longer(family, LAYERS), max_shard_size="150KB")

    return make


@pytest.fixture
def llama(checkpoint):
    return checkpoint("llama")


def assert_identical(ours, theirs, ids=IDS):
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ours, theirs = ours.generate(ids, **settings), theirs.generate(ids, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(map(torch.equal, ours.logits, theirs.logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_of_transformers(checkpoint, family):
    o = load(checkpoint(family))
    o.offload_layers_to_cpu(3, policy="interleaved")
    assert o.placement.tiers.count("disk") == LAYERS - 3
    assert_identical(o.model, stock(checkpoint(family)))


@pytest.mark.parametrize("policy", ["prefix", "suffix", "middle-band", "interleaved", "auto", "fit"])
@pytest.mark.parametrize("count", [0, 1, 4, 7, 8])
def test_every_placement_gives_the_logits_of_transformers(llama, policy, count):
    o = load(llama)
    assert o.offload_layers_to_cpu(count, policy=policy).applied_layers == count
    assert torch.equal(o.model(IDS).logits, stock(llama)(IDS).logits)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "opt", "gpt2", "deepseek_v3", "bloom", "phi3"])
def test_other_architectures_and_merged_experts(tmp_path, kind):
    save_checkpoint(tmp_path, make_architecture(kind))
    o = load(tmp_path)
    o.offload_layers_to_cpu(0)
    assert set(o.placement.tiers) == {"disk"}
    ids = IDS % 90 + 3
    assert torch.equal(o.model(ids).logits, stock(tmp_path)(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", ["10GB", "60KB"])
def test_tied_and_untied_in_one_file_or_many(tmp_path, tied, shards):
    save_checkpoint(tmp_path, longer("qwen3", tie_word_embeddings=tied), max_shard_size=shards)
    o = load(tmp_path)
    o.offload_layers_to_cpu(2)
    assert (o.model.lm_head.weight is o.model.model.embed_tokens.weight) == tied
    assert_identical(o.model, stock(tmp_path))


def test_tied_weights_may_be_stored_under_the_other_name(tmp_path):
    from safetensors.torch import load_file, save_file

    save_checkpoint(tmp_path, longer("llama", tie_word_embeddings=True))
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    o = load(tmp_path)
    o.offload_layers_to_cpu(0)
    assert_identical(o.model, stock(tmp_path))


def test_a_checkpoint_of_the_base_model_has_no_prefix(tmp_path):
    model = longer("llama", tie_word_embeddings=True)
    save_checkpoint(tmp_path, model)
    model.model.save_pretrained(tmp_path)
    o = load(tmp_path)
    o.offload_layers_to_cpu(0)
    assert_identical(o.model, stock(tmp_path))


@pytest.mark.parametrize(("stored", "asked"), [("bfloat16", None), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_dtypes_are_those_of_the_checkpoint_or_what_was_asked_for(tmp_path, stored, asked):
    save_checkpoint(tmp_path, longer("llama").to(getattr(torch, stored)))
    dtype = asked and getattr(torch, asked)
    o = load(tmp_path, dtype=dtype)
    o.offload_layers_to_cpu(2)
    assert o.model.dtype == getattr(torch, asked or stored)
    assert_identical(o.model, stock(tmp_path, dtype=dtype or "auto"))


def test_config_and_generation_config_are_those_of_transformers(llama):
    ours, theirs = load(llama).model, stock(llama)
    assert type(ours) is type(theirs)
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not ours.training


def test_without_a_call_everything_that_fits_is_resident(llama):
    o = load(llama)
    assert o.placement is None
    assert_identical(o.model, stock(llama))
    assert (o.placement.target, o.placement.resolved_policy, o.placement.requested_layers) == ("auto", "fit", None)
    assert (o.placement.tiers, o.placement.streamed_bytes) == (("device",) * LAYERS, 0)
    assert o._streamer._memory.slots == []


def test_saving_a_model_that_fits_gives_the_same_checkpoint(llama, tmp_path):
    load(llama).model.save_pretrained(tmp_path)
    ours, theirs = stock(tmp_path).state_dict(), stock(llama).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_that_cannot_be_streamed_is_loaded_whole(tmp_path, monkeypatch, caplog):
    from ollm.seam import skeleton
    from ollm.seam.names import CannotStreamError

    save_checkpoint(tmp_path, longer("llama"))
    monkeypatch.setattr(skeleton, "parameters_of", lambda *_: (_ for _ in ()).throw(CannotStreamError("it is a test")))
    with caplog.at_level("INFO", "ollm"):
        o = load(tmp_path)
    assert "cannot be streamed: it is a test" in caplog.text
    assert_identical(o.model, stock(tmp_path))
    record = o.offload_layers_to_cpu(2)
    assert (record.tiers, record.streamed_bytes) == (("device",) * LAYERS, 0)


def test_each_streamed_byte_is_read_once_per_forward(llama):
    """Blocks of 4 KiB are read, so each run of tensors may cost two blocks more; and two layers are read ahead."""
    o = load(llama)
    record = o.offload_layers_to_cpu(2, policy="interleaved")
    o.model(IDS)
    streamed = [index for index, tier in enumerate(o._streamer.tiers) if tier is Tier.DISK]
    layouts = [o._streamer._bindings[index].layout for index in streamed]
    assert sum(layout.stored_bytes for layout in layouts) == record.streamed_bytes
    per_forward = sum(read.length for layout in layouts for read in layout.reads)
    runs = sum(len(layout.reads) for layout in layouts)
    assert record.streamed_bytes <= per_forward <= record.streamed_bytes + runs * 2 * 4096
    before = o._streamer.counters.read_bytes
    for _ in range(20):
        o.model(IDS[:, :1])
    ahead = 3 * max(sum(read.length for read in layout.reads) for layout in layouts)
    assert abs(o._streamer.counters.read_bytes - before - 20 * per_forward) <= ahead


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_keys_and_values_on_disk_at_once(checkpoint, family, tmp_path):
    o, truth = load(checkpoint(family)), stock(checkpoint(family))
    o.offload_layers_to_cpu(2, policy="interleaved")
    with o.DiskCache(tmp_path, ram_budget=0, spill_policy="tiny", dense_projection_chunk_rows=9) as cache:
        ours = generate(o.model, IDS[:1], cache, new_tokens=12)
    theirs = generate(truth, IDS[:1], stock_cache(truth), new_tokens=12)
    assert torch.equal(ours.sequences, theirs.sequences)


def test_making_a_cache_reads_one_layer_of_each_kind(llama, tmp_path):
    o = load(llama)
    o.offload_layers_to_cpu(0)
    layer = max(sum(read.length for read in binding.layout.reads) for binding in o._streamer._bindings)
    with o.DiskCache(tmp_path):
        assert 0 < o._streamer.counters.read_bytes <= layer


def test_statistics_count_what_is_read(llama):
    o = load(llama, logging=True)
    o.offload_layers_to_cpu(3)
    o.model(IDS)
    assert o.stats.weights is o._streamer.counters
    assert (o.stats.weights.layers_entered, o.stats.weights.layers_streamed) == (8, 5)
    assert o.stats.weights.read_bytes > o.placement.streamed_bytes
    assert "weights read" in o.stats.summary()


def test_two_models_in_one_process(llama, checkpoint):
    one, two = load(llama), load(checkpoint("qwen3"))
    one.offload_layers_to_cpu(1)
    two.offload_layers_to_cpu(0)
    truths = stock(llama), stock(checkpoint("qwen3"))
    for _ in range(3):
        assert torch.equal(one.model(IDS).logits, truths[0](IDS).logits)
        assert torch.equal(two.model(IDS).logits, truths[1](IDS).logits)


def test_two_hundred_tokens_take_no_more_memory_than_two(llama):
    o = load(llama)
    o.offload_layers_to_cpu(1)

    def census():
        gc.collect()
        things = gc.get_objects()
        return sum(issubclass(type(thing), torch.Tensor) for thing in things), len(ledger._claims)

    o.model.generate(IDS, max_new_tokens=4, do_sample=False)
    tensors, claims = census()
    o.model.generate(IDS[:1], max_new_tokens=200, do_sample=False)
    now = census()
    assert now[0] - tensors < 20  # reads that are under way have some, too
    assert now[1] == claims


def test_lora_on_streamed_layers(llama, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(stock(llama), config).eval()
    tuned.save_pretrained(tmp_path)
    o = load(llama, adapter_dir=tmp_path)
    for count in (0, 3, 8, 1):
        o.offload_layers_to_cpu(count)
        assert torch.equal(o.model(IDS).logits, tuned(IDS).logits)
    with o.DiskCache(tmp_path / "kv", ram_budget=0, spill_policy="tiny") as cache:
        ours = o.model.generate(IDS[:1], past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, tuned.generate(IDS[:1], max_new_tokens=8, do_sample=False))


def test_only_the_truth_is_loaded_by_transformers(llama, monkeypatch):
    """So that the other tests compare two things."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    load(llama).model(IDS)
