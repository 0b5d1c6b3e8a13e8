"""Safetensors files written byte by byte, so that what reads them is compared with something independent."""

from __future__ import annotations

import json
import math

import torch

from ollm.io.buffers import tensor_bytes

NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16",
    torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write_shard(path, tensors, *, pad=None, change=lambda header: None):
    """Write tensors in their order; `pad` makes the header that much longer, so that the data lie anywhere."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 if pad is None else pad)
    data = b"".join(bytes(tensor_bytes(tensor.contiguous())) for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def random_tensor(*shape, dtype=torch.float32, seed=0):
    """Finite values of any dtype."""
    values = torch.randint(0, 100, (math.prod(shape),), generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).view(shape)
