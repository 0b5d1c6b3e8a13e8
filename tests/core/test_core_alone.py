"""What `pip install ollm-core` alone can do: generate with both of its stores, token for token as transformers does.

`.ci/wheels` runs this where nothing but core is installed.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ollm import disk_cache
from ollm.api.placement import Placer
from ollm.models.adapters import find_adapter
from ollm.seam.loading import load_config, load_model, open_checkpoint


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=101, num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "arguments",
    [{"cache_strategy": "chunked", "ram_budget": 0}, {"cache_strategy": "chunked"}, {"cache_strategy": "resident"}],
)
def test_generation_is_that_of_transformers(model, arguments, tmp_path):
    ids = torch.randint(3, 101, (2, 200))
    settings = {"max_new_tokens": 100, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(ids, **settings)
    with disk_cache(model, cache_dir=tmp_path, **arguments) as cache:
        assert torch.equal(model.generate(ids, past_key_values=cache, **settings), stock)
        state = cache.state()
    assert (state.tokens, state.persisted_tokens, state.tail_tokens) == (299, 200, 99)
    assert (state.bytes_read > 0) == (arguments.get("ram_budget") == 0)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_streamed_and_fit_places_them(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    config, cpu = load_config(tmp_path), torch.device("cpu")
    _, adapter = find_adapter(config)
    checkpoint = open_checkpoint(tmp_path, None, config.to_dict())
    ours, streamer = load_model(
        tmp_path, config=config, checkpoint=checkpoint, find_parts=adapter.parts, device=cpu, dtype=None
    )
    ids = torch.randint(3, 101, (2, 20))
    with torch.no_grad():
        placer = Placer(streamer, [], cpu)
        monkeypatch.setattr("ollm.plan.placement.fit_budget", lambda sizes, room, slots: sizes[0])
        assert torch.equal(ours(ids).logits, model(ids).logits)
        assert sorted(placer.record.tiers) == ["device", "disk"]
    streamer.remove()


def test_without_placements_the_error_holds_the_install_command(monkeypatch):
    """Whether ollm-offload is not installed, as in `.ci/wheels`, or switched off."""
    from ollm.registry import registry

    monkeypatch.setenv("OLLM_DISABLE_PLUGINS", "ollm-offload")
    registry.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'ollm-core\[offload\]'"):
        Placer(None, [1], torch.device("cpu")).place("cpu", 1, "prefix")
    registry.cache_clear()
