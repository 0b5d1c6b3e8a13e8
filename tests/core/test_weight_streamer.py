"""Layers of a fake model get their weights when they are entered, whatever happens on the way."""

from __future__ import annotations

import errno
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from core.fake_streams import FakeStreams
from core.faults import FAULTS, FaultyDisk, fails
from core.weight_files import write_shard
from ollm.errors import MemoryLimitError, WeightsError
from ollm.io.scheduler import _schedulers
from ollm.memory import ledger
from ollm.storage import shim
from ollm.weights import memory as weight_memory
from ollm.weights.binding import LayerWeights
from ollm.weights.checkpoint import SINGLE, Checkpoint
from ollm.weights.layout import Parameter, Source
from ollm.weights.lift import Lift
from ollm.weights.streamer import Tier, WeightStreamer

CPU = torch.device("cpu")
LAYERS, SIZE = 6, 40
X = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1))


class Decoder(nn.Module):
    """Layers one after the other; `between` is called before each."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(LAYERS))
        self.between = lambda index: None

    def forward(self, x, only=range(LAYERS)):
        for index in only:
            self.between(index)
            x = self.layers[index](x).tanh()
        return x


@pytest.fixture
def truth():
    torch.manual_seed(0)
    return Decoder().requires_grad_(False)


@pytest.fixture
def streamed(tmp_path, truth):
    """A decoder without weights, and its streamer."""
    write_shard(tmp_path / SINGLE, truth.state_dict())
    decoder = Decoder()
    checkpoint = Checkpoint.open(tmp_path)
    layers = []
    for index, layer in enumerate(decoder.layers):
        stored = [checkpoint.tensors[f"layers.{index}.{name}"] for name in ("weight", "bias")]
        parameters = tuple(Parameter(one.name, one.dtype, one.shape, (Source(one),)) for one in stored)
        layers.append(LayerWeights(layer, parameters, (((layer, "weight"),), ((layer, "bias"),))))
    streamer = WeightStreamer(decoder, layers, checkpoint, CPU, tmp_path)
    yield decoder, streamer
    streamer.remove()


def tiers(*resident):
    return [Tier.DEVICE if index in resident else Tier.DISK for index in range(LAYERS)]


PLACEMENTS = [(), (0,), (5,), (0, 1, 2), (1, 3, 5), (0, 1, 2, 3, 4), tuple(range(LAYERS))]


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("resident", PLACEMENTS)
def test_every_placement_gives_the_same_outputs(streamed, truth, resident, inference):
    decoder, streamer = streamed
    with torch.inference_mode() if inference else torch.no_grad():
        streamer.place(tiers(*resident))
        for _ in range(3):
            assert torch.equal(decoder(X), truth(X))
    assert streamer.counters.layers_entered == 3 * LAYERS
    assert streamer.counters.layers_streamed == 3 * (LAYERS - len(resident))


def test_a_placement_is_changed_at_any_time(streamed, truth):
    decoder, streamer = streamed
    for resident in [*PLACEMENTS, *reversed(PLACEMENTS)]:
        streamer.place(tiers(*resident))
        assert streamer.tiers == tiers(*resident)
        assert torch.equal(decoder(X), truth(X))
    assert sum(claim.nbytes for claim in ledger._claims if claim.purpose == "Resident weights") == 0


def test_layers_that_are_not_entered_have_no_weights(streamed):
    decoder, streamer = streamed
    streamer.place(tiers(2))
    decoder(X)
    assert [layer.weight.is_meta for layer in decoder.layers] == [True, True, False, True, True, True]
    with pytest.raises((RuntimeError, NotImplementedError)):
        decoder.layers[0].weight.tolist()


def test_layers_may_be_skipped_repeated_and_left_early(streamed, truth):
    decoder, streamer = streamed
    streamer.place(tiers(4))
    for only in [(0, 1), (3,), (5, 0), (0, 0, 0), (2, 4, 2), range(LAYERS), (1,), range(LAYERS)]:
        assert torch.equal(decoder(X, only), truth(X, only))


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
    with pytest.raises(MemoryLimitError, match=r"4 resident layers.* need .* of memory on cpu, of which 4\.9 KiB are"):
        streamer.place(tiers(0, 1, 2, 3))
    monkeypatch.undo()
    assert streamer.counters.read_bytes <= read + 3 * 16384
    assert streamer.tiers == tiers(0)
    assert torch.equal(decoder(X), truth(X))


def test_two_threads_take_turns(streamed, truth):
    decoder, streamer = streamed
    streamer.place(tiers(3))
    inside, most, wrong = [], [], []
    expected = truth(X)

    def between(index):
        inside.append(threading.get_ident())
        most.append(len(set(inside)))
        if index == LAYERS - 1:
            inside.clear()

    decoder.between = between

    @torch.no_grad()  # is each thread's own
    def run():
        for _ in range(10):
            if not torch.equal(decoder(X), expected):
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert max(most) == 1


def test_gradients_are_refused_unless_all_weights_stay(streamed, truth):
    decoder, streamer = streamed
    with torch.enable_grad(), pytest.raises(WeightsError, match=r"no_grad"):
        decoder(X)
    streamer.place(tiers(*range(LAYERS)))
    with torch.enable_grad():
        decoder(X).sum().backward()
        truth.requires_grad_(True)(X).sum().backward()
    assert torch.equal(decoder.layers[0].weight.grad, truth.layers[0].weight.grad)
    for layer in decoder.layers:
        layer.requires_grad_(False)
    streamer.place(tiers())
    with torch.enable_grad():
        assert not decoder(X).requires_grad


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_nothing_grows_over_many_forwards(streamed):
    decoder, streamer = streamed
    streamer.place(tiers(2))

    def census():
        gc.collect()
        return len(gc.get_objects()), sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for _ in range(10):
        decoder(X)
    before = census()
    for _ in range(200):
        decoder(X)
    after = census()
    assert after[1] == before[1]
    assert after[0] - before[0] < 100


def test_removing_gives_the_model_and_all_memory_back(streamed):
    decoder, streamer = streamed
    claims = list(ledger._claims)
    streamer.place(tiers(1))
    decoder(X)
    streamer.remove()
    streamer.remove()
    assert "forward" not in vars(decoder)
    assert not any(layer._forward_pre_hooks for layer in decoder.layers)
    assert ledger._claims == [claim for claim in claims if claim in ledger._claims]
    assert not _schedulers


def test_a_model_that_is_dropped_gives_all_memory_back(streamed, tmp_path, truth):
    decoder, streamer = streamed
    streamer.remove()
    checkpoint = Checkpoint.open(tmp_path)
    decoder = Decoder()
    stored = checkpoint.tensors["layers.0.bias"]
    layer = decoder.layers[0]
    weights = LayerWeights(
        layer, (Parameter("bias", stored.dtype, stored.shape, (Source(stored),)),), (((layer, "bias"),),)
    )
    streamer = WeightStreamer(decoder, [weights], checkpoint, CPU, tmp_path)
    decoder.layers[0](X)
    gone, claims = weakref.ref(streamer), len(ledger._claims)
    del streamer, decoder, layer, weights
    gc.collect()
    assert gone() is None
    assert len(ledger._claims) == claims - 1
    assert not _schedulers


def test_standing_in_reads_one_layer_of_a_kind(streamed, truth):
    decoder, streamer = streamed
    streamer.place(tiers(4))
    before = streamer.counters.read_bytes
    with streamer.standing_in():
        first, again = decoder(X), decoder(X)
    one = streamer.counters.read_bytes - before
    assert one <= max(sum(read.length for read in binding.layout.reads) for binding in streamer._bindings)
    assert torch.equal(first, again)
    assert torch.equal(decoder(X), truth(X))


def test_layers_are_copied_to_a_device_after_its_kernels_and_from_a_slot_before_it_is_read_into():
    streams = FakeStreams()
    lift = Lift(CPU, 64, streams)
    del streams.log[:]
    waits = []
    for number in range(3):
        place, wait = lift.copy(torch.full((64,), number, dtype=torch.uint8))
        assert lift.buffers[place].tolist() == [number] * 64
        streams.log.append(f"kernel {number}")
        lift.leave(place)
        waits.append(wait)
    expected = []
    for number in range(3):
        expected += [
            f"copy waits for compute {number + 1}", "begin copy", f"record copy {number + 1}", "end copy",
            f"compute waits for copy {number + 1}", f"kernel {number}", f"record compute {number + 3}",
        ]  # fmt: skip
    assert streams.log == expected
    waits[1]()
    assert streams.log[-1] == "host waits for copy 2"
    lift.close()
    lift.close()
