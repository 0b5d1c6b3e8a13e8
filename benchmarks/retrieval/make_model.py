"""Make the small retrieval model from nothing but a seed: `python benchmarks/retrieval/make_model.py`.

Trains a tokenizer on generated text, puts the lookup into the weights (`circuit.py`), refines everything by training
(`lesson.py`), measures (`evaluate.py`), and writes `model/` and `training.json` beside this file. On two cores,
training takes about five minutes and measuring about as long, most of it at 65,536 tokens. The same seed
gives the same text and the same start; the weights are the same as far as torch's kernels are.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from circuit import untrained_model
from evaluate import exact_match, load
from lesson import NOTHING, Lesson, make_lesson
from torch import nn
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vocabulary import make_tokenizer

HERE = Path(__file__).parent
THREADS = 2
LEARNING_RATE, WARM_UP, DECAY_SHARE = 6e-4, 20, 0.4
QUESTIONS, QUESTION_SEED = 200, 1_000_000


@dataclass(frozen=True)
class Stage:
    """So many steps with sequences of one length. Short ones first: they are cheap and teach the most per second."""

    length: int
    sequences: int
    steps: int


STAGES = (Stage(256, 16, 60), Stage(512, 8, 90), Stage(2_048, 2, 150))
STEPS = sum(stage.steps for stage in STAGES)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Refine every weight; no weight decay, which would pull the lookup apart."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    model.train()
    began = time.perf_counter()
    for step, lesson in enumerate(_lessons(tokenizer, seed)):
        loss, right = _learn(model, lesson)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 25 == 0:
            length, seconds = lesson.ids.shape[1], time.perf_counter() - began
            print(
                f"step {step} of {STEPS}, {length} tokens: loss {loss:.4f}, right {right:.3f}, {seconds:.0f} s",
                flush=True,
            )
    model.eval()


def _lessons(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Lesson]:
    rng = random.Random(seed)
    for stage in STAGES:
        for _ in range(stage.steps):
            yield make_lesson(tokenizer, stage.length, stage.sequences, rng)


def _learn(model: LlamaForCausalLM, lesson: Lesson) -> tuple[float, float]:
    """Gradients of one batch; returns the loss and the share of tokens that were right."""
    wanted = lesson.targets != NOTHING
    with torch.autocast("cpu", torch.bfloat16):
        # Without a mask, transformers would take each jump in position for the start of another sequence.
        mask = torch.ones_like(lesson.ids)
        hidden = model.model(lesson.ids, attention_mask=mask, position_ids=lesson.positions).last_hidden_state
        logits = model.lm_head(hidden[wanted]).float()  # of the few tokens that are learned
    targets = lesson.targets[wanted]
    loss = nn.functional.cross_entropy(logits, targets)
    loss.backward()
    return loss.item(), (logits.argmax(-1) == targets).float().mean().item()


def _rate(step: int) -> float:
    """A short warm-up, a plateau, and a straight line to zero."""
    return min(1.0, (step + 1) / WARM_UP, (STEPS - step) / (DECAY_SHARE * STEPS))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Model, tokenizer and how to generate: greedily, until the token that ends a code."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=8,
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, lengths: list[int]
) -> dict[str, dict[str, float]]:
    """By context length: how many codes were asked for and what share was right, with `DynamicCache`."""
    table = {}
    for tokens in lengths:
        right, asked = exact_match(model, tokenizer, tokens, QUESTIONS, QUESTION_SEED, DynamicCache)
        table[str(tokens)] = {"questions": asked, "right": right, "accuracy": round(right / asked, 4)}
        print(f"{tokens} tokens: {right} of {asked}", flush=True)
    return table


def machine() -> str:
    """In words, such as "2 cores of an AMD EPYC"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{THREADS} cores, {names[0] if names else platform.machine()}"


def main() -> None:
    """Make everything and write down how it was made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="where model/ and training.json go")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    tokenizer = make_tokenizer()
    model = untrained_model(tokenizer, options.seed).eval()
    before = accuracy(model, tokenizer, [2_048, 8_192])
    began = time.perf_counter()
    train(model, tokenizer, options.seed)
    seconds = time.perf_counter() - began
    save(model, tokenizer, options.out / "model")
    record = _record(options.seed, seconds)
    record["accuracy_untrained"] = before
    record["accuracy"] = accuracy(*load(options.out / "model"), [2_048, 8_192, 32_768, 65_536])
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def _record(seed: int, seconds: float) -> dict[str, Any]:
    return {
        "what": "lookup put in by hand (circuit.py) and refined by training; accuracy is given before and after",
        "seed": seed,
        "command": " ".join(["python", "benchmarks/retrieval/make_model.py", *sys.argv[1:]]),
        "machine": machine(),
        "seconds_training": round(seconds),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "steps": STEPS,
        "tokens": sum(stage.length * stage.sequences * stage.steps for stage in STAGES),
        "stages": [asdict(stage) for stage in STAGES],
    }


if __name__ == "__main__":
    main()
