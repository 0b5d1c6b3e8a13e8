"""Which device a name means, checked before anything is loaded."""

from __future__ import annotations

import torch

from ollm.errors import DeviceError


def resolve_device(name: str | torch.device) -> torch.device:
    """The device, if this machine has it. `auto` is the first CUDA device, or the CPU where there is none.

    Raises:
        DeviceError: for names that torch does not know, and for devices that are not there.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):  # torch lists all that it was ever written for
        raise DeviceError(f"device={name!r} is no device: use 'auto', 'cpu' or 'cuda:0'.") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise DeviceError(f"device={name!r}: this machine has {count} CUDA devices. Use device='auto' or 'cpu'.")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and torch.backends.mps.is_available():
        return device
    raise DeviceError(f"device={name!r} is not there, or not supported: use 'auto', 'cpu' or 'cuda:0'.")
