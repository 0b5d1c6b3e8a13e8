"""How often the small retrieval model gives the right code: `python benchmarks/retrieval/evaluate.py [TOKENS ...]`.

The document is read once into a cache; each question goes on from there, and the cache is then cropped back. What is
measured is the whole of model and cache, with fp32 weights and greedy choice: a cache that loses what is far back, or
blurs it, shows in the number of right codes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import text
import torch
from transformers import AutoTokenizer, Cache, DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

MODEL = Path(__file__).parent / "model"
CHUNK = 4_096


def load(path: Path = MODEL) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model in fp32 and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


@torch.inference_mode()
def exact_match(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tokens: int,
    questions: int,
    seed: int,
    make_cache: Callable[[], Cache],
    chunk: int = CHUNK,
) -> tuple[int, int]:
    """Ask about facts spread evenly over a document; returns how many codes were right and how many were asked for.

    `make_cache` is called once. The cache must crop: `cache.crop(-n)` takes the last n tokens away.
    """
    document = text.document(tokens, tokenizer, seed)
    asked = spread(document.facts, questions)
    cache = make_cache()
    prefill(model, encode(model, tokenizer, document.text), cache, chunk)
    right = sum(ask(model, tokenizer, cache, text.question(fact)) == fact.code for fact in asked)
    return right, len(asked)


def spread(facts: tuple[text.Fact, ...], wanted: int) -> list[text.Fact]:
    """At most `wanted` facts at even distances, from the first to the last."""
    wanted = min(wanted, len(facts))
    if wanted < 2:
        return list(facts[:wanted])
    return [facts[round(n * (len(facts) - 1) / (wanted - 1))] for n in range(wanted)]


def encode(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, words: str) -> torch.Tensor:
    """One row of tokens on the model's device, nothing added."""
    return tokenizer(words, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)


def prefill(model: LlamaForCausalLM, ids: torch.Tensor, cache: Cache, chunk: int = CHUNK) -> None:
    """Read a document into the cache, piece by piece so that memory does not grow with its square."""
    for piece in ids.split(chunk, dim=1):
        model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)


def ask(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, cache: Cache, question: str) -> str:
    """The code that the model gives, greedily; the cache is left as it was."""
    piece, added, halves = encode(model, tokenizer, question), 0, []
    for _ in range(2):  # a code is two tokens
        logits = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        added += piece.shape[1]
        piece = logits[:, -1:].argmax(-1)
        halves.append(int(piece))
    cache.crop(-added)
    return str(tokenizer.decode(halves)).strip()


def main() -> None:
    """Print one line per context length, with stock `DynamicCache`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", nargs="*", type=int, default=[2_048, 8_192, 32_768, 65_536])
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, default=MODEL)
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    for tokens in options.tokens:
        began = time.perf_counter()
        right, asked = exact_match(model, tokenizer, tokens, options.questions, options.seed, DynamicCache)
        print(f"{tokens:>7,} tokens: {right} of {asked} right, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
