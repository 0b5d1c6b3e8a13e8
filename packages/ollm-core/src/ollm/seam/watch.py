"""Which calls of a model are forward passes of our cache, and whether what they are given continues what it holds.

The model's calls and its `generate` are wrapped while a cache for it is open (see `ollm.changes`); calls with other
caches go through untouched. Knows the arguments that transformers' models take; what a cache holds is its own business.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ollm.changes import Changes
from ollm.errors import (
    CacheBusyError,
    CacheClosedError,
    CacheNotFilledError,
    ConfigurationError,
    ContinuationError,
)
from ollm.seam.cache import KVCache
from ollm.seam.geometry import without_adapter
from ollm.seam.passes import Pass

Call = Callable[..., Any]

_CALL = "_call_impl"
"""What `module(...)` comes to: its forward, with everybody's hooks around it."""


def watch(model: nn.Module) -> Callable[[], None]:
    """Let every forward pass of a model that is given a `KVCache` be a transaction; how to undo it.

    The call that comes first, of the model, of what a PEFT model wraps, or of its decoder, is the whole pass; the
    decoder's is where tokens are counted.
    """
    base = without_adapter(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    if not isinstance(decoder, nn.Module):
        decoder = base
    with Changes() as changes:
        for module in dict.fromkeys((model, base, decoder)):
            changes.wrap(module, _Calls(module, counts=module is decoder, generates=module is base), _CALL)
        if hasattr(base, "generate"):
            changes.wrap(base, _generate, "generate")
        return changes.pop_all().close


class _Calls:
    """What is around the calls of one module."""

    def __init__(self, module: nn.Module, *, counts: bool, generates: bool) -> None:
        """For a module.

        Args:
            module: the model, or a part of it.
            counts: whether it is the decoder.
            generates: whether `generate` calls it.
        """
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._counts, self._generates = counts, generates

    def __call__(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs} if args else kwargs
        cache = next((value for value in arguments.values() if isinstance(value, KVCache)), None)
        if cache is None:
            if self._generates:
                _check_not_replaced()
            return call(*args, **kwargs)
        if cache.at_work.locked():
            cache.check_open()
            running = cache.running
            if running is None or running.thread != threading.get_ident():
                raise CacheBusyError(
                    "This cache is in a forward pass of another thread. A cache serves one thread at a time: wait for "
                    "it, or make a fork or a cache of its own for each."
                )
            return self._within(running, call, args, kwargs, arguments)
        with cache.at_work:
            return self._whole(cache, call, args, kwargs, arguments)

    def _whole(self, cache: KVCache, call: Call, args: Any, kwargs: Any, arguments: dict[str, Any]) -> Any:
        """The outermost call."""
        try:
            running = cache.begin_pass()
            _check_asked(cache, arguments)
            output = self._within(running, call, args, kwargs, arguments)
            _check_same_cache(cache, output)
            cache.end_pass(_ids(arguments), _count(arguments))
            _generating.cache = None
            return output
        except BaseException as error:
            with suppress(Exception):  # the next use of the cache tries again, and says so
                cache.undo_pass()
            if cache.closed and isinstance(error, Exception) and not isinstance(error, CacheClosedError):
                raise CacheClosedError("This cache was closed while a forward pass was under way.") from error
            raise

    def _within(self, running: Pass, call: Call, args: Any, kwargs: Any, arguments: dict[str, Any]) -> Any:
        """Any call within a pass: tokens are counted where they enter the decoder."""
        count = _count(arguments) if self._counts and not running.in_decoder else None
        if count is None:
            return call(*args, **kwargs)
        held = running.held + (running.decoder_tokens or 0)
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] != held + count:
            raise ContinuationError(
                f"attention_mask is for {mask.shape[1]} tokens; the cache holds {held}, and {count} were passed. It "
                f"must be for all {held + count}, those in the cache included."
            )
        running.in_decoder = True
        try:
            output = call(*args, **kwargs)
        finally:
            running.in_decoder = False
        running.decoder_tokens = (running.decoder_tokens or 0) + count
        return output


def _ids(arguments: dict[str, Any]) -> Tensor | None:
    ids = arguments.get("input_ids")
    return ids if isinstance(ids, Tensor) and ids.dim() == 2 else None


def _count(arguments: dict[str, Any]) -> int | None:
    """The tokens that a call is given; `None` where it is given neither ids nor embeddings."""
    for value, dims in ((arguments.get("input_ids"), 2), (arguments.get("inputs_embeds"), 3)):
        if isinstance(value, Tensor) and value.dim() == dims:
            return value.shape[1]
    return None


