"""`KVHandle`: what a layer's keys and values are in block mode. Stands where transformers expects tensors.

Only attention that walks blocks may use it; everything else that touches it gets an error that names the operation,
never a wrong number. It pins what it refers to until its blocks have been read.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, NoReturn

from ollm.attention.blockwise import Block
from ollm.errors import BlockModeError
from ollm.kv.rows import Stored

if TYPE_CHECKING:
    from ollm.kv.session import KVSession
    from ollm.kv.source import Following
    from ollm.storage.tensors import LayerLayout

_OPERATORS = (
    "__getitem__", "__setitem__", "__iter__", "__len__", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__",
    "__rmul__", "__matmul__", "__rmatmul__", "__truediv__", "__neg__", "__bool__", "__float__", "__int__", "__array__",
)  # fmt: skip


class KVHandle:
    """All keys and values of one layer, the newest tokens included, as blocks in order of position."""

    def __init__(
        self,
        session: KVSession,
        layout: LayerLayout,
        past: Sequence[Stored],
        recent: Sequence[Block],
        following: Following,
    ) -> None:
        """Pins the extents of `past` until `blocks` has been walked, or the handle is dropped."""
        self.window, self.sinks = session.store.window, session.store.sinks
        self._session = session
        self._layout = layout
        self._past = tuple(past)
        self._recent = tuple(recent)
        self._following = following
        self._pins = ExitStack()
        self._pins.enter_context(session.snapshot([part.extent for part in past]))

    def blocks(self) -> Generator[Block, None, None]:
        """Every block, those in memory between those that are read; the newest tokens come last."""
        seen = [part for part in self._past if not self._has_left_the_window(part)]
        try:
            with self._pins, closing(self._session.source.blocks(seen, self._layout, self._following)) as loaded:
                for part in loaded:
                    block = part.block
                    yield Block(
                        part.start, block.keys, block.values, part.row_map, block.key_scale, block.value_scale
                    )  # fmt: skip
                yield from self._recent
        except BaseException:  # nobody wants the rest, and so perhaps nothing of the next layers either
            self._session.source.cancel_reads()
            raise

    def _has_left_the_window(self, part: Stored) -> bool:
        """Such an extent is evicted as soon as nobody reads."""
        return self.window is not None and self.sinks <= part.start and part.stop <= self._first_seen

    @property
    def _first_seen(self) -> int:
        """The first position that the oldest of the newest tokens sees in its window."""
        return self._recent[-1].start - (self.window or 0) + 1

    @property
    def tokens(self) -> int:
        """How many tokens the blocks hold together."""
        return self._recent[-1].stop

    def __del__(self) -> None:
        self._pins.close()

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
