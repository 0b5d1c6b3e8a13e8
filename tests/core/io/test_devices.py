"""Which device a name means."""

from __future__ import annotations

import pytest
import torch

from ollm.errors import DeviceError
from ollm.io.devices import resolve_device


@pytest.mark.parametrize(("gpus", "expected"), [(0, "cpu"), (2, "cuda:0")])
def test_auto_is_a_gpu_if_there_is_one(monkeypatch, gpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert str(resolve_device("auto")) == expected


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", 7.5, None, "meta"])
def test_what_is_no_device_is_said_in_ones_own_words(name):
    with pytest.raises(DeviceError) as caught:
        resolve_device(name)
    assert "use 'auto', 'cpu' or 'cuda:0'" in str(caught.value)
    assert len(str(caught.value)) < 120, "torch lists every device that it was ever written for"
