"""What can go wrong with a model on disk while it is loaded or runs: a typed error, and then it works again."""

from __future__ import annotations

import errno
import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from ollm import AutoInference
from ollm.api.placement import Placer
from ollm.contracts.spill import MemorySnapshot
from ollm.errors import ConfigurationError, DeviceError, MemoryLimitError, ModelDirectoryError, WeightsError
from ollm.io import shim
from ollm.io.ledger import MemoryLedger
from ollm.testing.faults import FaultyDisk, fails
from ollm.weights.absent import AbsentWeight
from together.comparison import tokens
from together.streamed_models import load, longer, save_checkpoint, stock

IDS = tokens(1, 20)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("llama"), longer("llama"), max_shard_size="150KB")


@pytest.fixture
def folder(original, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture(scope="module")
def expected(original):
    return stock(original).generate(IDS, max_new_tokens=8, do_sample=False)


def streamed(folder, resident=2, **settings):
    o = load(folder, **settings)
    o.offload_layers_to_cpu(resident)
    return o


def generate(o, **settings):
    return o.model.generate(IDS, **{"max_new_tokens": 8, "do_sample": False, **settings})


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_a_generation_after_an_interrupted_one_is_right(original, expected, error):
    o = streamed(original)
    calls = []

    def interrupt(module, args):
        calls.append(1)
        if len(calls) == 20:
            raise error

    hook = o.model.model.layers[4].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        generate(o, max_new_tokens=100)
    hook.remove()
    assert torch.equal(generate(o), expected)


@pytest.mark.parametrize("at", range(0, 40, 7))
def test_a_read_that_fails_in_the_middle_of_a_generation(original, expected, monkeypatch, at):
    o = streamed(original)
    disk = FaultyDisk(fails(errno.EIO), at, lasting=True, only=frozenset({"pread_into"}))
    monkeypatch.setattr(shim, "disk", disk)
    with pytest.raises(WeightsError, match=r"Cannot read model\.layers\.\d.* from .*\.safetensors: .*Input/output"):
        generate(o, max_new_tokens=20)
    disk.heal()
    assert torch.equal(generate(o), expected)


def test_of_a_placement_that_cannot_be_read_the_truth_is_recorded(original, expected, monkeypatch):
    o = streamed(original)
    o.offload_layers_to_cpu(4, policy="prefix")
    read = o._streamer._memory.read
    disk = FaultyDisk(fails(errno.EIO), 0, lasting=True, only=frozenset({"pread_into"}))

    def none_comes(*args):
        monkeypatch.setattr(shim, "disk", disk)
        return read(*args)

    monkeypatch.setattr(o._streamer._memory, "read", none_comes)
    with pytest.raises(WeightsError, match="Cannot read"):
        o.offload_layers_to_cpu(4, policy="suffix")
    monkeypatch.setattr(o._streamer._memory, "read", read)
    on_disk = [isinstance(layer.mlp.up_proj.weight, AbsentWeight) for layer in o.model.model.layers]
    assert o.placement.tiers == tuple("disk" if gone else "device" for gone in on_disk) == ("disk",) * 8
    assert (o.placement.resident_bytes, o.placement.resolved_policy) == (0, "prefix")
    assert o.placement.streamed_bytes == sum(o._streamer.layer_bytes)
    disk.heal()
    assert torch.equal(generate(o), expected)
    assert o.offload_layers_to_cpu(4, policy="suffix").tiers == ("disk",) * 4 + ("device",) * 4


def test_layers_that_cannot_be_compared_stay_where_they_are(original, expected, monkeypatch):
    o = streamed(original)
    record = o.offload_layers_to_cpu(4, policy="prefix")
    generate(o)

    def cannot(index):
        raise WeightsError(f"Cannot read layer {index}")

    monkeypatch.setattr(o._streamer._memory, "read_again", cannot)
    with pytest.raises(WeightsError, match="Cannot read"):
        o.offload_layers_to_cpu(4, policy="suffix")
    assert o.placement == record
    assert torch.equal(generate(o), expected)


def test_reads_that_fail_while_loading(folder, monkeypatch):
    for at in range(12):
        disk = FaultyDisk(fails(errno.EIO), at, only=frozenset({"open", "pread_into", "fstat"}))
        monkeypatch.setattr(shim, "disk", disk)
        with pytest.raises(ModelDirectoryError, match=r"\.safetensors"):
            load(folder)
        monkeypatch.undo()


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def shard_of_a_layer(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"]["model.layers.5.mlp.up_proj.weight"]


def truncate(folder):
    path = shard_of_a_layer(folder)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 4097)


def replace(folder):
    path = shard_of_a_layer(folder)
    weights = {name: weight + 1 for name, weight in load_file(path).items()}
    path.unlink()
    save_file(weights, path, {"format": "pt"})


def remove(folder):
    shard_of_a_layer(folder).unlink()


@pytest.mark.parametrize("change", [truncate, replace, remove])
def test_a_file_that_changes_while_the_model_is_loaded(folder, change):
    o = streamed(folder)
    generate(o)
    change(folder)
    with pytest.raises(WeightsError, match=r"model-\d+-of-\d+\.safetensors.* while the model is loaded"):
        generate(o)


def test_a_file_that_ends_early_in_the_middle_of_a_forward(folder):
    o = streamed(folder, resident=0)
    generate(o)

    def cut(module, args):
        truncate(folder)

    o.model.model.layers[0].register_forward_pre_hook(cut)
    with pytest.raises(WeightsError):
        for _ in range(2):
            generate(o)


def swap(folder):
    one, two = shards(folder)[1:3]
    aside = one.rename(folder / "aside")
    two.rename(one)
    aside.rename(two)


def leave_out_of_its_file(folder):
    path = shard_of_a_layer(folder)
    weights = load_file(path)
    del weights["model.layers.5.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})


def drop_a_layers_weight(folder):
    leave_out_of_its_file(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.5.mlp.up_proj.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def reshape_a_layers_weight(folder):
    path = shard_of_a_layer(folder)
    weights = load_file(path)
    weights["model.layers.5.mlp.up_proj.weight"] = weights["model.layers.5.mlp.up_proj.weight"].T.contiguous()
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"Cannot read the weights in .*safetensors: tensor '.*' ends at byte"),
        (leave_out_of_its_file, r"lacks 1 of.*up_proj.*index.json says that .* is in model-.*: that file was swapped"),
        (drop_a_layers_weight, r"lacks 1 of the model's weights.*model\.layers\.5\.mlp\.up_proj\.weight"),
        (
            reshape_a_layers_weight,
            r"another shape: model\.layers\.5\.mlp\.up_proj\.weight \(\[64, 96\], not \[96, 64\]\)",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_when_it_is_loaded(folder, damage, message):
    damage(folder)
    with pytest.raises(ModelDirectoryError, match=message):
        load(folder)


def test_swapped_shards_are_read_as_transformers_reads_them(folder, expected):
    """By what is in them; the index is no more than a list of files."""
    swap(folder)
    assert torch.equal(stock(folder).generate(IDS, max_new_tokens=8, do_sample=False), expected)
    assert torch.equal(generate(load(folder)), expected)


def test_threads_take_turns(original, expected):
    o, results = streamed(original), []
    threads = [threading.Thread(target=lambda: results.append(generate(o))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 3
    assert all(torch.equal(result, expected) for result in results)


class SmallLedger(MemoryLedger):
    """A machine with so much free."""

    free = 0

    def measure(self, device):
        return MemorySnapshot(
            device_type="cpu", host_total=self.free, host_free=self.free, device_total=self.free, device_free=self.free
        )


def test_what_does_not_fit_is_refused_before_anything_is_read(original, expected, monkeypatch):
    o = streamed(original)
    generate(o)
    small = SmallLedger()
    monkeypatch.setattr("ollm.weights.streamer.ledger", small)
    before, record = o.stats.weights.read_bytes, o.placement
    with pytest.raises(MemoryLimitError, match=r"7 resident layers.* need .* of memory on cpu, and of 0 B free"):
        o.offload_layers_to_cpu(7)
    assert o.stats.weights.read_bytes - before <= 3 * 2**18  # what was being read ahead
    assert o.placement == record
    monkeypatch.undo()
    assert torch.equal(generate(o), expected)


def test_embeddings_that_do_not_fit_are_refused(original, monkeypatch):
    small = SmallLedger()
    monkeypatch.setattr("ollm.weights.memory.ledger", small)
    with pytest.raises(MemoryLimitError, match=r"Embeddings and what else is in no layer need .* of memory"):
        load(original)


def test_a_model_on_a_cpu_has_no_gpu_to_offload_to(original):
    o = load(original)
    with pytest.raises(DeviceError, match=r"offload_layers_to_cpu, or load the model with device='cuda:0'"):
        o.offload_layers_to_gpu(2)
    assert o.placement is None


@pytest.mark.parametrize("order", [("cpu", "gpu"), ("gpu", "cpu")])
def test_cpu_and_gpu_offload_together_are_rejected_whichever_comes_first(order):
    placer = Placer(None, [100] * 4, torch.device("cuda:0"))
    first = placer.place(order[0], 2, "prefix")
    with pytest.raises(ConfigurationError, match=f"placed on the {order[0]} before.*on the {order[1]} as well"):
        placer.place(order[1], 1, "prefix")
    assert placer.record is first
    assert placer.place(order[0], 1, "prefix").applied_layers == 1


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["cpu", "gpu", None])
def test_layers_on_an_accelerator_give_the_tokens_of_transformers(original, target):
    o = AutoInference(original, device="cuda:0", logging=False)
    if target is not None:
        getattr(o, f"offload_layers_to_{target}")(3, policy="interleaved")
        assert o.placement.tiers.count("disk") == 5
    truth = stock(original).to("cuda:0")
    ids = IDS.to("cuda:0")
    for _ in range(5):
        assert torch.equal(o.model(ids).logits, truth(ids).logits)
    assert torch.equal(
        o.model.generate(ids, max_new_tokens=50, do_sample=False),
        truth.generate(ids, max_new_tokens=50, do_sample=False),
    )
