"""The text the small retrieval model reads: facts, filler and questions, all generated from a seed.

A *fact* ties a four-digit code to a key of three words: an adjective, a noun and an attribute ("The badge of the amber
gate is 4921."). Filler says nothing about any key and holds no digits. A question repeats a key and ends in
"Answer:", so that the tokens the model gives next are the code. Nothing here comes from a corpus, so that the text, the
model made from it and every question asked of it can be made again from one number.

This module needs no torch and no transformers: whoever measures a cache can use it with any tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any


def _words(listed: str, between: str | None = None) -> tuple[str, ...]:
    return tuple(word.strip() for word in listed.split(between))


ADJECTIVES = _words(
    """
    amber ancient azure bold brave brisk bronze calm clever copper coral cosmic crimson curious dapper distant
    eager early ebony elegant emerald faded fancy frosty gentle gilded golden grand hidden hollow humble ivory
    jolly lavender lively lonely lucky mellow mighty misty modest noble olive pale placid polished proud quiet
    rapid rustic sandy scarlet silent silver sleepy solemn speckled steady sturdy sunny tender velvet violet
    wooden
    """
)
NOUNS = _words(
    """
    anchor anvil apple arrow badger barn basket beacon bell bridge bucket cabin candle canyon castle cellar chapel
    clock compass cottage cradle dragon drum engine falcon feather fiddle forest fountain galley garden gate
    glacier hammer harbour helmet island kettle ladder lantern library lighthouse marble meadow mill mirror museum
    orchard otter parrot piano pillar pocket quarry raven saddle statue tower tunnel turtle valley violin wagon
    windmill
    """
)
ATTRIBUTES = ("badge", "channel", "code", "licence", "permit", "pin", "serial", "ticket")

# Each names the whole key before it gives the code: the model reads from left to right, and can only tie a code to
# words that it has already seen.
FACTS = (
    "The {attribute} of the {adjective} {noun} is {code}.",
    "For the {adjective} {noun}, the {attribute} is {code}.",
    "The {adjective} {noun} has the {attribute} {code}.",
    "Remember that the {attribute} of the {adjective} {noun} is {code}.",
    "Whoever asks about the {adjective} {noun} needs the {attribute} {code}.",
    "As for the {attribute} of the {adjective} {noun}, it is {code}.",
)
FILLERS = (
    "{who} {did} the {thing} {when}.",
    "{who} and {other} {did} the {thing} {when}.",
    "Nobody knew why {who} {did} the {thing}.",
    "It rained {when}, so {who} {did} the {thing}.",
    "{who} {did} the {thing} while {other} slept.",
)
PEOPLE = _words(
    """
    Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Leo Maria Nora Oscar Paula
    """
)
DEEDS = _words(
    """
    borrowed broke carried cleaned dropped found hid lost mended moved opened painted sold stole washed kept
    """
)
THINGS = _words(
    """
    bread carpet chair coat curtain dish envelope guitar hat jacket letter newspaper radio table umbrella vase
    """
)
TIMES = _words(
    """
    after lunch, after midnight, all winter, at dawn, at noon, before breakfast, before sunset, during the storm,
    in April, in October, in summer, last week, on Friday, on Monday, twice a year, yesterday
    """,
    ",",
)

Encode = Callable[..., Mapping[str, Any]]
"""A Hugging Face tokenizer, called with a list of texts and `add_special_tokens=False`."""

LINES_AT_A_TIME = 64


@dataclass(frozen=True)
class Fact:
    """A key of three words and its code; `token` is where its line starts in the document."""

    adjective: str
    noun: str
    attribute: str
    code: str
    token: int = 0


@dataclass(frozen=True)
class Document:
    """Lines of facts and filler, `tokens` long in all, and the facts in the order in which they are told."""

    text: str
    facts: tuple[Fact, ...]
    tokens: int


def question(fact: Fact) -> str:
    """Ask for a code; the model's next tokens are the answer."""
    return f"Question: what is the {fact.attribute} of the {fact.adjective} {fact.noun}? Answer:"


def answer(fact: Fact) -> str:
    """The text that follows `question(fact)`, without the token that ends it."""
    return f" {fact.code}"


def document(tokens_wanted: int, tokenizer: Encode, seed: int, fact_share: float = 0.5, words: int = 64) -> Document:
    """At most `tokens_wanted` tokens (and less than a line fewer) of text in which no two facts have the same key.

    Only the first `words` of shuffled adjectives and nouns are used. Few words make facts that share parts of their
    keys, which are harder to tell apart.
    """
    told: list[str] = []
    facts: list[Fact] = []
    length = 0
    source = lines(random.Random(seed), fact_share, words)
    while True:
        batch = list(islice(source, LINES_AT_A_TIME))
        ids = tokenizer([line for line, _ in batch], add_special_tokens=False)["input_ids"]
        for (line, fact), line_ids in zip(batch, ids, strict=True):
            if length + len(line_ids) > tokens_wanted:
                return Document("".join(told), tuple(facts), length)
            told.append(line)
            if fact is not None:
                facts.append(replace(fact, token=length))
            length += len(line_ids)


def lines(rng: random.Random, fact_share: float, words: int) -> Iterator[tuple[str, Fact | None]]:
    """Endless lines, each with its line end; a line that tells a fact comes with it.

    When every key is used up, only filler follows: a key told twice would have two codes.
    """
    adjectives, nouns = rng.sample(ADJECTIVES, words), rng.sample(NOUNS, words)
    keys = words * words * len(ATTRIBUTES)
    used: set[tuple[str, str, str]] = set()
    while True:
        if rng.random() < fact_share and len(used) < keys:
            fact = _new_fact(rng, adjectives, nouns, used)
            yield rng.choice(FACTS).format(**vars(fact)) + "\n", fact
        else:
            yield _filler(rng) + "\n", None


def all_text() -> Iterator[str]:
    """Every word in every form in which it can occur, for training a tokenizer."""
    for template in FACTS:
        yield template.format(adjective="amber", noun="gate", attribute="code", code="0000")
    yield question(Fact("amber", "gate", "code", "0000")) + "\n"
    for key_word in (*ADJECTIVES, *NOUNS, *ATTRIBUTES):
        yield f"the {key_word}"
    for template in FILLERS:
        for who, did, thing, when in zip(PEOPLE, DEEDS, THINGS, TIMES, strict=True):
            yield template.format(who=who, other=who, did=did, thing=thing, when=when)
    for half in range(100):
        yield f" {half:02}{half:02}"


def _new_fact(rng: random.Random, adjectives: list[str], nouns: list[str], used: set[tuple[str, str, str]]) -> Fact:
    """A fact whose key is not in `used`, which gains it. Keys are drawn until one is new."""
    while True:
        key = (rng.choice(adjectives), rng.choice(nouns), rng.choice(ATTRIBUTES))
        if key not in used:
            used.add(key)
            return Fact(*key, code=f"{rng.randrange(10_000):04}")


def _filler(rng: random.Random) -> str:
    """A sentence without a key word and without a digit."""
    who, other = rng.sample(PEOPLE, 2)
    return rng.choice(FILLERS).format(
        who=who, other=other, did=rng.choice(DEEDS), thing=rng.choice(THINGS), when=rng.choice(TIMES)
    )
