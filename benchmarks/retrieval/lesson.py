"""What the model is trained on: short documents with many questions, at positions that jump.

- Questions are asked with replacement. Were each fact asked about once only, "not asked yet" would be a shortcut to
  the answer that no reader of a long document could use.
- Half of the documents use few words, so that facts share parts of their keys.
- Most documents jump in position at some line ends, which teaches distances that are far longer than the sequences
  (PoSE: Zhu et al. 2023, "PoSE: Efficient Context Window Extension of LLMs via Positional Skip-wise Training").
- Only the two halves of a code and the token that ends it are learned; the text itself is not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import text
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

JUMPING_SHARE = 0.7
LONGEST_SPAN = 100_000
MOST_JUMPS = 8
FEW_WORDS = 6


@dataclass(frozen=True)
class Lesson:
    """A batch: tokens, their positions, and for each token the one to be learned after it (or `NOTHING`)."""

    ids: Tensor
    positions: Tensor
    targets: Tensor


NOTHING = -100


def make_lesson(tokenizer: PreTrainedTokenizerFast, length: int, sequences: int, rng: random.Random) -> Lesson:
    """Several independent sequences of one length."""
    ids, positions, targets = zip(*(_sequence(tokenizer, length, rng) for _ in range(sequences)), strict=True)
    return Lesson(torch.tensor(ids), torch.tensor(positions), torch.tensor(targets))


def _sequence(
    tokenizer: PreTrainedTokenizerFast, length: int, rng: random.Random
) -> tuple[list[int], list[int], list[int]]:
    """A document and, until the sequence is full, questions about its facts; padded at the end."""
    document, facts = _document(tokenizer, length, rng)
    end = tokenizer.eos_token_id
    (line_end,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    ids, targets = document, [NOTHING] * len(document)
    for asked, answer in _questions(tokenizer, facts, (length - len(document)) // 12, rng):
        # The last token of the question gives the first half, and each answer token the next one.
        targets = [*targets, *[NOTHING] * (len(asked) - 1), *answer, end, NOTHING, NOTHING]
        ids = [*ids, *asked, *answer, end, line_end]
        if len(ids) >= length:
            break
    missing = length - len(ids)
    ids = (ids + [tokenizer.pad_token_id] * missing)[:length]
    targets = (targets + [NOTHING] * missing)[:length]
    return ids, _positions(ids, line_end, rng), targets


def _document(
    tokenizer: PreTrainedTokenizerFast, length: int, rng: random.Random
) -> tuple[list[int], tuple[text.Fact, ...]]:
    """A document that leaves room for questions and tells at least one fact."""
    while True:
        wanted = int(length * rng.uniform(0.3, 0.8))
        words = FEW_WORDS if rng.random() < 0.5 else len(text.NOUNS)
        told = text.document(wanted, tokenizer, rng.getrandbits(32), rng.uniform(0.3, 1), words)
        if told.facts:
            return tokenizer(told.text, add_special_tokens=False)["input_ids"], told.facts


def _questions(
    tokenizer: PreTrainedTokenizerFast, facts: tuple[text.Fact, ...], number: int, rng: random.Random
) -> list[tuple[list[int], list[int]]]:
    """Tokens of questions and of their answers; a fact may be asked about again and again."""
    chosen = rng.choices(facts, k=number + 1)
    asked = tokenizer([text.question(fact) for fact in chosen], add_special_tokens=False)["input_ids"]
    answers = tokenizer([text.answer(fact) for fact in chosen], add_special_tokens=False)["input_ids"]
    return list(zip(asked, answers, strict=True))


def _positions(ids: list[int], line_end: int, rng: random.Random) -> list[int]:
    """Positions that count up, and in most sequences jump ahead at a few line ends."""
    starts = [place + 1 for place, token in enumerate(ids) if token == line_end]
    jumps: dict[int, int] = {}
    if rng.random() < JUMPING_SHARE:
        chosen = rng.sample(starts, min(len(starts), rng.randint(1, MOST_JUMPS)))
        # Spans of all sizes, not mostly the longest ones.
        span = int(LONGEST_SPAN ** rng.uniform(0.5, 1))
        cuts = sorted(rng.randrange(span) for _ in chosen)
        for start, low, high in zip(chosen, [0, *cuts], cuts, strict=False):
            jumps[start] = high - low
    positions, position = [], 0
    for place in range(len(ids)):
        position += jumps.get(place, 0)
        positions.append(position)
        position += 1
    return positions
