"""The lookup that is put into the model by hand before it is trained.

Models of this size learned to continue a code but not to find it when they began from random weights, so the lookup is
*not* discovered by training. It is written into the weights here, and training refines it together with everything
around it. It is an induction head (Olsson et al. 2022, "In-context Learning and Induction Heads") whose first half
gathers three words instead of one:

- Layer 0, heads 0 to 2: every position fetches the most recent adjective, noun and attribute.
- Layer 1, head 0: a question's position finds the half of a code whose position fetched the same three words, and
  copies it. In front of a code it looks for first halves, and at a first half for second halves.

Everything else (the fourth head of layer 0, three heads of layer 1, both MLPs, a fifth of the stream) begins as noise.
The model is a stock Llama: "most recent" and "wherever it is" both come from rotary frequencies. With a base of 1e16
the 64 pairs of a head turn by 1 to 1e-16 radians per token; the fast ones tell near from far, and the slow ones hardly
turn in a million tokens, so what is compared there is compared at any distance.
"""

from __future__ import annotations

import math

import text
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaAttention
from vocabulary import LONGEST, token_id

HIDDEN, HEADS, HEAD = 256, 4, 128
PAIRS = HEAD // 2
NOISE = 0.01

# What the 256 numbers of the residual stream mean.
OWN = slice(0, 64)  # which word this token is, among the words of its kind
FOUND = {"adjective": slice(64, 96), "noun": slice(96, 128), "attribute": slice(128, 136)}  # fetched by layer 0
ANSWER = slice(136, 200)  # the half of a code that layer 1 copied
KIND = {kind: 200 + n for n, kind in enumerate(("adjective", "noun", "attribute", "first", "second", "other"))}

# Pairs that turn by 0.18 to 1e-4 radians per token: their sum falls as the distance in tokens grows.
RECENT_PAIRS = range(3, 17)
# From here on a pair turns by less than 0.05 radians in 262,144 tokens. 37 pairs hold 32 + 32 + 8 numbers and 2 flags.
STILL_PAIRS = range(27, PAIRS)
KIND_PAIR = PAIRS - 1

# Strengths, in units of attention logits (natural logarithm), unless said otherwise.
RECENCY, NEAREST_RECENCY = 4.0, 6.0  # per pair; the two fastest separate this line from the one before it
KIND_BONUS = 80.0  # beats the whole range of recency, so that a far word of the kind beats a near one of another
KEY_WORD = 9.0  # per word of the key that agrees
HALF_BONUS = 30.0  # for the half that is wanted; beats three words that agree


