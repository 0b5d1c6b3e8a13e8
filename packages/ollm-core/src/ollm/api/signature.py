"""Gives a function the arguments of a request, so that no list of them is copied: its signature for people, for
`inspect` and for type checkers, and its documentation, come from `CacheRequest`."""

# Without `from __future__ import annotations`: the signature shows types, not text.

import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import attrs

from ollm.kv.state import PrefillProgress
from ollm.plan import CacheRequest
from ollm.seam.cache import KVCache

P = ParamSpec("P")
Subject = TypeVar("Subject")

Progress = Callable[[PrefillProgress], None]
Maker = Callable[[Subject, CacheRequest, Progress | None], KVCache]


@attrs.frozen
class CacheArguments(CacheRequest):
    """All that `disk_cache` takes beside a model: what a request holds, and a callback, which is no part of one."""

    progress: Progress | None = attrs.field(
        default=None,
        metadata={
            "help": "In block mode, called after every piece of every layer of a prefill. By default a line on stderr "
            "says how far it is, if that is a terminal and it takes more than a second."
        },
    )


def takes(
    arguments: Callable[P, CacheArguments],
) -> Callable[
    [Callable[[Subject, CacheRequest, Progress | None], KVCache]], Callable[Concatenate[Subject, P], KVCache]
]:
    """Let a function of a subject (a model, or `self`), a request and a callback be called with the subject and all
    `arguments` instead. The line `{arguments}` of its docstring becomes their descriptions.

    The function raises `ConfigurationError` for unknown names, with the known ones, and for values of a wrong type.
    """

    def decorate(make: Maker[Subject]) -> Callable[Concatenate[Subject, P], KVCache]:
        subject = next(iter(inspect.signature(make).parameters.values()))
        parameters = [subject, *inspect.signature(arguments).parameters.values()]
        signature = inspect.Signature(parameters, return_annotation=KVCache)

        @functools.wraps(make)
        def call(*args: Any, **kwargs: Any) -> KVCache:
            unknown = {name: kwargs.pop(name) for name in kwargs.keys() - signature.parameters.keys()}
            given = signature.bind(*args, **kwargs).arguments
            of, progress = given.pop(subject.name), given.pop("progress", None)
            return make(of, CacheRequest.from_arguments(**given, **unknown), progress)

        documented = cast(Any, call)
        documented.__signature__ = signature
        documented.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": KVCache}
        documented.__doc__ = _describe(make.__doc__)
        return cast("Callable[Concatenate[Subject, P], KVCache]", call)

    return decorate


def _describe(doc: str | None) -> str | None:
    if doc is None:  # python -OO
        return None
    fill = functools.partial(textwrap.fill, width=100, initial_indent=" " * 4, subsequent_indent=" " * 8)
    lines = [fill(f"{field.name}: {field.metadata['help']}") for field in attrs.fields(CacheArguments)]
    return inspect.cleandoc(doc).replace("    {arguments}", "\n".join(lines))
