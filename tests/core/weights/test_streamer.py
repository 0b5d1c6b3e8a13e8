"""Layers of a fake model get their weights when they are entered, whatever happens on the way."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from core.io.fake_streams import FakeStreams
from core.weights.streamed_decoder import CPU, LAYERS, SIZE, Decoder, X, make_streamed, tiers
from core.weights.weight_files import write_shard
from ollm.errors import WeightsError
from ollm.io.buffers import aligned_buffer
from ollm.weights import memory as weight_memory
from ollm.weights.binding import LayerWeights
from ollm.weights.checkpoint import SINGLE, Checkpoint
from ollm.weights.layout import Parameter, Source
from ollm.weights.streamer import WeightStreamer

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


def test_a_placement_is_changed_at_any_time(streamed, truth, claims):
    decoder, streamer = streamed
    for resident in [*PLACEMENTS, *reversed(PLACEMENTS)]:
        streamer.place(tiers(*resident))
        assert streamer.tiers == tiers(*resident)
        assert torch.equal(decoder(X), truth(X))
    assert not [claim for claim in claims() if claim.purpose == "Resident weights" and claim.nbytes]


def test_layers_that_are_not_entered_have_no_weights(streamed, truth):
    decoder, streamer = streamed
    streamer.place(tiers(2))
    decoder(X)
    for index, layer in enumerate(decoder.layers):
        assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == ((SIZE, SIZE), torch.float32, CPU)
        if index == 2:
            assert layer.weight.tolist() == truth.layers[2].weight.tolist()
        else:
            with pytest.raises(WeightsError, match=rf"layers\.{index}\.weight and .* are on disk.*Keep all layers"):
                layer.weight.tolist()


def test_layers_may_be_skipped_repeated_and_left_early(streamed, truth):
    decoder, streamer = streamed
    streamer.place(tiers(4))
    for only in [(0, 1), (3,), (5, 0), (0, 0, 0), (2, 4, 2), range(LAYERS), (1,), range(LAYERS)]:
        assert torch.equal(decoder(X, only), truth(X, only))


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
    assert after[1] - before[1] < 20  # reads that are under way have some, too
    assert after[0] - before[0] < 100


def test_removing_gives_the_model_and_all_memory_back(claims, workers, tmp_path, truth):
    decoder, streamer = make_streamed(tmp_path, truth)
    streamer.place(tiers(1))
    decoder(X)
    assert claims()
    assert workers()
    streamer.remove()
    streamer.remove()
    assert "forward" not in vars(decoder)
    assert not any(layer._forward_pre_hooks for layer in decoder.layers)
    assert claims() == []
    assert workers() == []


def test_a_model_that_is_dropped_gives_all_memory_back(claims, workers, tmp_path, truth):
    write_shard(tmp_path / SINGLE, truth.state_dict())
    checkpoint = Checkpoint.open(tmp_path)
    decoder = Decoder()
    stored = checkpoint.tensors["layers.0.bias"]
    layer = decoder.layers[0]
    weights = LayerWeights(
        layer, (Parameter("bias", stored.dtype, stored.shape, (Source(stored),)),), (((layer, "bias"),),)
    )
    streamer = WeightStreamer(decoder, [weights], checkpoint, CPU, tmp_path)
    decoder.layers[0](X)
    gone = weakref.ref(streamer)
    assert claims()
    assert workers()
    del streamer, decoder, layer, weights
    gc.collect()
    assert gone() is None
    assert claims() == []
    assert workers() == []


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


def test_streamed_layers_go_through_device_buffers(streamed, truth, monkeypatch):
    """The way of a CUDA model, with streams that do nothing and a device that is the host."""
    decoder, streamer = streamed
    monkeypatch.setattr(weight_memory.WeightMemory, "on_accelerator", True)
    monkeypatch.setattr(weight_memory, "CudaStreams", lambda device: FakeStreams())
    monkeypatch.setattr(weight_memory, "aligned_buffer", lambda nbytes, pinned: aligned_buffer(nbytes))
    streamer.place(tiers(1, 4))
    for _ in range(4):
        assert torch.equal(decoder(X), truth(X))
    with streamer.standing_in():
        decoder(X)
    assert torch.equal(decoder(X), truth(X))
    log = streamer._memory.device_ring._streams.log
    assert "host waits for copy 1" in log  # the reading thread, before it used the slot again
    streamer.place(tiers(*range(LAYERS)))
    assert torch.equal(decoder(X), truth(X))
