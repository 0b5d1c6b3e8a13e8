"""What all strategies on disk have in common: sizes on disk, files, facts, sessions beside each other, state."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from ollm import disk_cache
from ollm.errors import NonFiniteError
from ollm.registry import Kind, registry
from ollm.testing.case import depth
from together.comparison import assert_close, assert_same, cache_for, generate, stock_cache, tokens

ON_DISK = {
    "chunked": {},
    "paged": {},
    "streamed-segmented": {},
    "log-structured-journal": {},
    "tiered-write-back": {},
    "quantized-cold-tier": {},
    "sliding-window-ring-buffer": {"cache_window_tokens": 40},
}
FULL = [name for name in ON_DISK if name != "sliding-window-ring-buffer"]
LOSSLESS = [name for name in FULL if name != "quantized-cold-tier"]
REPRESENTATIONS = ("int8-symmetric-per-tensor", "int8-per-token", "int4-per-token-group")


def fill(cache, count, *, layers=3, rows=1, heads=2, size=64, piece=512):
    """Give every layer random keys and values, a piece at a time, as a prompt in chunks does."""
    kept = []
    for start in range(0, count, piece):
        for layer in range(layers):
            keys = torch.randn(rows, heads, min(piece, count - start), size)
            kept.append((layer, keys))
            cache.update(keys, keys.flip(2), layer)
    return kept


@pytest.mark.parametrize("strategy", FULL)
def test_little_more_is_on_disk_than_keys_and_values(model, strategy, tmp_path):
    """With tokens of a size as real models have them, in few files."""
    options = {"page_tokens": 256} if strategy == "paged" else {}  # by default as the model's own layers ask for
    with disk_cache(
        model, cache_dir=tmp_path, cache_strategy=strategy, mode="tensor", ram_budget=0, options=options
    ) as cache:
        fill(cache, 6000, heads=8, size=128)
        for _ in range(600):
            for layer in range(3):
                cache.layers[layer].history.append(torch.randn(1, 8, 1, 128), torch.randn(1, 8, 1, 128))
        state = cache.state()
        exact = state.persisted_tokens * 3 * 2 * 8 * 128 * 4
        files = len(list(state.directory.glob("segment-*")))
        written = state.write_amplification
    share = state.disk_bytes / exact
    assert share <= 1.05 / 4 + 0.01 if strategy == "quantized-cold-tier" else 1 <= share <= 1.05
    assert files <= 3, "no file per flush"
    assert written <= 1.05


FORMAT_PARAMETERS = {
    "paged": {"page_tokens"},
    "sliding-window-ring-buffer": {"sink_tokens", "slot_tokens"},
    "quantized-cold-tier": {"representation"},
}
"""Options under another value of which a folder cannot be gone on with."""


@pytest.mark.parametrize("strategy", ON_DISK)
def test_facts_are_true(model, strategy, tmp_path):
    facts = registry().get(Kind.KV_STORE, strategy).strategy.facts
    arguments = ON_DISK[strategy]
    with cache_for(model, tmp_path, cache_strategy=strategy, ram_budget=None, spill_policy=None, **arguments) as cache:
        model(tokens(1, 90), past_key_values=cache)
        state = cache.state()
        assert state.directory.parent.name == facts.directory == "kv_cache_" + strategy.replace("-", "_")
        assert (state.lossless, state.spill_policy) == (facts.lossless, facts.spill_policy)
        assert facts.full_history == (state.window_tokens is None)
        manifest = json.loads((state.directory / "manifest.json").read_text())
        assert manifest["strategy"] == strategy
        assert manifest["parameters"].keys() == FORMAT_PARAMETERS.get(strategy, set())
    assert facts.downsides
    assert list(tmp_path.iterdir()) == []


def test_sessions_on_one_cache_dir_do_not_disturb_each_other(model, tmp_path):
    """Two of every strategy, taking turns, closed in any order."""
    truth, caches = {}, {}
    for name, arguments in ON_DISK.items():
        for number in range(2):
            caches[name, number] = disk_cache(
                model, cache_dir=tmp_path, cache_strategy=name, spill_policy="tiny", **arguments
            )  # fmt: skip
    logits = {key: [] for key in caches}
    for seed in range(4):
        for key, cache in caches.items():
            logits[key].append(model(tokens(1, 9, seed=seed + 10 * key[1]), past_key_values=cache).logits)
        if seed == 2:
            caches.pop(("chunked", 0)).close()
            caches.pop(("paged", 1)).close()
            caches.pop(("tiered-write-back", 0)).close()
    for number in range(2):
        stock = stock_cache(model)
        truth[number] = [model(tokens(1, 9, seed=s + 10 * number), past_key_values=stock).logits for s in range(4)]
    for name in LOSSLESS:
        for number in range(2):
            ours = logits[name, number]
            assert_close(torch.cat(ours, dim=1), torch.cat(truth[number][: len(ours)], dim=1))
    for cache in caches.values():
        cache.close()
    assert list(tmp_path.iterdir()) == []


CHILD = """
import sys, torch
from ollm.api.cache import disk_cache
from together.tiny_models import make_model
from together.comparison import tokens
model = make_model("llama")
with torch.inference_mode(), disk_cache(model, cache_dir=sys.argv[1], cache_strategy=sys.argv[2]) as cache:
    model(tokens(1, 200), past_key_values=cache)
    print("ready", flush=True)
    sys.stdin.readline()
    model(tokens(1, 5), past_key_values=cache)