def _check_asked(cache: KVCache, arguments: dict[str, Any]) -> None:
    """Before any work: whether what was asked for fits a cache."""
    if arguments.get("use_cache") is False:
        raise ConfigurationError(
            "use_cache=False was given together with a cache: generate would pass the whole text again at every step, "
            "and the cache would hold all of it each time. Leave it out, also in generation_config.json and the "
            "model's generation_config; or generate without past_key_values."
        )
    count, new = _count(arguments), cache.new_tokens
    cache.new_tokens = None
    if new is not None and count is not None and count > new:
        raise ContinuationError(
            f"{new} of the tokens are new, and transformers passes {count} to the model: this way of decoding takes "
            "the whole text again. Call cache.reset() first, or decode without an assistant."
        )


def _check_same_cache(cache: KVCache, output: Any) -> None:
    """Whether the model hands out the cache that it was given."""
    for name in ("past_key_values", "cache_params"):
        other = output.get(name) if isinstance(output, dict) else None
        if other is not None and other is not cache:
            raise CacheNotFilledError(
                f"The model was given a KVCache and returned a {type(other).__name__} as {name}: what it computed is "
                "not in the cache. The pass was undone. Does something replace past_key_values on the way?"
            )


_generating = threading.local()
"""`cache`: the one that `generate` was called with in this thread, while no forward pass has used it."""


def _generate(generate: Call, *args: Any, **kwargs: Any) -> Any:
    """Around `generate`, which is where whole texts are passed."""
    cache = next((value for value in kwargs.values() if isinstance(value, KVCache)), None)
    if cache is None:
        return generate(*args, **kwargs)
    cache.check_usable()
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    embeddings, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    if isinstance(embeddings, Tensor):
        new = check_continues(cache, embeddings.shape[1], None, mask)
    elif isinstance(ids, Tensor) and ids.dim() == 2:
        new = check_continues(cache, ids.shape[1], ids, mask)
    else:
        new = None
    assisted = kwargs.get("assistant_model") is not None or _early_exit(kwargs)
    before = getattr(_generating, "cache", None)
    passes, _generating.cache = cache.passes, None if assisted else cache
    cache.new_tokens = new if cache.get_seq_length() else None
    try:
        output = generate(*args, **kwargs)
    finally:
        _generating.cache, cache.new_tokens = before, None
    if cache.passes == passes:
        _generating.cache = cache
        _check_not_replaced()
    return output


def _early_exit(kwargs: dict[str, Any]) -> bool:
    """Whether the model is its own assistant, with a cache of its own."""
    name = "assistant_early_exit"
    return bool(kwargs.get(name) or getattr(kwargs.get("generation_config"), name, None))


def _check_not_replaced() -> None:
    cache = getattr(_generating, "cache", None)
    if cache is not None:
        _generating.cache = None
        raise CacheNotFilledError(
            "generate was given a KVCache, and the model another cache, or none: nothing would be in ollm's. Prefix "
            "tuning does so, and prepare_inputs_for_generation may."
        )


def check_continues(cache: KVCache, tokens: int, ids: Tensor | None, mask: Tensor | None) -> int:
    """How many tokens of a text are new to a cache.

    Args:
        cache: it may be empty.
        tokens: of the text.
        ids: `[rows, tokens]`, if known.
        mask: for as many tokens, or for those in the cache as well; then the ids are new ones only.

    Raises:
        ContinuationError: the text is another one than the cache holds, or has nothing new.
    """
    held = cache.get_seq_length()
    for_tokens = mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else tokens
    if for_tokens != tokens:
        if for_tokens != held + tokens:
            raise ContinuationError(
                f"attention_mask is for {for_tokens} tokens; the cache holds {held}, and {tokens} were passed. Pass "
                f"the whole text and a mask for all of it; or new tokens only, and a mask for {held + tokens}."
            )
        return tokens
    difference = None if ids is None or not held else cache.first_difference(ids)
    if difference is not None:
        position, row = difference
        cure = "call cache.reset()"
        if position:  # else nothing is worth keeping
            cure += f", or cache.crop({position - held}) to keep the {position} tokens that are the same"
        raise ContinuationError(
            f"The text is not the one that the cache holds: token {position} of row {row} is another. Pass the old "
            f"ids, unchanged, and the new ones behind them. For another text, {cure}. To append ids without the old "
            f"ones, pass an attention_mask for all {held + tokens} tokens."
        )
    if tokens <= held:
        raise ContinuationError(
            f"Nothing is new: the cache holds {held} tokens, and all {tokens} of the text are among them. The model "
            f"needs one to go on from: call cache.crop({tokens - 1 - held}), and the last one is computed again."
        )
    return tokens - held
