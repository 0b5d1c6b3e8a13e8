"""What the user does to weights that are read while the model runs: right where they are in memory, else refused before
anything is done, whichever way to the weights he takes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ollm.errors import WeightsError
from together.comparison import assert_close, generate, stock_cache, tokens
from together.streamed_models import load, longer, save_checkpoint, stock

IDS = tokens(1, 20)
LAYERS = 5
ON_DISK = r"model\.layers\.\d\..* on disk.*offload_layers_to_cpu"
LOST = r"model\.layers\.\d\..*would be lost: load the model again"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("llama"), longer("llama", LAYERS))


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """A LoRA of a query and an MLP projection, in PEFT's format."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(stock(checkpoint), config).save_pretrained(folder)
    return folder


@pytest.fixture
def truth(checkpoint):
    return stock(checkpoint)


@pytest.fixture(params=["before a pass", "after a pass"])
def streamed(request, checkpoint):
    """Layer 0 stays in memory, the others are on disk."""
    o = load(checkpoint)
    o.offload_layers_to_cpu(1, policy="prefix")
    if request.param == "after a pass":
        o.model(IDS)
    return o


def last(model):
    return model.get_decoder().layers[-1].mlp


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def other_numbers(model):
    return {name: value + 1 for name, value in model.items()}


def change_in_place(model):
    for weight in model.parameters():
        weight.mul_(2)


def change_data(model):
    for weight in model.parameters():
        weight.data = weight.data * 2


def change_data_in_place(model):
    for weight in reversed(list(model.parameters())):
        weight.data.mul_(2)


def set_item(model):
    last(model).up_proj.weight[0] = 0


WAYS = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a layer": lambda model: copy.deepcopy(last(model)),
    "pickle": pickle.dumps,
    "torch.save": saved,
    "torch.save of the state dict": lambda model: saved(model.state_dict()),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to a dtype": lambda model: model.to(torch.float64),
    "to meta": lambda model: model.to("meta"),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "a part to a dtype": lambda model: model.model.half(),
    "share_memory": lambda model: model.share_memory(),
    "quantize_dynamic": quantised,
    "in place": change_in_place,
    "data": change_data,
    "data in place": change_data_in_place,
    "an item": set_item,
    "a row": lambda model: last(model).up_proj.weight[0].zero_(),
    "init": lambda model: nn.init.normal_(last(model).up_proj.weight),
    "norm": lambda model: last(model).up_proj.weight.norm().item(),
    "numpy": lambda model: last(model).up_proj.weight.detach().numpy(),
    "tolist": lambda model: last(model).up_proj.weight.tolist(),
    "data_ptr": lambda model: last(model).up_proj.weight.data_ptr(),
    "a layer alone": lambda model: last(model)(torch.zeros(1, 1, 64)),
    "a vector": lambda model: nn.utils.parameters_to_vector(model.parameters()),
    "clipping": lambda model: nn.utils.get_total_norm(model.parameters()),
    "load_state_dict": lambda model: model.load_state_dict(other_numbers(model.state_dict())),
}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_weights_that_are_on_disk(streamed, truth, way):
    with pytest.raises(WeightsError, match=ON_DISK):
        WAYS[way](streamed.model)
    if way not in ("in place", "data", "data in place"):  # of these the caller does one after the other himself
        assert torch.equal(streamed.model(IDS).logits, truth(IDS).logits)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("part", ["", "model", "model.layers.4", "model.layers.4.mlp.up_proj"])
def test_no_state_dict_goes_where_weights_are_on_disk(streamed, truth, part, assign):
    new = other_numbers(truth.get_submodule(part).state_dict())
    with pytest.raises(WeightsError, match=ON_DISK):
        streamed.model.get_submodule(part).load_state_dict(new, assign=assign)
    if part != "model.layers.4":  # of which the norms come last
        assert torch.equal(streamed.model(IDS).logits, truth(IDS).logits)
    streamed.model.load_state_dict({"lm_head.weight": truth.lm_head.weight * 2}, strict=False)
    truth.lm_head.weight.data *= 2
    if part != "model.layers.4":
        assert torch.equal(streamed.model(IDS).logits, truth(IDS).logits)


