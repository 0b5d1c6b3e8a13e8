"""How a layer lies in a slot, and what is read to bring it there, compared with the tensors that were written."""

from __future__ import annotations

import pytest
import torch

from core.weights.weight_files import random_tensor, write_shard
from ollm.io.buffers import ALIGNMENT, aligned_buffer
from ollm.weights import layout as layouts
from ollm.weights.layout import Parameter, Source, WeightLayout
from ollm.weights.shards import read_shard


def loaded(layout):
    """The parameters of a layout after all its reads."""
    buffer = aligned_buffer(layout.nbytes)
    buffer.fill_(0xEE)
    for read in layout.reads:
        read.into(buffer)
    return layout.views(buffer), buffer


def plain(found, **dtypes):
    return [
        Parameter(stored.name, dtypes.get(stored.name, stored.dtype), stored.shape, (Source(stored),))
        for stored in found.values()
    ]


@pytest.mark.parametrize("pad", [0, 1, 2, 4, 7])
def test_neighbours_are_read_together_and_used_where_they_lie(tmp_path, pad, monkeypatch):
    monkeypatch.setattr(layouts, "TURN_BYTES", 2 * ALIGNMENT)
    tensors = {f"t{number}": random_tensor(1000 + number, seed=number) for number in range(6)}
    header = len(write_shard(tmp_path / "model.safetensors", tensors, pad=0).read_bytes())
    found = read_shard(write_shard(tmp_path / "model.safetensors", tensors, pad=-header % 4 + pad))
    layout = WeightLayout(plain(found))
    views, buffer = loaded(layout)
    assert all(torch.equal(view, tensors[f"t{number}"]) for number, view in enumerate(views))
    in_place = pad % 4 == 0
    inside = {buffer.data_ptr() <= view.data_ptr() < buffer.data_ptr() + buffer.numel() for view in views}
    assert inside == {True}
    if in_place:  # every block once, in requests of at most two blocks
        assert sorted(read.offset for read in layout.reads) == list(range(0, layout.nbytes, 2 * ALIGNMENT))
        assert sum(read.length for read in layout.reads) == layout.nbytes
    assert max(read.length for read in layout.reads) <= 2 * ALIGNMENT + (0 if in_place else ALIGNMENT)


def test_what_is_far_away_in_the_file_is_not_read(tmp_path):
    tensors = {"a": random_tensor(10), "gap": random_tensor(100_000, seed=1), "b": random_tensor(10, seed=2)}
    found = read_shard(write_shard(tmp_path / "model.safetensors", tensors))
    del found["gap"]
    layout = WeightLayout(plain(found))
    (a, b), _ = loaded(layout)
    assert torch.equal(a, tensors["a"])
    assert torch.equal(b, tensors["b"])
    assert sum(read.length for read in layout.reads) <= 4 * ALIGNMENT


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float32])
def test_another_dtype_is_made_while_reading(tmp_path, monkeypatch, pad, dtype):
    monkeypatch.setattr(layouts, "TURN_BYTES", ALIGNMENT)
    tensors = {"a": torch.randn(70, 50), "b": torch.randn(3)}
    found = read_shard(write_shard(tmp_path / "model.safetensors", tensors, pad=pad))
    views, _ = loaded(WeightLayout(plain(found, a=dtype, b=dtype)))
    assert torch.equal(views[0], tensors["a"].to(dtype))
    assert torch.equal(views[1], tensors["b"].to(dtype))


def test_a_parameter_is_put_together_from_several_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "TURN_BYTES", ALIGNMENT)
    parts = {f"p{number}": torch.randn(30, 64) for number in range(4)}
    found = read_shard(write_shard(tmp_path / "model.safetensors", parts))
    order = [2, 0, 3, 1]
    sources = tuple(Source(found[f"p{number}"], place * 30 * 64) for place, number in enumerate(order))
    (view,), _ = loaded(WeightLayout([Parameter("merged", torch.float32, (4, 30, 64), sources)]))
    assert torch.equal(view, torch.stack([parts[f"p{number}"] for number in order]))


def test_a_read_that_fails_names_the_tensors_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "TURN_BYTES", ALIGNMENT)
    tensors = {name: random_tensor(2000, seed=seed) for seed, name in enumerate("abc")}
    layout = WeightLayout(plain(read_shard(write_shard(tmp_path / "model.safetensors", tensors))))
    named = [str(read) for read in layout.reads]
    assert named[0].startswith("a (bytes 0 to 4096) from ")
    assert named[2].startswith("b, c ") or named[2].startswith("a, b ") or named[2].startswith("b ")
    assert named[-1].startswith("c ")
