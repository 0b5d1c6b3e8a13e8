"""What is known of a model, in numbers and words: all that a plan needs of it, loaded or not."""

from __future__ import annotations

import attrs

from ollm.contracts.spill import KVGeometry


@attrs.frozen(kw_only=True)
class BlockVerdict:
    """What a trial found: whether a model attends block by block."""

    blocks: bool
    """Whether its logits are those of stock attention then."""
    pieces: bool
    """Whether they are, too, when its decoder layers take a prompt in pieces."""
    reason: str
    """Why, in words for `CacheState.mode_reason`."""


@attrs.frozen(kw_only=True)
class ModelFacts:
    """A decoder, as its config describes it, with the dtype and the device that it has or will have."""

    name: str
    """Its class, for messages."""
    dtype: str
    """Of keys and values, as torch names it: `bfloat16`."""
    device: str
    """As torch names it: `cpu`, `cuda:0`."""
    geometry: KVGeometry
    activation_bytes: int
    """About what a layer takes per token of a prompt while it works."""
    prompt_bytes: int
    """About what is kept of every token of a prompt while a layer works through it, piece by piece."""
    verdict: BlockVerdict | None = None
    """`None` where no trial was made yet."""