def test_a_state_dict_holds_nothing_wrong(streamed, truth, tmp_path):
    state = streamed.model.state_dict()
    assert list(state) == list(truth.state_dict())
    for name, value in truth.state_dict().items():
        assert (state[name].shape, state[name].dtype, state[name].device) == (value.shape, value.dtype, value.device)
        if not name.startswith("model.layers.") or name.startswith("model.layers.0."):
            assert torch.equal(state[name], value)
        else:
            with pytest.raises(WeightsError, match=ON_DISK):
                torch.equal(state[name], value)
    with pytest.raises(WeightsError, match=ON_DISK):
        save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=ON_DISK):
        truth.load_state_dict(state)


def test_nothing_is_written_where_not_everything_can_be(streamed, checkpoint, tmp_path):
    before = {path: path.stat() for path in checkpoint.iterdir()}
    for folder in (tmp_path / "new", checkpoint):
        with pytest.raises(WeightsError, match=ON_DISK):
            streamed.model.save_pretrained(folder)
    assert not (tmp_path / "new").exists()
    assert {path: path.stat() for path in checkpoint.iterdir()} == before


def test_moving_a_model_to_where_it_is_changes_nothing(streamed, truth):
    model = streamed.model
    assert model.to("cpu") is model.float() is model.to(torch.float32) is model
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    assert torch.equal(model(IDS).logits, truth(IDS).logits)


def test_what_is_put_in_a_weights_place_is_noticed(streamed, truth):
    mlp = last(streamed.model)
    before = mlp.up_proj.weight
    mlp.up_proj.weight = nn.Parameter(torch.zeros_like(truth.model.layers[-1].mlp.up_proj.weight))
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"layers\.4\.mlp\.up_proj\.weight was replaced.*would be lost"):
            streamed.model(IDS)
    mlp.up_proj.weight = before
    assert torch.equal(streamed.model(IDS).logits, truth(IDS).logits)


def in_place(module, args):
    module.weight.mul_(2)


def other_memory(module, args):
    module.weight.data = module.weight.data * 2


def another(module, args):
    module.weight = nn.Parameter(module.weight * 2)


@pytest.mark.parametrize("change", [in_place, other_memory, another])
@pytest.mark.parametrize("layer", [2, 4])
def test_a_hook_that_changes_weights_is_noticed_and_leaves_nothing(streamed, truth, change, layer):
    module = streamed.model.model.layers[layer].mlp.up_proj
    handle = module.register_forward_pre_hook(change)
    with pytest.raises(WeightsError, match=rf"layers\.{layer}\.mlp\.up_proj\.weight was changed while a forward pass"):
        streamed.model(IDS)
    handle.remove()
    for _ in range(3):
        assert torch.equal(streamed.model(IDS).logits, truth(IDS).logits)


def test_a_hook_may_look_at_weights(streamed, truth):
    seen = []
    for layer in streamed.model.model.layers:
        layer.mlp.up_proj.register_forward_pre_hook(lambda module, args: seen.append(module.weight.clone()))
    streamed.model(IDS)
    assert all(map(torch.equal, seen, [layer.mlp.up_proj.weight for layer in truth.model.layers]))