def untrained_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Noise, with the lookup added to it."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(tokenizer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, NOISE)
        _put_in_words(model, tokenizer)
        for head, kind in enumerate(FOUND):
            _fetch_most_recent(model.model.layers[0].self_attn, head, kind)
        _look_up(model.model.layers[1].self_attn)
    return model


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD,
        attention_bias=True,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e16},
        max_position_embeddings=LONGEST,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _put_in_words(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give each token a code and a flag for its kind, and let the output read codes from ANSWER.

    Every embedding has length √2, so that the norm before a layer scales all tokens alike.
    """
    inputs, outputs = model.model.embed_tokens.weight, model.lm_head.weight
    inputs[:, OWN] += nn.functional.normalize(torch.randn(len(inputs), 64), dim=1)
    inputs[:, KIND["other"]] += 1
    halves = _opposites(64)[:100]
    words = {
        "adjective": ([f" {word}" for word in text.ADJECTIVES], _opposites(32)),
        "noun": ([f" {word}" for word in text.NOUNS], _opposites(32)),
        "attribute": ([f" {word}" for word in text.ATTRIBUTES], _rotation(8)),
        "first": ([f" {half:02}" for half in range(100)], halves),
        "second": ([f"{half:02}" for half in range(100)], halves),
    }
    for kind, (spellings, codes) in words.items():
        ids = [token_id(tokenizer, spelling) for spelling in spellings]
        inputs[ids] = NOISE * torch.randn(len(ids), HIDDEN)
        inputs[ids, : codes.shape[1]] += codes
        inputs[ids, KIND[kind]] += 1
        if kind in ("first", "second"):
            outputs[ids, ANSWER] += codes
            outputs[ids, KIND["second"]] -= 2
            outputs[ids, KIND["first"]] += 2 if kind == "second" else -2
            outputs[ids, KIND["other"]] += 2 if kind == "first" else -2
    outputs[tokenizer.eos_token_id, KIND["second"]] += 4


def _fetch_most_recent(attention: LlamaAttention, head: int, kind: str) -> None:
    """Attend to the nearest token of a kind and write its code where `FOUND[kind]` says.

    The kind is worth more than any distance; among tokens of the kind, biases in queries and keys that rotary
    positions turn apart make the nearest win.
    """
    first = head * HEAD
    for pair in RECENT_PAIRS:
        strength = NEAREST_RECENCY if pair < RECENT_PAIRS[2] else RECENCY
        _add_to_both(attention, first + pair, strength)
    # The norm makes the flag of a token √(256 / 2) long.
    attention.q_proj.bias[first + KIND_PAIR] += _root(KIND_BONUS)
    attention.k_proj.weight[first + KIND_PAIR, KIND[kind]] += _root(KIND_BONUS) / math.sqrt(HIDDEN / 2)
    width = FOUND[kind].stop - FOUND[kind].start
    values = torch.arange(width)
    attention.v_proj.weight[first + values, values] += 1 / math.sqrt(HIDDEN / 2)
    attention.o_proj.weight[FOUND[kind].start + values, first + values] += 1


def _look_up(attention: LlamaAttention) -> None:
    """Attend to the half of a code that the key of this position belongs to, and copy its own code to ANSWER."""
    # A token's own code and flag and the three that layer 0 fetched: five numbers of length 1.
    unit = math.sqrt(HIDDEN / 5)
    still = [*STILL_PAIRS, *(pair + PAIRS for pair in STILL_PAIRS)]
    wants_first, wants_second, *places = still
    fetched = [n for part in FOUND.values() for n in range(part.start, part.stop)]
    for place, source in zip(places, fetched, strict=True):
        attention.q_proj.weight[place, source] += _root(KEY_WORD) / unit
        attention.k_proj.weight[place, source] += _root(KEY_WORD) / unit
    strength = _root(HALF_BONUS)
    attention.q_proj.bias[wants_first] += strength
    attention.q_proj.weight[wants_first, KIND["first"]] -= strength / unit
    attention.q_proj.weight[wants_second, KIND["first"]] += strength / unit
    attention.k_proj.weight[wants_first, KIND["first"]] += strength / unit
    attention.k_proj.weight[wants_second, KIND["second"]] += strength / unit
    values = torch.arange(64)
    attention.v_proj.weight[values, OWN] += torch.eye(64) / unit
    # Three times as long as the rest of the stream's parts, so that the output hears little else.
    attention.o_proj.weight[ANSWER, values] += 3 * torch.eye(64)


def _add_to_both(attention: LlamaAttention, row: int, strength: float) -> None:
    """Let query and key always agree in one rotary pair, by `strength` where they are at the same position."""
    attention.q_proj.bias[row] += _root(strength)
    attention.k_proj.bias[row] += _root(strength)


def _root(strength: float) -> float:
    """What query and key must each hold for their product to be `strength` after attention divides by √HEAD."""
    return math.sqrt(strength * math.sqrt(HEAD))


def _rotation(size: int) -> Tensor:
    """A random orthogonal matrix: codes spread over all their numbers, as trained ones are."""
    return torch.linalg.qr(torch.randn(size, size)).Q


def _opposites(size: int) -> Tensor:
    """Twice as many unit vectors as numbers, no two of which look alike: orthogonal ones and their opposites."""
    codes = _rotation(size)
    return torch.cat([codes, -codes])
