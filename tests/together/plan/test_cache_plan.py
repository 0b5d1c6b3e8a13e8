"""Plans: pure, printable before a model is loaded, and true of the cache that is then opened."""

from __future__ import annotations

import os
import subprocess
import sys

import attrs
import pytest
import torch
from transformers import LlamaConfig

from ollm.api.cache import plan_for
from ollm.api.facts import facts_of, facts_of_config
from ollm.api.opening import open_cache
from ollm.contracts.spill import KVGeometry, LayerGeometry, MemorySnapshot
from ollm.errors import ConfigurationError
from ollm.plan import BlockVerdict, CacheRequest, ModelFacts, plan_cache
from ollm.plan.cache import piece_tokens
from ollm.registry import Kind, registry
from ollm.seam.geometry import decoder_config
from ollm.testing.processes import in_child
from ollm.testing.purity import no_side_effects
from together.tiny_models import make_model

GIB = 2**30
FREE = MemorySnapshot(
    device_type="cpu", host_total=16 * GIB, host_free=8 * GIB, device_total=16 * GIB, device_free=8 * GIB
)
GPU = attrs.evolve(FREE, device_type="cuda", device_total=4 * GIB, device_free=2 * GIB)
LAYERS = tuple(LayerGeometry(layer=index, kv_heads=2, key_size=8, value_size=8, itemsize=4) for index in range(3))
LLAMA = ModelFacts(
    name="LlamaForCausalLM",
    dtype="float32",
    device="cpu",
    geometry=KVGeometry(LAYERS),
    activation_bytes=1000,
    prompt_bytes=100,
)
YES = BlockVerdict(blocks=True, pieces=True, reason="same logits")
NO = BlockVerdict(blocks=False, pieces=False, reason="its logits differ")


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def plan(free=FREE, model=LLAMA, **arguments):
    return plan_cache(CacheRequest.from_arguments(**{"cache_dir": "/kv", **arguments}), model, free)


def every_strategy():
    for offer in registry().offers(Kind.KV_STORE):
        facts = offer.strategy.facts
        yield registry().name_of(offer), {} if facts.full_history else {"cache_window_tokens": 100}


def test_a_plan_is_pure():
    for name, more in every_strategy():
        first = plan(cache_strategy=name, **more)  # modules of policies are imported once
        with no_side_effects():
            second = plan(cache_strategy=name, **more)
            text = str(second)
        assert second == first
        assert text == str(first)