CHANGES = {
    "in place": lambda weight: weight.mul_(2),
    "in place of its data": lambda weight: weight.data.mul_(2),
    "its data": lambda weight: setattr(weight, "data", weight.data * 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_was_changed_in_memory_does_not_leave_it(checkpoint, truth, change):
    o = load(checkpoint)
    o.offload_layers_to_cpu(3, policy="prefix")
    for model in (o.model, truth):
        CHANGES[change](model.model.layers[1].mlp.up_proj.weight)
    record = o.placement
    for count in (1, 0):
        with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj\.weight was changed while its layer was in"):
            o.offload_layers_to_cpu(count, policy="prefix")
        assert o.placement == record
        assert torch.equal(o.model(IDS).logits, truth(IDS).logits)
    for count in (2, LAYERS):  # where it stays
        o.offload_layers_to_cpu(count, policy="prefix")
        assert torch.equal(o.model(IDS).logits, truth(IDS).logits)


IN_MEMORY = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "half and back": lambda model: model.bfloat16().float(),
    "quantize_dynamic": quantised,
    "in place": lambda model: [weight.mul_(1.25) for weight in model.parameters()] and model,
    "data": lambda model: change_data(model) or model,
    "loaded": lambda model: model.load_state_dict(other_numbers(model.state_dict())) and model,
}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("way", IN_MEMORY)
@pytest.mark.parametrize("placed", ["when it is asked for", "before"])
def test_a_model_that_is_in_memory_is_as_any_other(checkpoint, truth, way, placed):
    """Also before anything was computed, when nothing was read yet."""
    o = load(checkpoint, logging=True)
    if placed == "before":
        o.offload_layers_to_cpu(LAYERS)
    ours, theirs = IN_MEMORY[way](o.model), IN_MEMORY[way](truth)
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    if ours is not o.model:
        for weight in o.model.parameters():
            weight.zero_()
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_a_copy_made_with_a_cache_open_is_plain(checkpoint, truth, tmp_path):
    o = load(checkpoint)
    with o.DiskCache(tmp_path, dense_projection_chunk_rows=6) as cache:
        generate(o.model, IDS, cache, new_tokens=3)
        other = copy.deepcopy(o.model)
    assert torch.equal(other(IDS).logits, truth(IDS).logits)
    assert other.generation_config.prefill_chunk_size is None


def test_embeddings_may_be_resized_and_tied(streamed, truth):
    for model in (streamed.model, truth):
        torch.manual_seed(0)
        model.resize_token_embeddings(230, mean_resizing=False)
        model.tie_weights()
    assert torch.equal(streamed.model(IDS).logits, truth(IDS).logits)


def test_an_adapter_loaded_at_any_time_is_right(streamed, truth, adapter, tmp_path):
    peft = pytest.importorskip("peft")
    for model in (streamed.model, truth):
        model.load_adapter(str(adapter), "one")
    expected = truth(IDS).logits
    assert torch.equal(streamed.model(IDS).logits, expected)
    streamed.offload_layers_to_cpu(2)
    assert torch.equal(streamed.model(IDS).logits, expected)
    streamed.model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(stock(truth.config._name_or_path), tmp_path)
    assert_close(again.eval()(IDS).logits, expected)
    for model in (streamed.model, truth):
        model.delete_adapter("one")
    assert torch.equal(streamed.model(IDS).logits, truth(IDS).logits)


def test_adapters_of_a_peft_model_come_and_go(streamed, truth, adapter, tmp_path):
    peft = pytest.importorskip("peft")
    ours, theirs = (peft.PeftModel.from_pretrained(model, adapter).eval() for model in (streamed.model, truth))
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    for model in (ours, theirs):
        model.load_adapter(str(adapter), "second")
        model.set_adapter("second")
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    ours.save_pretrained(tmp_path)
    with streamed.DiskCache(tmp_path / "kv", ram_budget=0, spill_policy="tiny") as cache:
        assert torch.equal(
            generate(ours, IDS, cache, new_tokens=5).sequences, generate(theirs, IDS, stock_cache(truth), 5).sequences
        )


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_is_merged_where_the_weights_are_and_nowhere_else(checkpoint, truth, adapter, safe):
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(truth, adapter).eval()
    expected = theirs(IDS).logits
    o = load(checkpoint, adapter_dir=adapter)
    o.offload_layers_to_cpu(0)
    for merge in (o.model.merge_adapter, o.model.merge_and_unload):
        with pytest.raises(WeightsError, match=ON_DISK):
            merge(safe_merge=safe)
    assert_close(o.model(IDS).logits, expected)
    o.offload_layers_to_cpu(LAYERS)
    merged = o.model.merge_and_unload(safe_merge=safe)
    assert torch.equal(merged(IDS).logits, theirs.merge_and_unload(safe_merge=safe)(IDS).logits)
    with pytest.raises(WeightsError, match=LOST):
        o.offload_layers_to_cpu(1)
