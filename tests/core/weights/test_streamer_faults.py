"""What fails while layers are read or placed is a typed error, and the next forward pass works."""

from __future__ import annotations

import errno

import pytest
import torch

from core.weights.streamed_decoder import CPU, LAYERS, X, tiers
from ollm.errors import MemoryLimitError, WeightsError
from ollm.io import shim
from ollm.io.ledger import ledger
from ollm.testing.faults import FAULTS, FaultyDisk, fails
from ollm.weights import memory as weight_memory
from ollm.weights.checkpoint import SINGLE


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", range(LAYERS))
def test_an_interrupted_forward_leaves_everything_usable(streamed, truth, error, at):
    decoder, streamer = streamed
    streamer.place(tiers(1))

    def interrupt(index):
        if index == at:
            raise error

    decoder.between = interrupt
    with pytest.raises(error):
        decoder(X)
    decoder.between = lambda index: None
    assert torch.equal(decoder(X), truth(X))


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "short"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_fault_in_any_read_is_a_typed_error_and_the_next_forward_works(streamed, truth, monkeypatch, fault, at):
    decoder, streamer = streamed
    streamer.place(tiers(1))
    disk = FaultyDisk(FAULTS[fault], at, lasting=True, only=frozenset({"pread_into"}))
    monkeypatch.setattr(shim, "disk", disk)
    with pytest.raises(WeightsError, match=rf"layers\.\d.*{SINGLE}"):
        for _ in range(3):
            decoder(X)
    disk.heal()
    for _ in range(2):
        assert torch.equal(decoder(X), truth(X))


def test_short_reads_are_continued(streamed, truth, monkeypatch):
    decoder, _ = streamed
    monkeypatch.setattr(shim, "disk", FaultyDisk(FAULTS["short"], 0, lasting=True, only=frozenset({"pread_into"})))
    assert torch.equal(decoder(X), truth(X))


@pytest.mark.parametrize("at", range(4))
def test_without_unbuffered_reads_it_works_all_the_same(streamed, truth, monkeypatch, at):
    decoder, _ = streamed
    monkeypatch.setattr(shim, "disk", FaultyDisk(fails(errno.EINVAL), at, only=frozenset({"pread_into"})))
    for _ in range(2):
        assert torch.equal(decoder(X), truth(X))


def test_a_placement_that_cannot_be_read_leaves_a_model_that_works(streamed, truth, monkeypatch):
    decoder, streamer = streamed
    streamer.place(tiers(0))
    monkeypatch.setattr(shim, "disk", FaultyDisk(fails(errno.EIO), 1, lasting=True, only=frozenset({"pread_into"})))
    with pytest.raises(WeightsError):
        streamer.place(tiers(0, 1, 2, 3))
    monkeypatch.undo()
    assert streamer.tiers == tiers(0)
    assert torch.equal(decoder(X), truth(X))


def test_a_placement_that_does_not_fit_is_refused_before_anything_is_read(streamed, truth, monkeypatch):
    decoder, streamer = streamed
    streamer.place(tiers(0))
    read = streamer.counters.read_bytes
    free = ledger.measure(CPU)
    monkeypatch.setattr(
        weight_memory.ledger, "measure", lambda device: type(free)(
            device_type="cpu", host_total=1, host_free=5000, device_total=1, device_free=5000
        )
    )  # fmt: skip
    with pytest.raises(MemoryLimitError, match=r"4 resident layers.* need .* of memory on cpu, and of 4\.9 KiB free"):
        streamer.place(tiers(0, 1, 2, 3))
    monkeypatch.undo()
    assert streamer.counters.read_bytes <= read + 3 * 16384
    assert streamer.tiers == tiers(0)
    assert torch.equal(decoder(X), truth(X))
