"""Headers and indexes of checkpoints: what is right is found, what is wrong in any way is refused before reading."""

from __future__ import annotations

import json
import os

import pytest
import torch

from core.weights.weight_files import NAMES, random_tensor, write_shard
from ollm.errors import ModelDirectoryError, WeightsError
from ollm.weights import checkpoint
from ollm.weights.checkpoint import INDEX, SINGLE, Checkpoint
from ollm.weights.layout import Parameter, Source, WeightLayout
from ollm.weights.memory import read_apart
from ollm.weights.shards import DTYPES, read_shard


def values_of(stored):
    """What ollm reads of one tensor."""
    parameter = Parameter(stored.name, stored.dtype, stored.shape, (Source(stored),))
    ((_, tensor),) = read_apart([parameter], torch.device("cpu"))
    return tensor


def test_every_dtype_is_read_as_it_was_written(tmp_path):
    tensors = {str(dtype): random_tensor(3, 5, dtype=dtype, seed=seed) for seed, dtype in enumerate(NAMES)}
    tensors["empty"] = torch.empty(0, 4)
    tensors["scalar"] = torch.tensor(7.0)
    found = read_shard(write_shard(tmp_path / SINGLE, tensors))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        ours = values_of(found[name])
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours.view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else ours == tensor


def test_the_dtypes_are_those_of_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({name: torch.zeros(2).to(dtype) for name, dtype in DTYPES.items()}, tmp_path / SINGLE)
    assert {name: stored.dtype for name, stored in read_shard(tmp_path / SINGLE).items()} == DTYPES


@pytest.mark.parametrize("pad", range(5))
def test_data_may_begin_anywhere(tmp_path, pad):
    tensors = {"a": random_tensor(1, dtype=torch.bool), "b": random_tensor(700, 3), "c": random_tensor(9, seed=2)}
    found = read_shard(write_shard(tmp_path / SINGLE, tensors, pad=pad))
    assert all(torch.equal(values_of(found[name]), tensor) for name, tensor in tensors.items())


def entry(**changes):
    return lambda header: header["b"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry(dtype="F7"), "'b' has the unknown dtype 'F7'"),
        (entry(dtype=["F32"]), "'b' has the unknown dtype"),
        (entry(shape=[2, -3]), r"'b' has the shape \[2, -3\]"),
        (entry(shape=[True, 6]), "not whole numbers"),
        (entry(shape="6"), "not whole numbers"),
        (entry(shape=[7]), "'b' of shape .* has 24 bytes"),
        (entry(shape=[2**40, 2**40]), "'b' of shape .* has 24 bytes"),
        (entry(shape=[2**40] * 80_000), "'b' has the shape .*too many"),
        (entry(shape=[10**4000]), "'b' of shape .* has 24 bytes"),
        (entry(dtype="F" * 10**6), "'b' has the unknown dtype"),
        (lambda header: header.update({"c" * 10**6: {**header["b"], "data_offsets": [48, 999]}}), "'ccc.*ends at byte"),
        (entry(data_offsets=[24]), "not whole numbers"),
        (entry(data_offsets=[16, 40]), "'a' and 'b' overlap"),
        (entry(data_offsets=[48, 24]), "has -24 bytes"),
        (entry(data_offsets=[0, 24]), "overlap"),
        (entry(data_offsets=[32, 56]), "'b' ends at byte"),
        (entry(data_offsets=[2**60, 2**60 + 24]), "'b' ends at byte"),
        (entry(more=1), "is not described by dtype, shape and data_offsets"),
        (lambda header: header["b"].pop("dtype"), "is not described by"),
        (lambda header: header.update(b=[]), "is not described by"),
        (lambda header: header.pop("b"), "end at byte"),
        (lambda header: header.pop("a"), "leave a hole"),
    ],
)
def test_a_wrong_header_is_refused_with_file_and_tensor(tmp_path, change, message):
    path = write_shard(tmp_path / SINGLE, {"a": random_tensor(6), "b": random_tensor(6)}, change=change)
    with pytest.raises(ModelDirectoryError, match=rf"{SINGLE}.*{message}") as caught:
        for tensor in read_shard(path).values():
            tensor.check()
    assert len(str(caught.value)) < 1000


