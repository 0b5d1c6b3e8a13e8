"""What is in a safetensors file: its header, read strictly before anything else is.

A header that does not describe every byte of the file exactly once is refused. What is wrong with a single tensor is
noted, and said when that tensor is needed. Knows the format; knows nothing of models.
"""

from __future__ import annotations

import math
import reprlib
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
_MOST_DIMENSIONS = 64
"""As many as a tensor of torch may have."""

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
    damage: str = ""
    """What is wrong with it; then its dtype and shape mean nothing."""

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def check(self) -> None:
        """Check that it can be read.

        Raises:
            ModelDirectoryError: its description is wrong; names the file, the tensor and what is wrong.
        """
        if self.damage:
            raise ModelDirectoryError(
                f"Cannot read the weights in {self.file.path}: {self.damage}. The file is damaged, or of a newer "
                "format: get it again, or update ollm."
            )


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
    header = strict_json.parse(
        _read(file, 8, length), most_bytes=MOST_HEADER_BYTES, most_values=strict_json.MOST_VALUES
    )
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
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {brief(name)} is not described by dtype, shape and data_offsets")
    offsets: Any = entry.get("data_offsets")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {brief(name)} lies at {brief(offsets)}, which are not whole numbers, or not two")
    begin, end = offsets
    if begin > end:
        raise ValueError(f"tensor {brief(name)} has {end - begin} bytes")
    if data + end > file.size:
        raise ValueError(f"tensor {brief(name)} ends at byte {data + end} of {file.size}")
    nbytes = end - begin
    damage = _what_is_wrong(name, entry, nbytes)
    dtype, shape = (torch.uint8, [nbytes]) if damage else (DTYPES[entry["dtype"]], entry["shape"])
    return StoredTensor(name, file, dtype, tuple(shape), data + begin, nbytes, damage)


def _what_is_wrong(name: str, entry: dict[str, Any], nbytes: int) -> str:
    """Empty if dtype and shape are those of so many bytes."""
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        return f"tensor {brief(name)} is not described by dtype, shape and data_offsets"
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"tensor {brief(name)} has the unknown dtype {brief(dtype)}"
    if not _counts(shape) or len(shape) > _MOST_DIMENSIONS:
        return f"tensor {brief(name)} has the shape {brief(shape)}, which are not whole numbers, or too many"
    if math.prod(shape) * DTYPES[dtype].itemsize != nbytes:
        return f"tensor {brief(name)} of shape {brief(shape)} and dtype {dtype} has {nbytes} bytes"
    return ""


def brief(value: object) -> str:
    """What a file says, for a message: never long, whatever it is."""
    return _brief.repr(value)


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 200
_brief.maxlong = 40


def _check_coverage(tensors: dict[str, StoredTensor], data: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    at, before = data, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.end)):
        if tensor.offset != at:
            what = "overlap" if tensor.offset < at else "leave a hole"
            raise ValueError(f"tensors {brief(before)} and {brief(tensor.name)} {what}")
        at, before = tensor.end, tensor.name
    if at != size:
        raise ValueError(f"its tensors end at byte {at} of {size}")


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
