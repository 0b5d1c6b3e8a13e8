"""What goes wrong in the middle of the engine leaves a layer as it was, and a second attempt works."""

from __future__ import annotations

import attrs
import pytest
import torch

from core.storage.storage_fixtures import open_storage
from ollm.builtin.chunked import ChunkedStore
from ollm.contracts.spill import SpillPlan
from ollm.errors import CorruptDataError, DiskFullError, OllmError, StoreContractError
from ollm.kv import tail
from ollm.kv.history import LayerHistory
from ollm.kv.session import KVSession

STEPS = [("append", 7), ("append", 2), ("append", 9), ("crop", 14), ("append", 6), ("rows", 2), ("crop", 3)]
ERRORS = (OllmError, KeyboardInterrupt, MemoryError)


class FourTokens(ChunkedStore):
    extent_tokens = 4


def make(folder, store_type=FourTokens):
    plan = SpillPlan(flush_tokens=4, flush_bytes=2**30, hot_tokens=1, resident_bytes=200)
    session = KVSession(store_type(open_storage(folder)), plan, strategy="test", layers=[0])
    return session, LayerHistory(0, session)


def tokens(count, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 2, count, size, generator=generator) for size in (4, 3))


def content(layer):
    """A copy of everything that a layer holds."""
    return [tensor.clone() for tensor in layer.gather(*tokens(0, layer.rows))] if layer.tokens else None


def same(ours, theirs):
    return ours is theirs is None or (ours is not None and all(map(torch.equal, ours, theirs)))


def take(layer, step, argument, seed):
    if step == "append":
        layer.append(*tokens(argument, layer.rows or 2, seed))
    elif step == "crop":
        layer.crop(argument)
    else:
        layer.select_rows(torch.arange(argument + 1) % layer.rows)


def run(folder, broken, monkeypatch):
    """The steps, each first on what is broken, then, if that failed, again. Returns how many failed."""
    failures = 0
    session, layer = make(folder)
    model_session, model = make(folder)
    for seed, (step, argument) in enumerate(STEPS):
        before = content(layer)
        take(model, step, argument, seed)
        after = content(model)
        taken = False
        try:
            with monkeypatch.context() as patch:
                broken(patch)
                take(layer, step, argument, seed)
                taken = True
                session.store.storage.flush()
        except ERRORS as error:
            failures += 1
            if taken:  # the disk failed in the background, behind what was reported as kept
                assert same(content(layer), after), f"{step} {argument}: {error!r}"
                continue
            shortened = step == "crop" and same(content(layer), after)  # only giving back the bytes was interrupted
            assert shortened or same(content(layer), before), f"{step} {argument}: {error!r}"
            take(layer, step, argument, seed)
        assert same(content(layer), after), f"{step} {argument}"
    session.close()
    model_session.close()
    return failures


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_no_room_for_a_tail_leaves_the_layer_as_it_was(tmp_path, monkeypatch, error):
    """Every allocation of a tail fails once, also that for what a flush leaves hot."""
    real, at = tail._room_for, 0

    def run_failing(at):
        count = iter(range(10**6))

        def room_for(*arguments):
            if next(count) == at:
                raise error("no room")
            return real(*arguments)

        return run(tmp_path, lambda patch: patch.setattr(tail, "_room_for", room_for), monkeypatch)

    while run_failing(at):
        at += 1
    assert at > 6


def test_a_first_append_that_failed_does_not_fix_the_batch(tmp_path):
    class Full(FourTokens):
        full = True

        def write(self, block, key):
            if self.full:
                raise DiskFullError("full")
            return super().write(block, key)

    session, layer = make(tmp_path, Full)
    with pytest.raises(DiskFullError):
        layer.append(*tokens(9, rows=3))
    assert layer.tokens == 0
    session.store.full = False
    layer.append(*tokens(9, rows=1))
    assert same(content(layer), tokens(9, rows=1))
    session.close()


def test_a_layer_that_was_only_asked_does_not_fix_the_batch(tmp_path):
    session, layer = make(tmp_path)
    layer.gather(*tokens(5, rows=3))
    layer.append(*tokens(5, rows=1))
    assert (layer.tokens, layer.rows) == (5, 1)
    session.close()


def test_cropping_to_more_than_there_is_keeps_everything(tmp_path):
    session, layer = make(tmp_path)
    layer.append(*tokens(6))
    layer.crop(100)
    assert layer.tokens == 6
    assert same(content(layer), tokens(6))
    session.close()


def test_rows_that_do_not_exist_leave_the_layer_as_it_was(tmp_path):
    session, layer = make(tmp_path)
    layer.append(*tokens(6))
    with pytest.raises(IndexError):
        layer.select_rows(torch.tensor([0, 2]))
    assert layer.rows == 2
    assert same(content(layer), tokens(6))
    session.close()


@pytest.mark.parametrize("change", [{"nbytes": 100}, {"segment": 1}, {"offset": 8192}, {"encoded": True}], ids=str)
def test_a_store_that_says_another_place_than_where_it_wrote_is_caught(tmp_path, change):
    class Lying(FourTokens):
        def write(self, block, key):
            location = super().write(block, key)
            return attrs.evolve(location, **change) if key.start else location

    session, layer = make(tmp_path, Lying)
    layer.append(*tokens(5))
    layer.append(*tokens(4))
    with pytest.raises((CorruptDataError, StoreContractError)):
        layer.gather(*tokens(0))
    session.close()


@pytest.mark.parametrize("answer", [None, 7, (0, 4096)], ids=str)
def test_a_store_that_does_not_say_where_it_wrote_is_caught(tmp_path, answer):
    class Silent(FourTokens):
        def write(self, block, key):
            super().write(block, key)
            return answer

    session, layer = make(tmp_path, Silent)
    with pytest.raises(StoreContractError, match=r"write\(\) of 4 tokens at 0 of layer 0 gave"):
        layer.append(*tokens(5))
    assert layer.tokens == 0
    session.close()