def headed(text, length=None):
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes only"),
        (b"\x10\x00", "it has 2 bytes only"),
        (headed(b"{}", 2**63), "header would be 9223372036854775808 bytes long"),
        (headed(b"{}", 100_000_001), "header would be"),
        (headed(b"{}", 0), "header would be 0"),
        (headed(b"{}", 3), "does not fit into 10 bytes"),
        (headed(b"{}  x"), "Extra data"),
        (headed(b"[]"), "not a JSON object"),
        (headed(b'{"a": NaN}'), "NaN is no JSON"),
        (headed(b'{"a": 1, "a": 1}'), "a name occurs twice"),
        (headed(b"\xff\xfe"), "Cannot read"),
        (headed(b"[" * 100_000), "Cannot read"),
        (headed(b"[" + b"[]," * 3_000_000 + b"[]]"), "more than 4000000 values"),
        (headed(b"{}") + b"x", "end at byte 10 of 11"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content, message):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ModelDirectoryError, match=message):
        read_shard(tmp_path / SINGLE)


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index."""
    write_shard(tmp_path / "one.safetensors", {"a": random_tensor(6)})
    write_shard(tmp_path / "two.safetensors", {"b": random_tensor(4, 2, seed=1)})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def test_an_index_says_where_tensors_are(sharded):
    found = Checkpoint.open(sharded)
    assert {name: stored.file.path.name for name, stored in found.tensors.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


def test_a_damaged_tensor_is_refused_only_where_it_is_needed(tmp_path):
    path = write_shard(tmp_path / SINGLE, {"a": random_tensor(6), "b": random_tensor(6)}, change=entry(dtype="F7"))
    found = Checkpoint.open(tmp_path).tensors
    assert torch.equal(values_of(found["a"]), random_tensor(6))
    with pytest.raises(ModelDirectoryError, match=rf"{path.name}.*'b' has the unknown dtype 'F7'"):
        found["b"].check()


def test_what_is_in_the_files_counts_and_not_what_the_index_says(sharded):
    """As for transformers: an index may name what is nowhere, or name the wrong file, or leave something out."""
    index = {"weight_map": {"a": "two.safetensors", "nowhere": "one.safetensors"}}
    (sharded / INDEX).write_text(json.dumps(index))
    assert set(Checkpoint.open(sharded).tensors) == {"a", "b"}


def test_of_two_tensors_of_one_name_that_of_the_last_file_counts(sharded):
    write_shard(sharded / "two.safetensors", {"a": random_tensor(6, seed=4), "b": random_tensor(4, 2, seed=1)})
    assert torch.equal(values_of(Checkpoint.open(sharded).tensors["a"]), random_tensor(6, seed=4))


def test_one_file_counts_before_an_index(sharded):
    write_shard(sharded / SINGLE, {"a": random_tensor(6, seed=7)})
    found = Checkpoint.open(sharded).tensors
    assert set(found) == {"a"}
    assert torch.equal(values_of(found["a"]), random_tensor(6, seed=7))


@pytest.mark.parametrize("chosen", ["parts/three.safetensors", "parts/other.safetensors.index.json"])
def test_what_the_config_names_counts_before_all_else(sharded, chosen):
    write_shard(sharded / SINGLE, {"a": random_tensor(6, seed=7)})
    (sharded / "parts").mkdir()
    write_shard(sharded / "parts" / "three.safetensors", {"c": random_tensor(3)})
    index = {"weight_map": {"c": "parts/three.safetensors"}}
    (sharded / "parts" / "other.safetensors.index.json").write_text(json.dumps(index))
    assert set(Checkpoint.open(sharded, chosen).tensors) == {"c"}


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "x/../../y.safetensors", "x.bin", "\0.safetensors"]
)
def test_files_elsewhere_and_of_other_kinds_are_refused(sharded, name):
    with pytest.raises(ModelDirectoryError, match="not a safetensors file beside it"):
        Checkpoint.open(sharded, name)
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelDirectoryError, match="not a safetensors file beside it"):
        Checkpoint.open(sharded)


def test_a_distributed_checkpoint_beside_the_weights_is_refused_and_both_are_named(sharded):
    """transformers would take it, and none of the others."""
    write_shard(sharded / "shard-00001-model-00001-of-00001.safetensors", {"a": random_tensor(6)})
    with pytest.raises(ModelDirectoryError, match=rf"shard-00001-model-00001-of-00001\.safetensors.*{SINGLE}, {INDEX}"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("text", ['{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "[]", "{", "{}"])
def test_a_wrong_index_is_refused(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(ModelDirectoryError, match=INDEX.replace(".", r"\.")):
        Checkpoint.open(sharded)


def test_an_index_that_is_too_large_is_refused_without_reading_it_all(sharded, monkeypatch):
    monkeypatch.setattr(checkpoint, "MOST_INDEX_BYTES", 50)
    with pytest.raises(ModelDirectoryError, match=r"index\.json: larger than 50 bytes"):
        Checkpoint.open(sharded)


def test_links_of_a_hub_cache_are_followed(tmp_path):
    write_shard(tmp_path / "blob", {"a": random_tensor(6)})
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / SINGLE).symlink_to("../blob")
    assert torch.equal(values_of(Checkpoint.open(tmp_path / "snapshot").tensors["a"]), random_tensor(6))


def test_what_is_no_plain_file_is_refused(tmp_path):
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(ModelDirectoryError, match=r"no plain file|Cannot open"):
        read_shard(tmp_path / SINGLE)


def replace(path):
    write_shard(path.with_name("new"), {"a": random_tensor(6, seed=9)})
    path.with_name("new").replace(path)


def touch(path):
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def overwrite(path):
    """In place, and the time set back, as `rsync --inplace --times` does."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def grow(path):
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize("change", [replace, touch, overwrite, grow, os.unlink])
def test_a_file_that_was_changed_is_noticed(sharded, change):
    found = Checkpoint.open(sharded)
    found.check_identity()
    change(sharded / "one.safetensors")
    with pytest.raises(WeightsError, match=r"one\.safetensors.*(load it again|load the model again)"):
        found.check_identity()


def test_a_layout_refuses_nothing_that_is_empty(tmp_path):
    found = read_shard(write_shard(tmp_path / SINGLE, {"none": torch.empty(0, 3), "some": random_tensor(3)}))
    layout = WeightLayout([Parameter(s.name, s.dtype, s.shape, (Source(s),)) for s in found.values()])
    assert [view.shape for view in layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8))] == [(0, 3), (3,)]
