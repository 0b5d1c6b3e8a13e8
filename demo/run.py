"""`make demo`: a document of over 8,000 tokens, its keys and values on disk, compared with stock transformers.

Makes a small model first (see `make_model.py`). Ends with exit code 1 if a single token differs.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from ollm import file_get_contents
from ollm.stats import Stats

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
ALIAS = "llama3-1B-chat"
NEW_TOKENS = 64
LEAST_TOKENS = 8_000
LEAST_CHARACTERS = 30_000


def pages() -> list[str]:
    """The repository's own documentation, page by page."""
    files = sorted((HERE.parent / "docs").rglob("*.md"))
    return [file_get_contents(file) for file in files if "_build" not in file.parts]


def document(pages: list[str]) -> str:
    """Whole pages, as many as make a text of about 10,000 tokens."""
    text = ""
    for page in pages:
        text += page + "\n\n"
        if len(text) >= LEAST_CHARACTERS:
            break
    return text


def seconds(stats: Stats) -> tuple[float, float]:
    """Prefill seconds and decode seconds per token, summed over all generations so far."""
    return stats.prefill_seconds, stats.decode_seconds / (NEW_TOKENS - 1)


def main() -> int:
    """Run the demo; the exit code."""
    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers import DynamicCache
    from transformers.utils.logging import disable_progress_bar

    from make_model import make_model
    from ollm import Inference, TextStreamer
    from ollm.units import format_size

    disable_progress_bar()
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[bold]1. A small Llama with random weights[/] in {(WORK / 'models' / ALIAS).relative_to(HERE.parent)}"
    )
    make_model(WORK / "models" / ALIAS, pages())

    console.print("[bold]2. The guide's first example[/] on the repository's own documentation")
    o = Inference(ALIAS, device="cpu", logging=True)
    o.ini_model(models_dir=WORK / "models", force_download=False)
    o.offload_layers_to_cpu(layers_num=2, policy="middle-band")
    past_key_values = o.DiskCache(cache_dir=WORK / "kv_cache", cache_strategy="chunked", ram_budget="16MiB")
    text_streamer = TextStreamer(o.tokenizer, skip_prompt=True, skip_special_tokens=False)

    messages = [{"role": "user", "content": document(pages()) + "\n\nWhat is this document about?"}]
    inputs = o.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt_tokens = inputs["input_ids"].shape[1]
    assert prompt_tokens >= LEAST_TOKENS, f"the document has {prompt_tokens} tokens only"
    console.print(f"   {prompt_tokens:,} tokens; the model's answer (it was never trained, so it makes no sense):\n")
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.inference_mode():
        output = o.model.generate(**inputs, past_key_values=past_key_values, streamer=text_streamer, **settings)
        state, ours = past_key_values.state(), seconds(o.stats)
        past_key_values.close()

        console.print("\n[bold]3. The same with transformers' DynamicCache[/], everything in memory")
        cache = DynamicCache(config=o.model.config)
        stock = o.model.generate(**inputs, past_key_values=cache, **settings)
    theirs = [both - mine for both, mine in zip(seconds(o.stats), ours, strict=True)]
    in_memory = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    equal = torch.equal(output, stock)

    table = Table(title=None)
    for column in ("", "ollm, chunked", "transformers, DynamicCache"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("prompt + new tokens", *[f"{prompt_tokens:,} + {NEW_TOKENS}"] * 2)
    table.add_row("keys and values on disk", format_size(state.disk_bytes), "-")
    table.add_row(
        "keys and values in memory", format_size(state.tail_bytes + state.resident_bytes), format_size(in_memory)
    )
    table.add_row("prefill, seconds", f"{ours[0]:.2f}", f"{theirs[0]:.2f}")
    table.add_row("decode, seconds per token", f"{ours[1]:.3f}", f"{theirs[1]:.3f}")
    table.add_row(
        "distinct tokens in the answer", *[str(len(set(x[0, prompt_tokens:].tolist()))) for x in (output, stock)]
    )
    table.add_row("tokens equal", "[green]yes[/]" if equal else "[bold red]NO[/]", "")
    console.print()
    console.print(table)
    left = list((WORK / "kv_cache").iterdir())
    console.print(f"Left in the cache directory: {', '.join(path.name for path in left) or 'nothing'}.")
    return 0 if equal and not left else 1


if __name__ == "__main__":
    began = time.perf_counter()
    code = main()
    print(f"Done in {time.perf_counter() - began:.0f} s.", file=sys.stderr)
    sys.exit(code)
