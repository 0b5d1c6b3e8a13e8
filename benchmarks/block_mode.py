"""Block mode against stock transformers, in one run: `python benchmarks/block_mode.py [CASE …]`.

Prints one line per case; timings are ratios within this run. Cases: attention, prefill, decode, memory. Keys and
values have the geometry of 16 layers, 8 heads of 128, bf16: 64 KiB per token.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ollm import disk_cache
from ollm.seam.attention import block_attention, tile_mask


def seconds(action, times=3):
    """Median of several runs, after one that does not count."""
    action()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def small_llama(layers=16):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=4096, max_position_embeddings=200_000,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def fill(cache, model, tokens, piece=4096):
    """Random keys and values through `cache.update`, a piece of every layer at a time."""
    config = model.config
    for start in range(0, tokens, piece):
        count = min(piece, tokens - start)
        for layer in range(config.num_hidden_layers):
            keys = torch.randn(1, config.num_key_value_heads, count, config.head_dim, dtype=torch.bfloat16)
            cache.update(keys, keys.flip(2), layer)


def decode(model, cache, length):
    """Seconds of one single-token step at the given length."""

    def step():
        mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
        model(torch.tensor([[7]]), attention_mask=mask, past_key_values=cache)

    return seconds(step)


def attention():
    """Causal attention over 16,384 tokens, 16 heads, 8 key heads of 128, bf16."""
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    query = torch.randn(1, 16, 16384, 128, dtype=torch.bfloat16)
    keys, values = (torch.randn(1, 8, 16384, 128, dtype=torch.bfloat16) for _ in range(2))
    stock = seconds(lambda: sdpa_attention_forward(module, query, keys, values, None, scaling=0.1), 2)
    mask = tile_mask(batch_size=1, q_length=16384, kv_length=16384)
    ours = seconds(lambda: block_attention(module, query, keys, values, mask, scaling=0.1), 2)
    half = torch.ones(8192, 16384, dtype=torch.bool).tril(8192)[None, None]
    chunk = query[:, :, 8192:]
    stock_chunk = seconds(lambda: sdpa_attention_forward(module, chunk, keys, values, half, scaling=0.1), 2)
    mask = tile_mask(batch_size=1, q_length=8192, kv_length=16384, q_offset=8192)
    ours_chunk = seconds(lambda: block_attention(module, chunk, keys, values, mask, scaling=0.1), 2)
    print(f"attention, 16,384 in one: {ours:.2f} s, sdpa {stock:.2f} s, ratio {ours / stock:.2f}")
    print(
        f"attention, second half of 16,384: {ours_chunk:.2f} s, sdpa {stock_chunk:.2f} s, "
        f"ratio {ours_chunk / stock_chunk:.2f}"
    )


def prefill(tokens=16384):
    """Whole-model prefill with a disk strategy, against stock with DynamicCache."""
    model = small_llama(layers=4)
    ids = torch.randint(3, 4096, (1, tokens))
    with tempfile.TemporaryDirectory() as folder, disk_cache(model, cache_dir=folder, ram_budget=0) as cache:
        began = time.perf_counter()
        model(ids, past_key_values=cache, logits_to_keep=1)
        ours = time.perf_counter() - began
    began = time.perf_counter()
    model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
    stock = time.perf_counter() - began
    print(f"prefill, {tokens:,} tokens, 4 layers: {ours:.1f} s, DynamicCache {stock:.1f} s, ratio {ours / stock:.2f}")


def decoding(tokens=32768):
    """Single-token steps at 32k tokens: everything resident, and nothing."""
    model = small_llama()
    static = StaticCache(config=model.config, max_cache_len=tokens + 64)
    fill_static(static, model, tokens)
    baseline = decode(model, static, tokens)
    del static
    print(f"decode at {tokens:,}: StaticCache {baseline:.2f} s")
    for budget in ("4GiB", 0):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            with disk_cache(model, cache_dir=folder, ram_budget=budget) as cache:
                fill(cache, model, tokens)
                ours = decode(model, cache, tokens)
            print(
                f"decode at {tokens:,}: ram_budget={budget}: {ours:.2f} s, ratio to StaticCache {ours / baseline:.2f}"
            )


def fill_static(cache, model, tokens):
    for layer in range(model.config.num_hidden_layers):
        keys = torch.randn(1, 8, tokens, 128, dtype=torch.bfloat16)
        cache.update(keys, keys.flip(2), layer)


def memory():
    """Peak memory of decoding above the model with a fixed budget, one process per length."""
    peaks = {}
    for tokens in (8192, 16384, 32768, 65536):
        output = subprocess.run(
            [sys.executable, __file__, "peak", str(tokens)], capture_output=True, text=True, check=True
        ).stdout
        peaks[tokens] = int(output.split()[-1])
        print(f"memory at {tokens:,} tokens: {peaks[tokens] / 2**20:.0f} MiB above the model")
    spread = max(peaks.values()) - min(peaks.values())
    print(f"memory: spread {spread / 2**20:.0f} MiB over 8k to 64k tokens")


def peak(tokens):
    """Fill, then decode; the process's highest resident size from then on, above the model alone."""
    model = small_llama()
    model(torch.tensor([[7, 8]]))
    process = psutil.Process()
    base = process.memory_info().rss
    with tempfile.TemporaryDirectory(dir=".") as folder, disk_cache(model, cache_dir=folder, ram_budget=0) as cache:
        fill(cache, model, tokens, piece=1024)
        Path("/proc/self/clear_refs").write_text("5")
        decode(model, cache, tokens)
    status = Path("/proc/self/status").read_text()
    high = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    print(high - base)


CASES = {"attention": attention, "prefill": prefill, "decode": decoding, "memory": memory}

if __name__ == "__main__":
    with torch.inference_mode():
        if sys.argv[1:2] == ["peak"]:
            peak(int(sys.argv[2]))
        else:
            print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
            for name in sys.argv[1:] or CASES:
                CASES[name]()
