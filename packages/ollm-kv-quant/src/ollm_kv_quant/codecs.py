"""Codecs: a tensor as small whole numbers and the scales that they must be multiplied by. Symmetric, round to nearest.

Each states its error bound. Knows tensors of keys or values `[rows, kv_heads, tokens, size]`; knows nothing of records,
layers or files.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ollm.plugin import ConfigurationError, NonFiniteError

Shape = Sequence[int]
"""Rows, heads, tokens, size."""


class Codec(ABC):
    """One representation. Holds no state."""

    name: str
    error_bound: float
    """The largest error of an element, as a fraction of the largest magnitude in what shares its scale, before rounding
    to the original dtype."""

    def check(self, size: int) -> None:  # noqa: B027
        """Whether heads of this size can be encoded.

        Raises:
            ConfigurationError: they cannot.
        """

    @abstractmethod
    def encode(self, tensor: Tensor) -> list[Tensor]:
        """Scales, then codes, each contiguous.

        Raises:
            NonFiniteError: there are NaNs or infinities, of which no scale can be made.
        """

    @abstractmethod
    def nbytes(self, shape: Shape) -> int:
        """Bytes of scales and codes of a tensor of this shape."""

    @abstractmethod
    def decode(self, raw: Tensor, out: Tensor) -> float:
        """Decode a tensor.

        Args:
            raw: what `encode` made, as uint8, on any device.
            out: where the result goes, of the original shape and dtype, on that device.

        Returns:
            What `out` must still be multiplied by.
        """


class Int8PerTensor(Codec):
    """`int8-symmetric-per-tensor`: one scale for all keys of an extent, one for all its values.

    Whole numbers up to 127 are exact in every dtype, so that on a CPU decoding is a plain conversion, and attention
    applies the scale to its few scores (measured: 10 against 4 G elements/s on two cores).
    """

    name = "int8-symmetric-per-tensor"
    error_bound = 1 / 254

    def encode(self, tensor: Tensor) -> list[Tensor]:
        scale = _scales(tensor.abs().amax().float().reshape(1), 127)
        return [scale, _rounded(tensor, scale)]

    def nbytes(self, shape: Shape) -> int:
        return 4 + math.prod(shape)

    def decode(self, raw: Tensor, out: Tensor) -> float:
        scale = _view(raw[:4], torch.float32)
        out.copy_(raw[4:].view(torch.int8).view(out.shape))
        if out.device.type == "cpu":
            return float(scale)
        out.mul_(scale)  # asking a device for a number would make it wait
        return 1.0


class Int8PerToken(Codec):
    """`int8-per-token`: a scale for each row, head and token."""

    name = "int8-per-token"
    error_bound = 1 / 254

    def encode(self, tensor: Tensor) -> list[Tensor]:
        scales = _scales(tensor.abs().amax(-1, keepdim=True).float(), 127)
        return [scales, _rounded(tensor, scales)]

    def nbytes(self, shape: Shape) -> int:
        return 4 * math.prod(shape[:3]) + math.prod(shape)

    def decode(self, raw: Tensor, out: Tensor) -> float:
        border = 4 * math.prod(out.shape[:3])
        out.copy_(raw[border:].view(torch.int8).view(out.shape))
        _multiply(out, _view(raw[:border], torch.float32).view(*out.shape[:3], 1))
        return 1.0


class Int4PerTokenGroup(Codec):
    """`int4-per-token-group`: two elements in a byte, a scale for every 32 elements of a head (fewer, if its size is no
    multiple of that). The group-wise scales are KIVI's and FlexGen's (Liu et al., 2024; Sheng et al., 2023)."""

    name = "int4-per-token-group"
    error_bound = 1 / 13
    """Half a step of a seventh, and something for scales that are rounded up to bfloat16."""
    _GROUP = 32

    def check(self, size: int) -> None:
        if size % 2:
            raise ConfigurationError(
                f"representation={self.name!r}: heads of {size} elements cannot be put into bytes in pairs. "
                f"Use {Int8PerToken.name!r}."
            )

    def encode(self, tensor: Tensor) -> list[Tensor]:
        grouped = tensor.reshape(*tensor.shape[:3], -1, self._group(tensor.shape[3]))
        scales = _scales(grouped.abs().amax(-1, keepdim=True).float() * (1 + 2**-7), 7).to(torch.bfloat16)
        codes = (_rounded(grouped, scales.float()) + 8).to(torch.uint8).view(tensor.shape)
        return [scales, codes[..., 0::2] | codes[..., 1::2] << 4]

    def nbytes(self, shape: Shape) -> int:
        return math.prod(shape) // self._group(shape[3]) * 2 + math.prod(shape) // 2

    def decode(self, raw: Tensor, out: Tensor) -> float:
        group = self._group(out.shape[3])
        border = out.numel() // group * 2
        scales = _view(raw[:border], torch.bfloat16).view(*out.shape[:3], -1, 1)
        packed = raw[border:].view(*out.shape[:3], -1)
        out[..., 0::2] = packed & 15
        out[..., 1::2] = packed >> 4
        out.sub_(8)
        _multiply(out.view(*out.shape[:3], -1, group), scales)
        return 1.0

    def _group(self, size: int) -> int:
        return math.gcd(size, self._GROUP)


def codec(name: str) -> Codec:
    """The codec of a representation."""
    return {one.name: one for one in (Int8PerTensor(), Int8PerToken(), Int4PerTokenGroup())}[name]


def _scales(largest: Tensor, steps: int) -> Tensor:
    """Scales for which the largest magnitudes become `steps`; 1 where everything is 0."""
    scales = largest / steps
    if not bool(torch.isfinite(scales).all()):
        raise NonFiniteError(
            "Keys or values are NaN or infinite and cannot be quantised: the model's numbers overflow (perhaps its "
            "dtype is too narrow), or its input is broken. A lossless cache_strategy, such as 'chunked', keeps them."
        )
    return torch.where(scales > 0, scales, torch.ones((), device=scales.device))


def _rounded(tensor: Tensor, scales: Tensor) -> Tensor:
    return (tensor / scales).round_().to(torch.int8)


def _view(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; they are copied where they do not lie as numbers of this size must."""
    return (raw if raw.storage_offset() % dtype.itemsize == 0 else raw.clone()).view(dtype)


def _multiply(out: Tensor, scales: Tensor) -> None:
    """Scales are converted to the dtype first, which is much faster. In float16 they might become 0, and a product that
    was rounded up infinite: there it is computed in fp32."""
    if out.dtype == torch.float16:
        largest = torch.finfo(torch.float16).max
        out.copy_((out * scales.float()).clamp_(-largest, largest))
    else:
        out.mul_(scales.to(out.dtype))
