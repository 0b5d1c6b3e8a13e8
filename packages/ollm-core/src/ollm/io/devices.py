"""Which devices we can serve: the CPU, and accelerators that `io` can copy to. Checked before anything is loaded."""

from __future__ import annotations

import torch

from ollm.errors import DeviceError


def resolve_device(name: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Raises:
        DeviceError: for names that torch does not know, for devices that are not there, and for those of a kind that
            `io.streams` cannot copy to.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"device={name!r} is no torch device ({error}): use 'cpu' or 'cuda:0'.") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if is_accelerator(device):
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise DeviceError(f"device={name!r}: this machine has {count} CUDA devices. Use device='cpu'.")
        return torch.device("cuda", device.index or 0)
    raise DeviceError(
        f"device={str(device)!r}: models on devices of this kind are not supported: use 'cpu' or 'cuda:0'."
    )


def is_accelerator(device: torch.device) -> bool:
    """Whether a device has memory of its own, to which bytes are copied on a stream of its own."""
    return device.type == "cuda"
