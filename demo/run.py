"""`make demo`: a document of over 32,000 tokens, read once into keys and values on disk, then asked many questions.

The model is the small one of `benchmarks/retrieval`, which can look up facts. What is shown: right answers from disk in
bounded memory, the same tokens as transformers' own cache, several questions at once, and a sliding window that
forgets. Ends with exit code 1 if an answer or a token is wrong.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
RETRIEVAL = HERE.parent / "benchmarks" / "retrieval"
WORK = HERE / "work"
TOKENS = 33_000
QUESTIONS = 5
SEED = 7
CODE_TOKENS = 3
"""A code is two tokens, and then the model stops."""


def ask(o: Any, past_key_values: Any, document: Any, facts: list[Any]) -> tuple[list[str], Any]:
    """Ask about facts, one continuation of the document for each; the answers, and all tokens."""
    import torch
    from text import question

    texts = [question(fact) for fact in facts]
    o.tokenizer.padding_side = "left"
    questions = o.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    ids = torch.cat([document.expand(len(facts), -1), questions["input_ids"]], dim=1)
    mask = torch.cat([torch.ones_like(document).expand(len(facts), -1), questions["attention_mask"]], dim=1)
    output = o.model.generate(
        ids, attention_mask=mask, past_key_values=past_key_values, max_new_tokens=CODE_TOKENS, do_sample=False
    )
    answers = o.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers], output


def read(o: Any, past_key_values: Any, document: Any) -> float:
    """Let the model read the document; seconds."""
    began = time.perf_counter()
    o.model(document, past_key_values=past_key_values, logits_to_keep=1)
    return time.perf_counter() - began


def main() -> int:
    """Run the demo; the exit code."""
    sys.path.insert(0, str(RETRIEVAL))
    import torch
    from rich.console import Console
    from rich.table import Table
    from text import document as make_document
    from transformers import DynamicCache
    from transformers.utils.logging import disable_progress_bar

    from ollm import AutoInference
    from ollm.units import format_size

    disable_progress_bar()
    logging.getLogger("ollm").setLevel(logging.ERROR)
    console = Console(highlight=False, soft_wrap=True)
    with torch.inference_mode():
        console.print("[bold]1. A document[/] of made-up facts and idle talk")
        o = AutoInference(RETRIEVAL / "model", device="cpu")
        told = make_document(TOKENS, o.tokenizer, SEED)
        step = (len(told.facts) - 1) / (QUESTIONS - 1)
        facts = [told.facts[round(number * step)] for number in range(QUESTIONS)]
        document = o.tokenizer(told.text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for line in told.text.splitlines()[:3]:
            console.print(f"   {line}")
        console.print(f"   … {told.tokens:,} tokens in all, {len(told.facts):,} facts\n")

        console.print("[bold]2. Its keys and values on disk[/], and nothing of them resident")
        place = WORK / "kv_cache"
        past_key_values = o.DiskCache(cache_dir=place, cache_strategy="streamed-segmented", ram_budget=0)
        seconds = read(o, past_key_values, document)
        began = time.perf_counter()
        with past_key_values.fork(QUESTIONS) as fork:
            answers, tokens = ask(o, fork, document, facts)
        asked_seconds, state = time.perf_counter() - began, past_key_values.state()
        past_key_values.close()

        console.print(f"[bold]3. The same with a window[/] of the newest {TOKENS // 4:,} tokens, which forgets")
        window = o.DiskCache(
            cache_dir=WORK / "kv_cache", cache_strategy="sliding-window-ring-buffer", cache_window_tokens=TOKENS // 4
        )
        read(o, window, document)
        with window.fork(QUESTIONS) as fork:
            forgetful, _ = ask(o, fork, document, facts)
        window.close()

        console.print("[bold]4. The same with transformers' DynamicCache[/], everything in memory\n")
        cache = DynamicCache(config=o.model.config)
        stock_seconds = read(o, cache, document)
        in_memory = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        cache.batch_repeat_interleave(QUESTIONS)
        began = time.perf_counter()
        _, stock = ask(o, cache, document, facts)
        stock_asked = time.perf_counter() - began

    table = Table()
    for column in ("question", "told at", "code", "from disk", "window"):
        table.add_column(column, justify="left" if column == "question" else "right")
    for fact, answer, forgotten in zip(facts, answers, forgetful, strict=True):
        table.add_row(
            f"{fact.attribute} of the {fact.adjective} {fact.noun}?", f"{fact.token:,}", fact.code,
            _judged(answer, fact.code), _judged(forgotten, fact.code),
        )  # fmt: skip
    console.print(table)
    equal, right = torch.equal(tokens, stock), answers == [fact.code for fact in facts]
    table = Table()
    for column in ("", "ollm", "DynamicCache"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("keys and values on disk", format_size(state.disk_bytes), "-")
    table.add_row(
        "memory for them", format_size(state.tail_bytes + state.resident_bytes + state.buffer_bytes),
        f"{format_size(in_memory)}, then {format_size(QUESTIONS * in_memory)}",
    )  # fmt: skip
    table.add_row("reading the document, seconds", f"{seconds:.1f}", f"{stock_seconds:.1f}")
    table.add_row(f"{QUESTIONS} questions at once, seconds", f"{asked_seconds:.1f}", f"{stock_asked:.1f}")
    table.add_row("tokens equal", "[green]yes[/]" if equal else "[bold red]NO[/]", "")
    console.print(table)
    left = list((WORK / "kv_cache").iterdir()) if (WORK / "kv_cache").exists() else []
    console.print(f"Left in the cache directory: {', '.join(path.name for path in left) or 'nothing'}.")
    return 0 if equal and right and not left else 1


def _judged(answer: str, code: str) -> str:
    return f"[green]{answer}[/]" if answer == code else f"[red]{answer}, wrong[/]"


if __name__ == "__main__":
    began = time.perf_counter()
    code = main()
    print(f"Done in {time.perf_counter() - began:.0f} s.", file=sys.stderr)
    sys.exit(code)
