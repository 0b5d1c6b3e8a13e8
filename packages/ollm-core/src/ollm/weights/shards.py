"""What is in a safetensors file: its header, read strictly before anything else is.

A header that is wrong in any way, or does not describe every byte of the file exactly once, is refused. Knows the
format; knows nothing of models.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import attrs
import torch

from ollm.errors import ModelDirectoryError
from ollm.io import strict_json
from ollm.io.buffers import ALIGNMENT, aligned_buffer, tensor_bytes
from ollm.weights.files import WeightFile

MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@attrs.frozen(eq=False)
class StoredTensor:
    """Where a tensor's bytes are."""

    name: str
    file: WeightFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """From the start of the file."""
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


def read_shard(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        ModelDirectoryError: names the file, the tensor and what is wrong.
    """
    file = WeightFile(path)
    try:
        header, length = _read_header(file)
        data = 8 + length
        tensors = {name: _tensor(file, data, name, entry) for name, entry in header.items() if name != "__metadata__"}
        _check_coverage(tensors, data, file.size)
    except (EOFError, OSError, ValueError) as error:
        raise ModelDirectoryError(
            f"Cannot read the weights in {path}: {error}. The file is damaged or was cut short: get it again."
        ) from error
    return tensors


def _read_header(file: WeightFile) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(_read(file, 0, 8), "little")
    if not 2 <= length <= MOST_HEADER_BYTES:
        raise ValueError(f"its header would be {length} bytes long")
    if 8 + length > file.size:
        raise ValueError(f"its header of {length} bytes does not fit into {file.size} bytes")
    header = strict_json.parse(_read(file, 8, length), most_bytes=MOST_HEADER_BYTES)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, length


def _read(file: WeightFile, offset: int, length: int) -> bytes:
    """A few bytes from anywhere."""
    if offset + length > file.size:
        raise EOFError(f"it has {file.size} bytes only")
    start = offset // ALIGNMENT * ALIGNMENT
    buffer = tensor_bytes(aligned_buffer(offset + length - start))
    file.read(buffer, start, offset + length - start)
    return bytes(buffer[offset - start : offset - start + length])


def _tensor(file: WeightFile, data: int, name: str, entry: Any) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"tensor {name!r} has the unknown dtype {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has the shape {shape!r} at {offsets!r}, which are not whole numbers")
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise ValueError(f"tensor {name!r} of shape {shape} and dtype {entry['dtype']} has {end - begin} bytes")
    if data + end > file.size:
        raise ValueError(f"tensor {name!r} ends at byte {data + end} of {file.size}")
    return StoredTensor(name, file, dtype, tuple(shape), data + begin, nbytes)


def _check_coverage(tensors: dict[str, StoredTensor], data: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    at, before = data, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.end)):
        if tensor.offset != at:
            what = "overlap" if tensor.offset < at else "leave a hole"
            raise ValueError(f"tensors {before!r} and {tensor.name!r} {what}")
        at, before = tensor.end, tensor.name
    if at != size:
        raise ValueError(f"its tensors end at byte {at} of {size}")


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