print("done", flush=True)
"""


@pytest.mark.parametrize("strategy", LOSSLESS[: depth(2)])  # folders and locks are core's: one and the same for all
def test_another_process_in_the_same_cache_dir_is_left_alone(model, strategy, tmp_path):
    command = [sys.executable, "-c", CHILD, tmp_path, strategy]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
    )  # fmt: skip
    try:
        assert child.stdout.readline() == "ready\n"
        ids = tokens(1, 50)
        with cache_for(model, tmp_path, cache_strategy=strategy) as cache:
            assert_same(generate(model, ids, cache), generate(model, ids, stock_cache(model)))
        out, _ = child.communicate("\n", timeout=60)
        assert out == "done\n"
    finally:
        child.kill()
        child.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("mode", ["block", "tensor"])
def test_quantised_logits_are_near_the_exact_ones_in_both_modes(model, representation, mode, tmp_path):
    ids, settings = tokens(1, 80), {"representation": representation}
    exact = model(ids, past_key_values=stock_cache(model)).logits[:, -20:]
    with cache_for(
        model, tmp_path, cache_strategy="quantized-cold-tier", options=settings, mode=mode, ram_budget="9KiB"
    ) as cache:
        model(ids[:, :60], past_key_values=cache)
        ours = torch.cat([model(part, past_key_values=cache).logits for part in ids[:, 60:].split(1, dim=1)], dim=1)
        state = cache.state()
    error = (ours - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < (0.8 if representation.startswith("int4") else 0.08), "this model amplifies what is rounded"
    assert (state.cold_representation, state.lossless) == (representation, False)
    assert 0 < state.resident_bytes <= 9 * 1024


def test_quantised_numbers_are_the_same_however_they_are_asked_for(model, tmp_path):
    """Resident or read, in blocks or as tensors, alone or in a fork: rounded once."""
    ids, logits = tokens(1, 60), []
    for arguments in (
        {"ram_budget": 0}, {"ram_budget": 2**30}, {"ram_budget": "5KiB"}, {"mode": "tensor"},
        {"dense_projection_chunk_rows": 60},
    ):  # fmt: skip
        with cache_for(model, tmp_path, cache_strategy="quantized-cold-tier", **arguments) as cache:
            for part in ids.split(15, dim=1):
                model(part, past_key_values=cache)
            for seed in range(3):
                last = model(tokens(1, 1, seed=seed), past_key_values=cache).logits
            logits.append(last)
    for other in logits[1:]:
        assert_close(other, logits[0])


def test_what_cannot_be_quantised_stops_before_it_is_kept(model, tmp_path):
    with cache_for(model, tmp_path, cache_strategy="quantized-cold-tier") as cache:
        keys = torch.randn(1, 2, 20, 16)
        keys[0, 0, 3, 3] = float("inf")
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            cache.update(keys, keys, 0)
        assert (cache.get_seq_length(), cache.state().disk_bytes) == (0, 0)
