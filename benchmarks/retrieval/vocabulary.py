"""The tokenizer: byte-level BPE that learns each word of the generated text whole, and digits in pairs.

A code is two tokens, and its first half (which has the space in front) is another token than the same digits as a
second half. So a token alone tells which half it is, and the model need not count.
"""

from __future__ import annotations

import text
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
LONGEST = 262_144
# Far more than the few hundred words need: training ends by itself when every word is one token.
ROOM = 4_000


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on every word that the generator can write. No special token is added to a text unasked."""
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(r" ?\p{L}+| ?\d{2}|\d|\s|[^\s\p{L}\d]")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ROOM,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.all_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, model_max_length=LONGEST
    )


def token_id(tokenizer: PreTrainedTokenizerFast, word: str) -> int:
    """The token of a word that must be one token; `word` includes the space before it, where it has one."""
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens, not one")
    return int(ids[0])
