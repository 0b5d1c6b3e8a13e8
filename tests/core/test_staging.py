"""The order of copies and kernels on an accelerator, with streams that only write down what they are told."""

from __future__ import annotations

import pytest
import torch

from core.fake_streams import FakeStreams
from ollm.kv.staging import SLOTS, Staging

CPU = torch.device("cpu")


@pytest.fixture
def streams():
    return FakeStreams()


def test_a_buffer_is_filled_after_the_kernel_that_read_it_and_read_after_the_copy_that_filled_it(streams):
    staging = Staging(CPU, 1024, streams)
    del streams.log[:]
    waits = []
    for number in range(SLOTS + 1):
        with staging.on_device([torch.full((4,), number)]) as ((view,), wait):
            assert view.tolist() == [number] * 4
            streams.log.append(f"kernel {number}")
            waits.append(wait)
    expected = []
    for number in range(SLOTS + 1):
        # at first, for whatever used the memory before the buffer was made
        free = number + 1
        expected += [
            f"copy waits for compute {free}", "begin copy", f"record copy {number + 1}", "end copy",
            f"compute waits for copy {number + 1}", f"kernel {number}", f"record compute {SLOTS + number + 1}",
        ]  # fmt: skip
    assert streams.log == expected
    waits[1]()
    assert streams.log[-1] == "host waits for copy 2"
    staging.close()
    staging.close()


def test_several_tensors_keep_their_shapes_and_dtypes_and_large_ones_get_a_larger_buffer(streams):
    staging = Staging(CPU, 64, streams)
    tensors = [
        torch.randn(2, 3, 5, dtype=torch.bfloat16),
        torch.arange(7, dtype=torch.int8),
        torch.randn(1000, dtype=torch.float64),
    ]
    with staging.on_device(tensors) as (views, _):
        for ours, theirs in zip(views, tensors, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    staging.close()


def test_a_slot_is_marked_as_read_even_if_the_kernel_failed(streams):
    staging = Staging(CPU, 64, streams)
    with pytest.raises(RuntimeError), staging.on_device([torch.zeros(1)]):
        raise RuntimeError
    assert streams.log[-1].startswith("record compute")
    staging.close()


@pytest.mark.gpu
def test_blocks_on_an_accelerator_are_those_that_were_stored(tmp_path):
    from core.engine_fixtures import make_session, tokens
    from ollm.kv.history import LayerHistory
    from ollm.kv.session import KVSession

    device = torch.device("cuda:0")
    session, _ = make_session(tmp_path, layers=1)
    on_device = KVSession(session.store, session.plan, strategy="test", layers=range(1), device=device)
    layer = LayerHistory(0, on_device)
    keys, values = (tensor.to(device) for tensor in tokens(200))
    layer.append(keys, values)
    for _ in range(20):
        blocks = {block.start: block.keys.clone() for block in layer.handle(keys[:, :, :1], values[:, :, :1]).blocks()}
        whole = torch.cat([blocks[start] for start in sorted(blocks)], dim=2)
        assert torch.equal(whole[:, :, :200], keys)
    on_device.close()
