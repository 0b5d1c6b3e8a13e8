"""Which devices we can serve: the CPU, and accelerators that `io` can copy to. Checked before anything is loaded."""

from __future__ import annotations

import torch

from ollm.errors import DeviceError


def resolve_device(name: str | torch.device) -> torch.device:
    """The device, if this machine has it. `auto` is the first CUDA device, or the CPU where there is none.

    Raises:
        DeviceError: for names that torch does not know, for devices that are not there, and for those of a kind that
            `io.streams` cannot copy to.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):  # torch lists all that it was ever written for
        raise DeviceError(f"device={name!r} is no device: use 'auto', 'cpu' or 'cuda:0'.") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if is_accelerator(device):
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise DeviceError(f"device={name!r}: this machine has {count} CUDA devices. Use device='auto' or 'cpu'.")
        return torch.device("cuda", device.index or 0)
    raise DeviceError(
        f"device={str(device)!r}: models on devices of this kind are not supported: use 'auto', 'cpu' or 'cuda:0'."
    )


def is_accelerator(device: torch.device) -> bool:
    """Whether a device has memory of its own, to which bytes are copied on a stream of its own."""
    return device.type == "cuda"
