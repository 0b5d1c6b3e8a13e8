"""What the user does to a model, or with it, while a cache holds it: it is as if nothing had been done to the model."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import pickle
import threading

import pytest
import torch
from torch import nn

from ollm import disk_cache
from ollm.errors import BlockModeError, UnsupportedOperationError
from ollm.seam import attention
from ollm.testing.case import depth
from together.architectures import make
from together.comparison import assert_close, assert_same, cache_for, generate, stock_cache, tokens
from together.tiny_models import FAMILIES, make_model

IDS = tokens(2, 20)
PIECES = {"dense_projection_chunk_rows": 6}

each_family = pytest.mark.parametrize("model", FAMILIES, indirect=True)


@pytest.fixture
def own():
    """A model that no other test has."""
    return make_model("llama")


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_copy_of_a_held_model_is_a_plain_model_of_its_own(own, how, implementation, tmp_path):
    own.set_attn_implementation(implementation)
    expected = own(IDS).logits
    with disk_cache(own, cache_dir=tmp_path, **PIECES) as cache:
        assert cache.state().mode == "block"
        other = COPIES[how](own)
        assert type(other.config._attn_implementation) is str
        assert {module.config._attn_implementation for module in (other, other.model)} == {implementation}
        own(IDS, past_key_values=cache)
        for weight in own.parameters():
            weight.zero_()
        assert torch.equal(other(IDS).logits, expected)
        assert torch.equal(other(IDS, past_key_values=stock_cache(other)).logits, expected)
        with pytest.raises(BlockModeError):
            other(IDS, past_key_values=cache)
    for again in (other, COPIES[how](other)):
        assert torch.equal(again(IDS).logits, expected)
        with disk_cache(again, cache_dir=tmp_path, **PIECES) as cache:
            assert_close(again(IDS, past_key_values=cache).logits, expected)
        assert torch.equal(again(IDS).logits, expected)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_copy_computes_with_what_was_quantised(own, tmp_path):
    truth = torch.ao.quantization.quantize_dynamic(copy.deepcopy(own), {nn.Linear}, dtype=torch.qint8)
    with disk_cache(own, cache_dir=tmp_path, **PIECES):
        quantised = torch.ao.quantization.quantize_dynamic(own, {nn.Linear}, dtype=torch.qint8)
        assert torch.equal(quantised(IDS).logits, truth(IDS).logits)
    assert torch.equal(quantised(IDS).logits, truth(IDS).logits)
    assert not torch.equal(quantised(IDS).logits, own(IDS).logits)


def test_configs_copied_or_saved_meanwhile_name_the_attention_of_the_model(own, tmp_path):
    with disk_cache(own, cache_dir=tmp_path / "kv"):
        config = copy.deepcopy(own.config)
        assert config._attn_implementation == "sdpa"
        assert attention.NAME not in repr(own.config.to_dict())
        own.save_pretrained(tmp_path / "saved")
        assert attention.NAME not in (tmp_path / "saved" / "config.json").read_text()
        shallow = copy.copy(own.config)
    other = type(own)(shallow).eval()
    other.load_state_dict(own.state_dict())
    assert torch.equal(other(IDS).logits, own(IDS).logits)


def test_the_cache_itself_is_not_copied_with_a_model_that_keeps_it(own, tmp_path):
    with disk_cache(own, cache_dir=tmp_path) as own.cache, pytest.raises(UnsupportedOperationError, match="owns files"):
        copy.deepcopy(own)
    del own.cache


@each_family
@pytest.mark.parametrize("implementation", ["own", "eager"])
def test_what_is_computed_without_the_cache_is_the_same_bit_for_bit(model, implementation, tmp_path):
    before = model.config._attn_implementation
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    try:
        if implementation != "own":
            model.set_attn_implementation(implementation)

        def computed():
            cache = stock_cache(model)
            first = model(IDS, attention_mask=mask, past_key_values=cache, output_attentions=True)
            longer = torch.cat([mask, mask[:, -1:]], dim=1)
            second = model(IDS[:, :1], attention_mask=longer, past_key_values=cache)
            return [first.logits, second.logits, model(IDS).logits, *(first.attentions or ())]

        expected = computed()
        assert implementation != "eager" or len(expected) > 3
        with cache_for(model, tmp_path):
            meanwhile = computed()
        assert len(meanwhile) == len(expected)
        assert all(map(torch.equal, meanwhile, expected))
    finally:
        model.set_attn_implementation(before)


def in_a_thread(function):
    """Run something in another thread, and wait for it."""
    raised = []

    def run():
        try:
            with torch.inference_mode():
                function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


@contextlib.contextmanager
def in_the_midst_of(layer, function):
    """Call a function once, in another thread, when a forward pass has come to a layer."""
    calls = iter([function])
    handle = layer.register_forward_pre_hook(lambda *_: in_a_thread(next(calls, lambda: None)))
    yield
    handle.remove()
    assert next(calls, None) is None, "it was called"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("event", ["open", "close", "use"])
def test_a_cache_of_another_thread_changes_nothing_in_a_pass_under_way(own, event, padded, implementation, tmp_path):
    own.set_attn_implementation(implementation)
    mask = torch.ones_like(IDS)
    mask[0, : 9 * padded] = 0
    expected = own(IDS, attention_mask=mask, past_key_values=stock_cache(own)).logits
    ours = []

    def open_one():
        ours.append(disk_cache(own, cache_dir=tmp_path, **PIECES))

    def use():
        found = own(IDS, attention_mask=mask, past_key_values=ours[0]).logits
        assert_close(found[:, 9:], expected[:, 9:])

    if event != "open":
        open_one()
    what = {"open": open_one, "close": lambda: ours[0].close(), "use": use}[event]
    with in_the_midst_of(own.model.layers[1], what):
        assert torch.equal(own(IDS, attention_mask=mask, past_key_values=stock_cache(own)).logits, expected)
    ours[0].close()
    assert own.config._attn_implementation == implementation


def test_a_cache_of_another_thread_goes_while_ours_is_used(own, tmp_path):
    expected = own(IDS).logits
    other = disk_cache(own, cache_dir=tmp_path, **PIECES)
    with disk_cache(own, cache_dir=tmp_path, **PIECES) as cache, in_the_midst_of(own.model.layers[1], other.close):
        assert_close(own(IDS, past_key_values=cache).logits, expected)


ORDERS = [order for order in itertools.permutations(range(4)) if order[0] != 3]
"""In which four caches are closed, the last of which is made once one is closed."""


@pytest.mark.parametrize("order", ORDERS[:: -(-len(ORDERS) // min(depth(4), len(ORDERS)))])
def test_caches_that_were_made_before_within_and_after_an_adapter_are_closed_in_any_order(own, order, tmp_path):
    """With hooks, masks, pieces and attention as they were, and the right numbers until then."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    plain = own(IDS, attention_mask=mask).logits
    caches = [disk_cache(own, cache_dir=tmp_path, **PIECES)]
    tuned = peft.get_peft_model(own, settings).eval()
    changed = tuned(IDS, attention_mask=mask).logits
    caches.append(disk_cache(tuned, cache_dir=tmp_path, **PIECES))
    caches.append(disk_cache(own, cache_dir=tmp_path, **PIECES))
    for cache in caches[:2]:
        assert_close(tuned(IDS, attention_mask=mask, past_key_values=cache).logits, changed)
    caches[order[0]].close()
    assert tuned.unload() is own
    caches.append(disk_cache(own, cache_dir=tmp_path, **PIECES))
    for index in order[1:]:
        assert own.config._attn_implementation == attention.NAME
        caches[index].reset()
        assert_close(own(IDS, attention_mask=mask, past_key_values=caches[index]).logits, plain)
        caches[index].close()
    assert own.config._attn_implementation == "sdpa"
    assert all("forward" not in vars(module) for module in own.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in own.modules())
    assert torch.equal(own(IDS, attention_mask=mask).logits, plain)


