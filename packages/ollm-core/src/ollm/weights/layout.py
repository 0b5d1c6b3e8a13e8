"""`WeightLayout`: how the weights of one decoder layer lie in a buffer, and which reads bring them there.

Tensors that are neighbours in a file are read together, straight into the buffer, and used where they lie. What has to
be another dtype, is put together from several tensors, or lies at a place that its dtype cannot be used at, goes
through a small buffer of the reading thread. Knows bytes, dtypes and places; not modules, not when to read.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor

from ollm.io.buffers import ALIGNMENT, aligned_buffer, tensor_bytes
from ollm.weights.files import WeightFile
from ollm.weights.shards import StoredTensor

TURN_BYTES = 4 * 2**20
"""The most that a worker reads before others have their turn; a multiple of `ALIGNMENT`."""


@attrs.frozen
class Source:
    """A stored tensor as a part of a parameter."""

    stored: StoredTensor
    at: int = 0
    """The element of the parameter, counted flat, that its first element is."""


@attrs.frozen(eq=False)
class Parameter:
    """What a parameter of the model is made of. The sources cover it exactly."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    sources: tuple[Source, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def lies_ready(self) -> bool:
        """Whether the bytes in the file can be used as they are."""
        stored = self.sources[0].stored
        return len(self.sources) == 1 and stored.dtype == self.dtype and stored.offset % self.dtype.itemsize == 0


@attrs.frozen(eq=False)
class Read(ABC):
    """One turn of a worker: bytes of one file."""

    file: WeightFile
    tensors: tuple[StoredTensor, ...]
    """Which ones it reads from, for messages."""
    offset: int
    """In the file, aligned."""
    length: int
    """Aligned."""
    needed: int

    @abstractmethod
    def into(self, buffer: Tensor) -> None:
        """Fill the part of a layer's buffer that this read is for.

        Raises:
            EOFError, OSError: as `WeightFile.read`.
        """

    def __str__(self) -> str:
        names = [tensor.name for tensor in self.tensors if self._touches(tensor)]
        shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        return f"{shown} (bytes {self.offset} to {self.offset + self.needed}) from {self.file.path}"

    def _touches(self, tensor: StoredTensor) -> bool:
        return tensor.offset < self.offset + self.needed and tensor.end > self.offset


@attrs.frozen(eq=False)
class DirectRead(Read):
    """Bytes that are used as they are."""

    place: int
    """Byte of the layer's buffer, aligned."""

    def into(self, buffer: Tensor) -> None:
        part = buffer[self.place : self.place + self.length]
        self.file.read(tensor_bytes(part), self.offset, self.needed)


@attrs.frozen(eq=False)
class ConvertingRead(Read):
    """Elements `first … first + count - 1` of a stored tensor, put into a parameter at `place`, in its dtype."""

    stored: StoredTensor
    first: int
    count: int
    dtype: torch.dtype
    place: int
    """Byte of the layer's buffer where they go."""

    def into(self, buffer: Tensor) -> None:
        bounce = _bounce_buffer()[: self.length]
        self.file.read(tensor_bytes(bounce), self.offset, self.needed)
        size = self.stored.dtype.itemsize
        skip = self.stored.offset + self.first * size - self.offset
        raw = bounce[skip : skip + self.count * size]
        target = buffer[self.place : self.place + self.count * self.dtype.itemsize]
        if self.dtype == self.stored.dtype:
            target.copy_(raw)
        else:
            elements = raw if skip % size == 0 else raw.clone()
            target.view(self.dtype).copy_(elements.view(self.stored.dtype))


class WeightLayout:
    """Where the parameters of one layer lie in a buffer of `nbytes`."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = tuple(parameters)
        self.reads: list[Read] = []
        self._places: dict[int, int] = {}  # by number of the parameter
        self.nbytes = 0
        numbered = list(enumerate(self.parameters))
        for run in _runs([(number, parameter) for number, parameter in numbered if parameter.lies_ready]):
            self._add_run(run)
        for number, parameter in numbered:
            if not parameter.lies_ready:
                self._add_converted(number, parameter)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters; `nbytes` is a little more, for alignment."""
        return sum(parameter.nbytes for parameter in self.parameters)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the layer's tensors in the files."""
        return sum(source.stored.nbytes for parameter in self.parameters for source in parameter.sources)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The parameters, in order, as views of a buffer that holds the layer."""
        return [
            buffer[place : place + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
            for parameter, place in ((parameter, self._places[n]) for n, parameter in enumerate(self.parameters))
        ]

    def _add_run(self, run: list[tuple[int, StoredTensor]]) -> None:
        tensors = tuple(tensor for _, tensor in run)
        start, end = _floor(tensors[0].offset), max(tensor.end for tensor in tensors)
        base = self.nbytes
        for number, tensor in run:
            self._places[number] = base + tensor.offset - start
        for offset in range(start, end, TURN_BYTES):
            length = min(_ceil(end) - offset, TURN_BYTES)
            needed = min(end - offset, length)
            self.reads.append(DirectRead(tensors[0].file, tensors, offset, length, needed, base + offset - start))
        self.nbytes += _ceil(end) - start

    def _add_converted(self, number: int, parameter: Parameter) -> None:
        self._places[number] = self.nbytes
        for source in parameter.sources:
            stored, size = source.stored, source.stored.dtype.itemsize
            most = TURN_BYTES // size
            total = math.prod(stored.shape)
            for first in range(0, total, most):
                count = min(most, total - first)
                begin, end = stored.offset + first * size, stored.offset + (first + count) * size
                place = self.nbytes + (source.at + first) * parameter.dtype.itemsize
                self.reads.append(
                    ConvertingRead(
                        stored.file,
                        (stored,),
                        _floor(begin),
                        _ceil(end) - _floor(begin),
                        end - _floor(begin),
                        stored,
                        first,
                        count,
                        parameter.dtype,
                        place,
                    )
                )
        self.nbytes += _ceil(parameter.nbytes)


def _runs(ready: Sequence[tuple[int, Parameter]]) -> Iterator[list[tuple[int, StoredTensor]]]:
    """Tensors that follow each other in a file, at most a sector of 4 KiB apart."""
    tensors = [(number, parameter.sources[0].stored) for number, parameter in ready]
    run: list[tuple[int, StoredTensor]] = []
    for number, tensor in sorted(tensors, key=lambda item: (str(item[1].file.path), item[1].offset)):
        if run and (run[-1][1].file is not tensor.file or tensor.offset > _ceil(run[-1][1].end)):
            yield run
            run = []
        run.append((number, tensor))
    if run:
        yield run


def _floor(offset: int) -> int:
    return offset // ALIGNMENT * ALIGNMENT


def _ceil(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


_local = threading.local()


def _bounce_buffer() -> Tensor:
    """This thread's own: the bytes of one turn, with what alignment adds."""
    if not hasattr(_local, "buffer"):
        _local.buffer = aligned_buffer(TURN_BYTES + 2 * ALIGNMENT)
    buffer: Tensor = _local.buffer
    return buffer
