"""Which device a name means, checked before anything is loaded."""

from __future__ import annotations

import torch

from ollm.errors import DeviceError


def resolve_device(name: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Raises:
        DeviceError: for names that torch does not know, and for devices that are not there.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"device={name!r} is no torch device ({error}): use 'cpu' or 'cuda:0'.") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise DeviceError(f"device={name!r}: this machine has {count} CUDA devices. Use device='cpu'.")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and torch.backends.mps.is_available():
        return device
    raise DeviceError(f"device={name!r} is not there, or not supported: use 'cpu' or 'cuda:0'.")