def mix(*given):
    """What a token is given depends on all tokens of the pass; the last argument is what went out, or in."""
    value = given[-1]
    if isinstance(value, tuple):
        return (mix(value[0]), *value[1:])
    return value + value.mean(dim=1, keepdim=True)


@contextlib.contextmanager
def hooked(module, kind):
    """A hook, or what does as one, that a prompt in pieces would change."""
    if kind == "output":
        handle = module.register_forward_hook(mix)
    elif kind == "input":
        handle = module.register_forward_pre_hook(mix)
    elif kind == "global":
        handle = nn.modules.module.register_module_forward_hook(
            lambda found, args, output: mix(output) if found is module else None
        )
    else:
        forward = module.forward
        module.forward = lambda *args, **kwargs: mix(forward(*args, **kwargs))
    yield
    if kind == "forward":
        del module.forward
    else:
        handle.remove()


@pytest.mark.parametrize("kind", ["output", "input", "global", "forward"])
@pytest.mark.parametrize("part", ["", "mlp", "self_attn.o_proj"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_sees_a_prompt_whole(own, kind, part, when, tmp_path):
    module = own.model.layers[1].get_submodule(part)
    if (part, kind, when) == ("", "forward", "after"):
        pytest.skip("that goes over ours, and replaces it when it is taken off")
    with hooked(module, kind):
        expected = own(IDS).logits
    assert not torch.allclose(expected, own(IDS).logits, atol=1e-2)
    with contextlib.ExitStack() as stack:
        if when == "before":
            stack.enter_context(hooked(module, kind))
        cache = stack.enter_context(disk_cache(own, cache_dir=tmp_path, **PIECES))
        assert cache.state().mode == "block"
        if when == "after":
            stack.enter_context(hooked(module, kind))
        assert_close(own(IDS, past_key_values=cache).logits, expected)


@each_family
def test_hidden_states_are_those_of_stock(model, tmp_path):
    expected = model(IDS, past_key_values=stock_cache(model), output_hidden_states=True).hidden_states
    with disk_cache(model, cache_dir=tmp_path, **PIECES) as cache:
        found = model(IDS, past_key_values=cache, output_hidden_states=True).hidden_states
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs)
        cache.reset()
        settings = {"new_tokens": 4, "output_hidden_states": True}
        theirs = generate(model, IDS, stock_cache(model), **settings)
        ours = generate(model, IDS, cache, **settings)
        assert_same(ours, theirs)
        for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            assert [state.shape for state in one] == [state.shape for state in other]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_router_logits_are_those_of_stock(model_type, tmp_path):
    model, ids = make(model_type), IDS % 90 + 3
    settings = {"output_router_logits": True, "labels": ids}
    expected = model(ids, past_key_values=stock_cache(model), **settings)
    with disk_cache(model, cache_dir=tmp_path, **PIECES) as cache:
        assert cache.state().mode == "block"
        found = model(ids, past_key_values=cache, **settings)
        assert len(found.router_logits) == len(expected.router_logits)
        for ours, theirs in zip(found.router_logits, expected.router_logits, strict=True):
            assert_close(ours, theirs)
        assert_close(found.aux_loss, expected.aux_loss)
        assert_close(found.logits, expected.logits)


@pytest.mark.parametrize("by", ["argument", "config", "generate"])
def test_attention_weights_are_refused_before_anything_is_done(own, by, tmp_path):
    own.set_attn_implementation("eager")
    if by == "config":
        own.config.output_attentions = True
    with disk_cache(own, cache_dir=tmp_path, mode="block" if by != "config" else "auto") as cache:
        if by == "config":
            assert (cache.state().mode, "output_attentions" in cache.state().mode_reason) == ("tensor", True)
            return
        with pytest.raises(BlockModeError, match=r"output_attentions: in block mode.*mode='tensor'"):
            if by == "generate":
                generate(own, IDS, cache, output_attentions=True)
            else:
                own(IDS, past_key_values=cache, output_attentions=True)
        assert cache.get_seq_length() == 0
        assert_close(own(IDS, past_key_values=cache).logits, own(IDS).logits)


def test_attention_weights_are_those_of_stock_in_tensor_mode(own, tmp_path):
    own.set_attn_implementation("eager")
    expected = own(IDS, past_key_values=stock_cache(own), output_attentions=True).attentions
    with disk_cache(own, cache_dir=tmp_path, mode="tensor") as cache, disk_cache(own, cache_dir=tmp_path):
        found = own(IDS, past_key_values=cache, output_attentions=True).attentions
    assert all(map(torch.equal, found, expected))
