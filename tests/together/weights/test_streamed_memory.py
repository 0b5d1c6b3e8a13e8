"""Streamed models use the memory that there is: layers that fit stay, and prompts that do not fit go in parts."""

from __future__ import annotations

import pytest
import torch

from ollm.api.facts import facts_of
from ollm.contracts.spill import MemorySnapshot
from ollm.plan.prompts import longest_prompt
from together.comparison import generate, stock_cache, tokens
from together.streamed_models import load, longer, save_checkpoint, stock

IDS = tokens(2, 30)
LAYERS = 8


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("llama"), longer("llama", LAYERS), max_shard_size="150KB")


class SmallMachine:
    """In the ledger's place: so much is free, and all of it may be claimed."""

    def __init__(self, free):
        self.free = free

    def measure(self, device):
        return MemorySnapshot(
            device_type="cpu", host_total=self.free, host_free=self.free, device_total=self.free, device_free=self.free
        )

    def room(self, device):
        return self.free


@pytest.mark.parametrize("layers_that_fit", [0, 1, 3, 4])
def test_fit_uses_what_is_free(llama, monkeypatch, layers_that_fit):
    o = load(llama)
    size = max(o._streamer.layer_bytes)
    budget = (layers_that_fit + 3) * size + size // 2  # and three slots
    monkeypatch.setattr("ollm.api.placement.ledger", SmallMachine(budget * 4 // 3))
    assert torch.equal(o.model(IDS).logits, stock(llama)(IDS).logits)
    assert o.placement.applied_layers == layers_that_fit
    assert o.placement.resident_bytes <= budget - 3 * size
    gaps = {right - left for left, right in zip(o.placement.layer_indices, o.placement.layer_indices[1:], strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_prompt_in_pieces_reads_every_weight_once(llama, tmp_path):
    o = load(llama)
    o.offload_layers_to_cpu(0)
    with o.DiskCache(tmp_path, ram_budget=0, spill_policy="tiny", mode="block", dense_projection_chunk_rows=7) as cache:
        entered = o._streamer.counters.layers_streamed
        ours = o.model(IDS, past_key_values=cache).logits
        assert o._streamer.counters.layers_streamed - entered == LAYERS
    torch.testing.assert_close(ours, stock(llama)(IDS).logits, rtol=1e-4, atol=1e-3)


def test_a_prompt_that_does_not_fit_goes_in_parts(llama, tmp_path, monkeypatch):
    o = load(llama)
    o.offload_layers_to_cpu(0)
    monkeypatch.setattr("ollm.api.inference.longest_prompt", lambda *_: 8)
    with o.DiskCache(tmp_path, ram_budget=0, spill_policy="tiny") as cache:
        before = o._streamer.counters.layers_streamed
        ours = generate(o.model, IDS[:1], cache, new_tokens=1)
        assert o._streamer.counters.layers_streamed - before == 4 * LAYERS  # 30 tokens
    truth = stock(llama)
    assert torch.equal(ours.sequences, generate(truth, IDS[:1], stock_cache(truth), new_tokens=1).sequences)


def test_the_longest_prompt_takes_half_of_what_is_free(llama):
    model = facts_of(stock(llama))

    def taken(tokens, piece):
        return tokens * model.prompt_bytes + min(tokens, piece or tokens) * model.activation_bytes

    for piece in (None, 16, 512):
        for free in (10**7, 10**8, 10**10):
            tokens = longest_prompt(model, piece, free)
            assert taken(tokens, piece) <= free / 2 or tokens == 256
            assert taken(tokens + 1 + tokens // 100, piece) > free / 2
