"""Running one schedule with stock transformers' cache and with ours, and comparing logits and tokens."""

from __future__ import annotations

import contextlib

import torch
from transformers import DynamicCache

from ollm import disk_cache

STRATEGIES = {
    "chunked, nothing resident": {"cache_strategy": "chunked", "ram_budget": 0},
    "chunked, some resident": {"cache_strategy": "chunked", "ram_budget": "12KiB"},
    "chunked, prompts in pieces": {"cache_strategy": "chunked", "ram_budget": 0, "dense_projection_chunk_rows": 5},
    "resident": {"cache_strategy": "resident"},
    "paged": {"cache_strategy": "paged", "ram_budget": 0, "options": {"page_tokens": 4}},
    "segmented": {"cache_strategy": "streamed-segmented", "ram_budget": 0, "options": {"segment_bytes": "40KiB"}},
    "journal": {
        "cache_strategy": "log-structured-journal",
        "ram_budget": "12KiB",
        "options": {"compaction_entries": 3},
    },
    "tiered": {"cache_strategy": "tiered-write-back", "ram_budget": 0, "dense_projection_chunk_rows": 7},
    "chunked, tensor mode": {"cache_strategy": "chunked", "ram_budget": 0, "mode": "tensor"},
}


@contextlib.contextmanager
def cache_for(model, tmp_path, strategy="chunked, nothing resident", **more):
    """Our cache for a model, flushing all the time."""
    arguments = {"cache_dir": tmp_path, "spill_policy": "tiny", **STRATEGIES[strategy], **more}
    with disk_cache(model, **arguments) as cache:
        yield cache


def stock_cache(model):
    return DynamicCache(config=model.config)


def tokens(*shape, seed=0):
    """Token ids that are none of the special ones."""
    return torch.randint(3, 199, shape, generator=torch.Generator().manual_seed(seed))


def generate(model, ids, cache, new_tokens=24, **settings):
    """Greedy generation unless the settings say otherwise, with the logits of every step."""
    return model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **settings},
    )


def assert_same(ours, stock):
    """Same tokens, and logits within fp32 rounding (1e-4 of their largest)."""
    assert torch.equal(ours.sequences, stock.sequences)
    assert_close(torch.stack(ours.logits), torch.stack(stock.logits))


def assert_close(ours, stock):
    scale = stock[stock.isfinite()].abs().max().item()
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4 * scale)
