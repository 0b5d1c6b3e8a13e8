"""The order of copies and kernels on an accelerator, with streams that only write down what they are told."""

from __future__ import annotations

import pytest
import torch

from core.io.fake_streams import FakeStreams
from core.kv.engine_fixtures import ANY, make_session, tokens
from ollm.io.device_ring import DeviceRing
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession

CPU = torch.device("cpu")


@pytest.fixture
def streams():
    return FakeStreams()


def make(streams, nbytes=64, count=3):
    return DeviceRing("Test buffers", CPU, nbytes, streams, count=count)


@pytest.mark.parametrize("count", [2, 3])
def test_a_buffer_is_filled_after_the_kernel_that_read_it_and_read_after_the_copy_that_filled_it(streams, count):
    ring = make(streams, 1024, count)
    del streams.log[:]
    waits = []
    for number in range(count + 1):
        copy = ring.copy([torch.full((4,), number)])
        assert [view.tolist() for view in copy.tensors] == [[number] * 4]
        streams.log.append(f"kernel {number}")
        copy.leave()
        waits.append(copy.wait_until_copied)
    expected = []
    for number in range(count + 1):
        # at first, for whatever used the memory before the buffer was made
        free = number + 1
        expected += [
            f"copy waits for compute {free}", "begin copy", f"record copy {number + 1}", "end copy",
            f"compute waits for copy {number + 1}", f"kernel {number}", f"record compute {count + number + 1}",
        ]  # fmt: skip
    assert streams.log == expected
    waits[1]()
    assert streams.log[-1] == "host waits for copy 2"
    ring.close()
    ring.close()


def test_as_many_copies_as_there_are_buffers_are_on_the_device_at_once(streams):
    ring = make(streams, count=3)
    copies = [ring.copy([torch.full((8,), number)]) for number in range(3)]
    assert [copy.tensors[0].tolist() for copy in copies] == [[number] * 8 for number in range(3)]
    ring.close()


def test_several_tensors_keep_their_shapes_and_dtypes_and_large_ones_get_a_larger_buffer(streams):
    ring = make(streams)
    tensors = [
        torch.randn(2, 3, 5, dtype=torch.bfloat16),
        torch.arange(7, dtype=torch.int8),
        torch.randn(1000, dtype=torch.float64),
    ]
    for ours, theirs in zip(ring.copy(tensors).tensors, tensors, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    ring.close()


def test_a_buffer_is_marked_as_read_even_if_the_kernel_failed(streams):
    ring = make(streams)
    with pytest.raises(RuntimeError), ring.copy([torch.zeros(1)]):
        raise RuntimeError
    assert streams.log[-1].startswith("record compute")
    ring.close()


def test_buffers_made_in_inference_mode_are_filled_outside_it_too(streams):
    with torch.inference_mode():
        ring = make(streams, count=1)
        ring.copy([torch.zeros(1000)]).leave()
    assert ring.copy([torch.ones(1000)]).tensors[0].tolist() == [1] * 1000
    ring.close()


def test_the_ledger_knows_what_the_buffers_are_for_and_gets_them_back(streams, claims):
    ring = make(streams, 64, 3)
    (claim,) = claims()
    assert (claim.purpose, claim.nbytes, claim.used) == ("Test buffers", 192, 192)
    ring.close()
    assert claims() == []


@pytest.mark.gpu
def test_blocks_on_an_accelerator_are_those_that_were_stored(tmp_path):
    device = torch.device("cuda:0")
    session, _ = make_session(tmp_path, layers=1)
    on_device = KVSession(session.store, session.plan, strategy="test", layers=range(1), device=device)
    layer = LayerHistory(0, on_device)
    keys, values = (tensor.to(device) for tensor in tokens(200))
    layer.append(keys, values)
    for _ in range(20):
        handle = layer.handle(keys[:, :, :1], values[:, :, :1])
        blocks = {block.start: block.keys.clone() for block in handle.blocks(ANY)}
        whole = torch.cat([blocks[start] for start in sorted(blocks)], dim=2)
        assert torch.equal(whole[:, :, :200], keys)
    on_device.close()