def test_planning_imports_no_torch():
    script = """
import sys
from ollm.contracts.spill import KVGeometry, MemorySnapshot
from ollm.plan import CacheRequest, ModelFacts, plan_cache
free = MemorySnapshot(device_type="cpu", host_total=1, host_free=1, device_total=1, device_free=1)
model = ModelFacts(name="M", dtype="float32", device="cpu", geometry=KVGeometry(()), activation_bytes=1, prompt_bytes=1)
print(plan_cache(CacheRequest(cache_dir="kv"), model, free))
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_a_plan_is_printed_before_a_model_is_loaded(model):
    config = LlamaConfig(**model.config.to_dict())
    facts = facts_of_config(config, "LlamaForCausalLM", torch.float32, torch.device("cpu"))
    assert facts == facts_of(model)
    text = str(plan(model=facts, ram_budget="1GiB", cache_strategy="paged"))
    lines = dict(line.split("  ", 1) for line in text.replace("\n  ", "\n").splitlines())
    lines = {name.strip(): value.strip() for name, value in lines.items()}
    assert lines["strategy"].startswith("paged, lossless: ")
    assert lines["folder"] == "one of its own in /kv/kv_cache_paged"
    assert lines["mode"] == "not decided yet: a trial decides, when the model is there"
    assert lines["model"] == "LlamaForCausalLM, 3 layers to store, float32 on cpu"
    assert lines["a token"] == f"{3 * 2 * (16 + 16) * 4} B on disk"
    assert lines["spill policy"].startswith("auto: a layer's tail is flushed at 128 tokens or 8.0 MiB")
    assert lines["resident host"] == "1.0 GiB"


def test_what_it_says_of_memory_and_disk_is_true_of_the_cache(model, tmp_path, claims):
    made = plan_for(model, CacheRequest.from_arguments(cache_dir=tmp_path, ram_budget=0, spill_policy="write-through"))
    tokens = 320
    with open_cache(made, model) as cache, torch.inference_mode():
        claimed = {claim.purpose: claim.nbytes for claim in claims()}
        assert claimed["tails"] == made.memory.tails
        assert claimed["activations"] == made.memory.activations
        assert claimed["Read buffers"] == made.memory.read_buffers
        assert claimed["Write buffers"] == made.memory.write_buffers
        state = cache.state()
        assert state.directory.parent == made.directory
        assert cache.piece_tokens == made.piece_tokens
        model(torch.arange(tokens)[None] % 100, past_key_values=cache)
        cache._session.store.storage.flush()
        stored = [history.table.tokens for history in cache._stored.values()]
        state = cache.state()
        expected = stored[0] * made.disk_bytes_per_token
        records = len(stored) * stored[0] / made.spill.flush_tokens
        assert expected <= state.disk_bytes <= expected + records * 2 * 4096
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strategy", ["chunked", "paged", "quantized-cold-tier", "log-structured-journal"])
def test_buffers_take_no_more_than_it_says(model, strategy, tmp_path, claims):
    """After all of them were needed: for writing, for reading, for parts of what was cropped, for decoding."""
    request = CacheRequest.from_arguments(
        cache_dir=tmp_path, cache_strategy=strategy, ram_budget=0, spill_policy="write-through"
    )
    made = plan_for(model, request)
    with open_cache(made, model) as cache, torch.inference_mode():
        model(torch.arange(300)[None] % 100, past_key_values=cache)
        cache.crop(-293)
        model(torch.arange(50)[None], past_key_values=cache)
        claimed = {}
        for claim in claims():
            claimed[claim.purpose] = claimed.get(claim.purpose, 0) + claim.nbytes
        buffers = cache.state().buffer_bytes
    memory = made.memory
    assert claimed.pop("tails") == memory.tails
    assert claimed.pop("activations") == memory.activations
    assert claimed.pop("Read buffers") == memory.read_buffers
    assert claimed.pop("Write buffers") == memory.write_buffers
    assert claimed.pop("Buffers for parts of extents", 0) <= memory.part_buffers
    assert claimed.pop("a decoded block", 0) <= memory.decoding
    assert not claimed
    assert buffers <= memory.read_buffers + memory.write_buffers + memory.part_buffers + memory.decoding


def test_in_tensor_mode_it_says_what_a_layer_takes_of_a_context(model, tmp_path, claims):
    made = plan_for(model, CacheRequest.from_arguments(cache_dir=tmp_path, mode="tensor"))
    assert (made.memory.activations, made.prompt_bytes_per_token) == (0, made.model.activation_bytes)
    text = str(made)
    assert "whole in each layer, about " in text
    assert "tokens at once" not in text
    with open_cache(made, model) as cache, torch.inference_mode():
        assert "activations" not in [claim.purpose for claim in claims()]
        keys, values = torch.randn(2, 1, 2, 100, 16)
        cache.update(keys[:, :, :60], values[:, :, :60], 0)
        given = cache.update(keys[:, :, 60:], values[:, :, 60:], 0)
        cache.reset()
    assert sum(tensor.nbytes for tensor in given) == 100 * made.bytes_per_token
    assert f" and {made.bytes_per_token} B for each token, for one sequence" in text


def test_without_a_disk_it_says_what_all_layers_take_of_a_context(model):
    made = plan_for(model, CacheRequest.from_arguments(cache_strategy="resident"))
    with open_cache(made, model) as cache, torch.inference_mode():
        model(torch.arange(300)[None] % 100, past_key_values=cache)
        state = cache.state()
    assert state.resident_bytes + state.tail_bytes == 300 * made.bytes_per_token


@pytest.mark.parametrize(
    ("mode", "verdict", "text", "activations", "grows"),
    [
        ("auto", None, "7 tokens at once in each layer, in block mode", 7000, False),
        ("auto", YES, "7 tokens at once in each layer", 7000, False),
        (
            "auto",
            attrs.evolve(YES, pieces=False),
            "whole in each layer, about 1000 B for each of their tokens",
            0,
            False,
        ),
        ("auto", NO, "whole in each layer, about 1000 B for each of their tokens", 0, True),
        ("tensor", YES, "whole in each layer, about 1000 B for each of their tokens", 0, True),
    ],
)
def test_it_says_of_prompts_what_the_mode_does(mode, verdict, text, activations, grows):
    made = plan(model=attrs.evolve(LLAMA, verdict=verdict), mode=mode, dense_projection_chunk_rows=7)
    assert [line.partition("  ")[2].strip() for line in str(made).splitlines() if line.startswith("prompts")] == [text]
    assert made.memory.activations == activations
    assert made.bytes_per_token == (128 if grows else 0)


@pytest.mark.parametrize(
    ("arguments", "host", "device", "reads"),
    [
        ({"ram_budget": GIB}, 0, GIB, True),
        ({"ram_budget": 3 * GIB}, 2 * GIB, GIB, True),
        ({"ram_budget": GIB, "cache_strategy": "quantized-cold-tier"}, 0, 0, True),
        ({"cache_strategy": "resident"}, 0, 0, False),
    ],
)
def test_memory_on_an_accelerator(arguments, host, device, reads):
    memory = plan(GPU, attrs.evolve(LLAMA, device="cuda:0"), **arguments).memory
    assert memory.staging == 3 * (8 * 2**20 + 2**16)
    assert plan(**arguments).memory.staging == 0
    assert (memory.resident_host, memory.resident_device) == (host, device)
    assert (memory.read_buffers > 0, memory.write_buffers > 0) == (reads, reads)
    assert memory.total == sum(attrs.astuple(memory))


def test_a_token_takes_no_disk_where_there_is_none():
    made = plan(cache_strategy="resident")
    assert (made.directory, made.disk_bytes_per_token) == (None, 0)
    assert "none, everything is in memory" in str(made)


@pytest.mark.parametrize(
    ("mode", "verdict", "expected"),
    [
        ("auto", None, (None, "a trial decides, when the model is there", False)),
        ("block", None, (None, "a trial decides, when the model is there", False)),
        ("tensor", None, ("tensor", "asked for", False)),
        ("tensor", YES, ("tensor", "asked for", False)),
        ("auto", YES, ("block", "same logits", True)),
        ("block", attrs.evolve(YES, pieces=False), ("block", "same logits", False)),
        ("auto", NO, ("tensor", "blocks do not work with this model: its logits differ", False)),
    ],
)
def test_the_mode_is_decided_by_request_and_trial(mode, verdict, expected):
    made = plan(model=attrs.evolve(LLAMA, verdict=verdict), mode=mode)
    assert (made.mode, made.mode_reason, made.pieces) == expected
    if verdict is not None and mode != "tensor":
        assert attrs.evolve(plan(mode=mode).decided(verdict), model=made.model) == made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "block"}, "mode='block': LlamaForCausalLM cannot attend block by block: its logits differ"),
        (
            {"cache_strategy": "sliding-window-ring-buffer", "cache_window_tokens": 9},
            "keeps a window, which needs mode='block'; blocks do not work with this model: its logits differ",
        ),
    ],
)
def test_a_verdict_may_refuse_what_was_asked(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        plan(model=attrs.evolve(LLAMA, verdict=NO), **arguments)


def test_a_window_is_planned_with_a_warning_and_not_in_tensor_mode():
    arguments = {"cache_strategy": "sliding-window-ring-buffer", "cache_window_tokens": 9}
    made = plan(**arguments)
    (warning,) = made.warnings
    assert "keeps the newest 9 tokens only: the model forgets" in warning
    assert warning in str(made)
    with pytest.raises(ConfigurationError, match="which needs mode='block'; mode='tensor' was asked for"):
        plan(mode="tensor", **arguments)


def test_nothing_is_made_by_a_plan(tmp_path, model, claims):
    made = plan_for(model, CacheRequest.from_arguments(cache_dir=tmp_path / "kv"))
    assert made.directory == tmp_path / "kv" / "kv_cache_chunked"
    assert list(tmp_path.iterdir()) == []
    assert claims() == []
    assert made.geometry == facts_of(model).geometry
    assert len(made.geometry.layers) == decoder_config(model).num_hidden_layers


@pytest.mark.parametrize(
    ("per_token", "free", "tokens"),
    [(1000, 8 * GIB, 4096), (10**6, 8 * GIB, 512), (10**9, 8 * GIB, 256), (1000, 0, 256)],
)
def test_pieces_are_as_long_as_memory_allows(per_token, free, tokens):
    assert piece_tokens(per_token, free) == tokens


def test_how_long_pieces_are_can_be_asked_for():
    assert plan(dense_projection_chunk_rows=7).piece_tokens == 7


def test_a_relative_cache_dir_needs_a_working_directory(tmp_path):
    def child():
        (tmp_path / "here").mkdir()
        os.chdir(tmp_path / "here")
        (tmp_path / "here").rmdir()
        with pytest.raises(ConfigurationError, match=r"cache_dir='kv': there is no working directory"):
            plan(cache_dir="kv")
        assert plan(cache_dir="/kv").directory.is_absolute()

    in_child(child)


@pytest.mark.parametrize(("free", "total"), [(FREE, 16 * GIB), (GPU, 20 * GIB)])
def test_a_budget_beyond_all_memory_is_taken_for_all_of_it_and_said_to_be(free, total):
    for budget in ("100TB", total + 1):
        made = plan(free, ram_budget=budget)
        assert made.spill == plan(free, ram_budget=total).spill
        assert made.memory.resident_host + made.memory.resident_device <= total
        (warning,) = made.warnings
        assert "is more memory than there is" in warning
        assert warning in str(made)
    assert plan(free, ram_budget=total).warnings == ()
