"""What lossy KV strategies lose: `python benchmarks/retrieval/lossy.py [TOKENS ...] [--json FILE]`.

The small retrieval model reads a document into each cache, on disk, and answers questions about facts that are evenly
spread over it, many at once in a fork. Beside the number of right codes, which tells dropped tokens sharply and
roundings hardly, there is the error of the logits and how far the distribution of the next token moved
(Kullback-Leibler divergence, in bits), both against the exact cache, at the two tokens of each code. fp32, greedy.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs
import text
import torch
from evaluate import encode, load, spread
from rich.console import Console
from rich.table import Table

from ollm import KVCache, disk_cache

WINDOW = 1024
CACHES: dict[str, dict[str, Any]] = {
    "exact (chunked)": {"cache_strategy": "chunked"},
    "int8-symmetric-per-tensor": {"cache_strategy": "quantized-cold-tier"},
    "int8-per-token": {"cache_strategy": "quantized-cold-tier", "options": {"representation": "int8-per-token"}},
    "int4-per-token-group": {
        "cache_strategy": "quantized-cold-tier", "options": {"representation": "int4-per-token-group"},
    },
    f"last {WINDOW:,} tokens": {"cache_strategy": "sliding-window-ring-buffer", "cache_window_tokens": WINDOW},
    f"first 4 and last {WINDOW:,} tokens": {
        "cache_strategy": "sliding-window-ring-buffer", "cache_window_tokens": WINDOW, "options": {"sink_tokens": 4},
    },
}  # fmt: skip
AT_ONCE = 25


@attrs.frozen
class Result:
    """One cache at one length."""

    cache: str
    tokens: int
    near: tuple[int, int]
    """Right codes, and questions, about facts in the newest `WINDOW` tokens …"""
    far: tuple[int, int]
    """… and about those before."""
    logit_error: float
    """Root mean square, by the root mean square of the exact logits about their mean."""
    divergence: float
    """Mean bits."""
    disk_bytes: int
    seconds: float


def answer_all(model: Any, tokenizer: Any, cache: KVCache, facts: list[text.Fact]) -> torch.Tensor:
    """The logits `[facts, 2, vocabulary]` of both halves of each code, the second after the right first one."""
    return torch.cat(
        [_answer(model, tokenizer, cache, facts[at : at + AT_ONCE]) for at in range(0, len(facts), AT_ONCE)]
    )


def _answer(model: Any, tokenizer: Any, cache: KVCache, facts: list[text.Fact]) -> torch.Tensor:
    questions = [tokenizer(text.question(fact), add_special_tokens=False)["input_ids"] for fact in facts]
    longest = max(map(len, questions))
    padding = [longest - len(question) for question in questions]
    ids = torch.tensor([[0] * gap + question for gap, question in zip(padding, questions, strict=True)])
    past = cache.get_seq_length()
    mask = torch.ones(len(facts), past + longest, dtype=torch.long)
    for row, gap in enumerate(padding):
        mask[row, past : past + gap] = 0
    with cache.fork(len(facts)) as fork:
        first = model(ids, attention_mask=mask, past_key_values=fork, logits_to_keep=1).logits
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        right = _halves(tokenizer, facts)[:, :1]
        second = model(right, attention_mask=mask, past_key_values=fork, logits_to_keep=1).logits
    return torch.cat([first, second], dim=1)


def _halves(tokenizer: Any, facts: list[text.Fact]) -> torch.Tensor:
    """The two tokens of each code."""
    return torch.tensor([tokenizer(text.answer(fact), add_special_tokens=False)["input_ids"] for fact in facts])


@torch.inference_mode()
def measure(model: Any, tokenizer: Any, tokens: int, questions: int, seed: int, folder: Path) -> list[Result]:
    """Every cache on one document."""
    document = text.document(tokens, tokenizer, seed)
    facts = spread(document.facts, questions)
    ids, truth, exact, results = encode(model, tokenizer, document.text), _halves(tokenizer, facts), None, []
    for name, arguments in CACHES.items():
        began = time.perf_counter()
        with disk_cache(model, cache_dir=folder, ram_budget=0, **arguments) as cache:
            model(ids, past_key_values=cache, logits_to_keep=1)
            logits = answer_all(model, tokenizer, cache, facts).float()
            disk_bytes = cache.state().disk_bytes
        exact = logits if exact is None else exact
        right = (logits.argmax(-1) == truth).all(-1).tolist()
        is_near = [fact.token >= document.tokens - WINDOW for fact in facts]
        near = [ok for ok, newest in zip(right, is_near, strict=True) if newest]
        far = [ok for ok, newest in zip(right, is_near, strict=True) if not newest]
        spread_of = (exact - exact.mean(-1, keepdim=True)).square().mean().sqrt()
        logs, exact_logs = logits.log_softmax(-1), exact.log_softmax(-1)
        results.append(
            Result(
                name, document.tokens, (sum(near), len(near)), (sum(far), len(far)),
                float((logits - exact).square().mean().sqrt() / spread_of),
                float((exact_logs.exp() * (exact_logs - logs)).sum(-1).mean()) / math.log(2),
                disk_bytes, time.perf_counter() - began,
            )
        )  # fmt: skip
    return results


def show(results: list[Result]) -> None:
    """A table."""
    table = Table(box=None, pad_edge=False)
    for column in (
        "tokens",
        "cache",
        "right, far",
        "right, near",
        "logit error",
        "divergence, bits",
        "MB on disk",
        "s",
    ):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for one in results:
        table.add_row(
            f"{one.tokens:,}", one.cache, "{} of {}".format(*one.far), "{} of {}".format(*one.near),
            f"{one.logit_error:.2g}", f"{one.divergence:.2g}", f"{one.disk_bytes / 1e6:,.0f}", f"{one.seconds:.0f}",
        )  # fmt: skip
    Console(width=120, highlight=False).print(table)


def main() -> None:
    """Measure and print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", nargs="*", type=int, default=[2_048, 8_192, 32_768])
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, tokenizer = load()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for tokens in options.tokens:
            results += measure(model, tokenizer, tokens, options.questions, options.seed, Path(folder))
    show(results)
    if options.json:
        content = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "python": platform.python_version(),
            "torch": torch.__version__, "results": [attrs.asdict(one) for one in results],
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
