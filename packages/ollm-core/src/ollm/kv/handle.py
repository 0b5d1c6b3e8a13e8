"""`KVHandle`: what a layer's keys and values are in block mode. Stands where transformers expects tensors.

Only attention that walks blocks may use it; everything else that touches it gets an error that names the operation,
never a wrong number. What it refers to stays where it is until its blocks have been read.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, NoReturn

from torch import Tensor

from ollm.attention.blockwise import Block
from ollm.errors import BlockModeError
from ollm.kv.session import KVSession
from ollm.kv.source import Following
from ollm.kv.table import Entries

_OPERATORS = (
    "__getitem__", "__setitem__", "__iter__", "__len__", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__",
    "__rmul__", "__matmul__", "__rmatmul__", "__truediv__", "__neg__", "__bool__", "__float__", "__int__", "__array__",
)  # fmt: skip


class KVHandle:
    """All keys and values of one layer, the newest tokens included, as blocks in order of position."""

    def __init__(
        self, session: KVSession, layer: int, past: Entries, recent: Sequence[Block], following: Following
    ) -> None:
        """Whatever is stored now stays where it is until `blocks` has been walked, or the handle is dropped."""
        self.window, self.sinks = session.store.window, session.store.sinks
        self._session = session
        self._layer = layer
        self._past = past
        self._recent = tuple(recent)
        self._following = following
        self._reader = session.table.pin()

    def blocks(self, query: Tensor) -> Generator[Block, None, None]:
        """Every block that `query` `[rows, heads, queries, size]` attends to, those in memory between those that are
        read; the newest tokens come last."""
        session = self._session
        try:
            chosen = session.select(query, self._layer, self._visible())
            with closing(session.source.blocks(chosen, self._following)) as blocks:
                yield from blocks
            self._reader.leave()
            yield from self._recent
        except BaseException:  # nobody wants the rest, and so perhaps nothing of the next layers either
            session.source.cancel_reads()
            raise
        finally:
            self._reader.leave()

    def _visible(self) -> Entries:
        """The entries without those that have left the window: they are dropped as soon as nobody reads."""
        if self.window is None:
            return self._past
        first = self._recent[-1].start - self.window + 1  # that the oldest of the newest tokens sees
        seen = tuple(entry for entry in self._past if entry.start < self.sinks or entry.stop > first)
        return self._past if len(seen) == len(self._past) else Entries(seen)

    @property
    def tokens(self) -> int:
        """How many tokens the blocks hold together."""
        return self._recent[-1].stop

    def __getattr__(self, name: str) -> NoReturn:
        _refuse(f".{name}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse(getattr(function, "__name__", str(function)))


def _refuse(operation: str) -> NoReturn:
    raise BlockModeError(
        f"{operation}: keys and values of a block-mode cache were used as tensors, by code that does not know blocks. "
        "Was the model's attention switched after the cache was made, or the cache given to another model? "
        "Make the cache for this model, or with mode='tensor'."
    )


def _refusing(name: str) -> Callable[..., NoReturn]:
    def operator(self: KVHandle, *args: Any) -> NoReturn:
        _refuse(name)

    return operator


for _name in _OPERATORS:
    setattr(KVHandle, _name, _refusing(_name))
