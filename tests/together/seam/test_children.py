"""A child of `os.fork()` that has its parent's caches and models: it never waits for threads that it has not, gets a
typed error for whatever needs them, and takes nothing away from its parent."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from ollm import disk_cache
from ollm.errors import CacheForkedError, WeightsError
from ollm.io import shim
from ollm.io.shim import Disk
from ollm.testing.processes import in_child
from together.comparison import cache_for, stock_cache, tokens
from together.streamed_models import load, longer, save_checkpoint

pytestmark = pytest.mark.timeout(120)


class Gate(Disk):
    """While it is shut, whoever reads waits in front of it."""

    def __init__(self):
        self.waiting, self.opened = threading.Event(), threading.Event()
        self.opened.set()

    def pread_into(self, fd, buffer, offset):
        if not self.opened.is_set():
            self.waiting.set()
        assert self.opened.wait(60)
        return super().pread_into(fd, buffer, offset)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(shim, "disk", gate)
    yield gate
    gate.opened.set()


def in_a_thread(action):
    """`action` in another thread, which inherits no mode of torch's; and its result."""
    results = []

    @torch.inference_mode()
    def run():
        results.append(action())

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


CHANGES = {
    "crop": lambda cache: cache.crop(-1),
    "fork": lambda cache: cache.fork(2),
    "reset": lambda cache: cache.reset(),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "state": lambda cache: cache.state(),
}


@pytest.mark.parametrize("strategy", ["chunked, nothing resident", "chunked, tensor mode", "resident"])
def test_a_child_that_is_made_while_a_step_reads_neither_hangs_nor_changes_anything(model, tmp_path, gate, strategy):
    prompt, more = tokens(1, 40), tokens(1, 1, seed=1)
    truth = stock_cache(model)
    model(prompt, past_key_values=truth)
    expected = [model(more, past_key_values=truth).logits for _ in range(2)]
    with cache_for(model, tmp_path, strategy) as cache:
        model(prompt, past_key_values=cache)
        gate.opened.clear()
        thread, results = in_a_thread(lambda: model(more, past_key_values=cache).logits)
        assert strategy == "resident" or gate.waiting.wait(60)
        files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

        def child():
            for change in CHANGES.values():
                with pytest.raises(CacheForkedError):
                    change(cache)
            with pytest.raises(CacheForkedError):
                model(more, past_key_values=cache)
            with cache:
                pass
            cache.close()
            # the model is the child's own again, and so is a cache that is made here
            other = stock_cache(model)
            model(prompt, past_key_values=other)
            assert torch.allclose(model(more, past_key_values=other).logits, expected[0])
            gate.opened.set()
            with cache_for(model, tmp_path / "child", strategy) as mine:
                model(prompt, past_key_values=mine)
                assert torch.allclose(model(more, past_key_values=mine).logits, expected[0], atol=1e-5)

        in_child(child)
        assert [path for path in files if not (tmp_path / path).exists()] == []
        gate.opened.set()
        thread.join(60)
        assert torch.allclose(results[0], expected[0], atol=1e-5)
        assert torch.allclose(model(more, past_key_values=cache).logits, expected[1], atol=1e-5)


def test_a_child_that_drops_the_cache_while_a_step_reads_leaves_it_to_its_parent(model, tmp_path, gate):
    more = tokens(1, 1, seed=1)
    caches = [disk_cache(model, cache_dir=tmp_path, spill_policy="tiny", ram_budget=0)]
    model(tokens(1, 40), past_key_values=caches[0])
    gate.opened.clear()
    thread, _ = in_a_thread(lambda: model(more, past_key_values=caches[0]))
    assert gate.waiting.wait(60)

    def child():
        caches.clear()
        gc.collect()

    in_child(child)
    gate.opened.set()
    thread.join(60)
    assert caches[0].get_seq_length() == 41
    caches[0].close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("llama"), longer("llama"))


def test_streamed_weights_in_a_child_that_is_made_while_they_are_read(checkpoint, tmp_path, gate):
    """Whatever would wait for the forward pass that its parent is in, or for its threads, is refused at once."""
    o = load(checkpoint)
    o.offload_layers_to_cpu(2)
    ids = tokens(1, 12)
    expected = o.model(ids).logits
    gate.opened.clear()
    thread, results = in_a_thread(lambda: o.model(ids).logits)
    assert gate.waiting.wait(60)

    def child():
        for use in (
            lambda: o.offload_layers_to_cpu(3),
            lambda: o.DiskCache(cache_dir=tmp_path, spill_policy="tiny"),
            lambda: o.model(ids),
            lambda: o.model.generate(ids, max_new_tokens=2),
        ):
            with pytest.raises(WeightsError, match="forked process"):
                use()
        gate.opened.set()
        own = load(checkpoint)
        assert torch.equal(own.model(ids).logits, expected)

    in_child(child)
    gate.opened.set()
    thread.join(60)
    assert torch.equal(results[0], expected)
    assert torch.equal(o.model(ids).logits, expected)


def test_weights_that_are_all_in_memory_work_in_a_child_whoever_computes_with_them(checkpoint, tmp_path):
    o = load(checkpoint)
    o.offload_layers_to_cpu(99)
    ids = tokens(1, 12)
    expected = o.model(ids).logits
    begun, go_on = threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(60)

    hook = o.model.model.layers[3].register_forward_pre_hook(wait)
    thread, results = in_a_thread(lambda: o.model(ids).logits)
    assert begun.wait(60)

    def child():
        assert torch.equal(o.model(ids).logits, expected)
        with o.DiskCache(cache_dir=tmp_path, spill_policy="tiny") as cache:
            assert torch.allclose(o.model(ids, past_key_values=cache).logits, expected, atol=1e-5)

    in_child(child)
    go_on.set()
    thread.join(60)
    hook.remove()
    assert torch.equal(results[0], expected)


def test_locks_that_a_thread_of_the_parent_holds_are_free_in_a_child(model, tmp_path):
    """Of the ledger, of schedulers, of changes to models: what a new cache needs."""
    from ollm import changes
    from ollm.io import ledger, scheduler

    held, go_on = threading.Event(), threading.Event()

    def hold():
        with ledger.ledger._lock, scheduler._lock, changes._lock:
            held.set()
            assert go_on.wait(60)

    thread, _ = in_a_thread(hold)
    assert held.wait(60)

    def child():
        with cache_for(model, tmp_path) as cache:
            model(tokens(1, 20), past_key_values=cache)

    try:
        in_child(child)
    finally:
        go_on.set()
        thread.join(60)
