"""What is changed is as it was with the last undo, in any order, whoever else changes it meanwhile."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from core.interrupts import interrupted, lines_of
from ollm import changes as changes_module
from ollm.changes import Changes, ChangesFor, is_ours

X = torch.ones(1)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, x, scale=1):
        return x * self.factor * scale


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What is kept of values that were set: only what this test sets."""
    kept = {}
    monkeypatch.setattr(changes_module, "_settings", kept)
    return kept


@pytest.fixture(name="layer")
def make_layer():
    return Layer()


def plus(amount):
    return lambda forward, *args, **kwargs: forward(*args, **kwargs) + amount


def times(amount):
    return lambda forward, *args, **kwargs: forward(*args, **kwargs) * amount


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_wrappers_are_undone_in_any_order_and_the_rest_goes_on(layer, order, before):
    if before:
        layer.forward = lambda x: x * 100
    truth, was = layer(X).item(), dict(vars(layer))
    steps = [("+", 1), ("*", 3), ("+", 7)]
    users = []
    for sign, amount in steps:
        users.append(Changes())
        users[-1].wrap(layer, plus(amount) if sign == "+" else times(amount))
    left = list(range(3))
    for index in order:
        users[index].close()
        left.remove(index)
        expected = truth
        for at in left:
            expected = expected + steps[at][1] if steps[at][0] == "+" else expected * steps[at][1]
        assert layer(X).item() == expected
    assert vars(layer) == was


def test_a_wrapper_sees_what_was_passed_and_the_signature_stays(layer):
    seen = []
    signature = inspect.signature(layer.forward)

    def around(forward, *args, **kwargs):
        seen.append((args, kwargs))
        return forward(*args, **kwargs)

    with Changes() as changes:
        changes.wrap(layer, around)
        assert inspect.signature(layer.forward) == signature
        assert layer(X, scale=3).item() == 6
    assert seen == [((X,), {"scale": 3})]


def test_under_a_foreign_wrapper_it_does_nothing_and_goes_when_that_is_gone(layer):
    was = dict(vars(layer))
    changes = Changes()
    changes.wrap(layer, plus(1))
    under = layer.forward
    layer.forward = lambda x: under(x) * 10
    assert layer(X).item() == 30
    changes.close()
    foreign = layer.forward
    assert layer(X).item() == 20, "ours does nothing any more, theirs goes on"
    assert layer.forward is foreign
    with Changes() as again:
        again.wrap(layer, plus(5))
        assert layer(X).item() == 25
    assert layer.forward is foreign
    layer.forward = under
    assert layer(X).item() == 2
    assert vars(layer) == was


def test_a_forward_that_somebody_put_in_its_place_stays(layer):
    with Changes() as changes:
        changes.wrap(layer, plus(1))
        layer.forward = foreign = lambda x: x
    assert vars(layer)["forward"] is foreign


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_settings_are_undone_in_any_order_and_the_newest_holds(order, settings):
    target, users = SimpleNamespace(size=None, other=5), []
    for value in (10, 20, 30):
        users.append(Changes())
        users[-1].set(target, "size", value)
        assert target.size == value
        assert is_ours(target, "size")
    left = [10, 20, 30]
    for index in order:
        users[index].close()
        left.remove((index + 1) * 10)
        assert target.size == (left[-1] if left else None)
    assert vars(target) == {"size": None, "other": 5}
    assert not is_ours(target, "size")
    assert settings == {}


def test_what_somebody_has_set_since_stays():
    target = SimpleNamespace(size=None)
    with Changes() as changes:
        changes.set(target, "size", 10)
        target.size = 99
        assert not is_ours(target, "size")
        with Changes() as more:
            more.set(target, "size", 20)
        assert target.size == 99
    assert target.size == 99


def test_objects_that_are_equal_are_two():
    """Configs compare equal, and have no hash."""

    class Config:
        __hash__ = None

        def __init__(self):
            self.size = 1

        def __eq__(self, other):
            return vars(self) == vars(other)

    one, two = Config(), Config()
    with Changes() as changes:
        changes.set(one, "size", 2)
        assert two.size == 1
        assert not is_ours(two, "size")


def test_an_error_in_the_middle_undoes_what_was_done(layer, settings):
    target, was = SimpleNamespace(size=None), dict(vars(layer))
    hooks = {name: dict(value) for name, value in vars(layer).items() if "hooks" in name}
    with pytest.raises(AttributeError, match="absent"), Changes() as changes:
        changes.wrap(layer, plus(1))
        changes.hook(layer.register_forward_pre_hook, lambda *_: None)
        changes.set(target, "size", 3)
        changes.set(target, "absent", 3)
    assert vars(layer) == was
    assert {name: dict(value) for name, value in vars(layer).items() if "hooks" in name} == hooks
    assert vars(target) == {"size": None}
    assert settings == {}


def test_an_undo_that_fails_keeps_no_other_from_being_done(layer):
    was = dict(vars(layer))

    class Failing:
        def remove(self):
            raise RuntimeError("no")

    changes = Changes()
    changes.wrap(layer, plus(1))
    changes.hook(lambda hook: Failing(), lambda *_: None)
    with pytest.raises(RuntimeError, match="no"):
        changes.close()
    assert vars(layer) == was


def test_no_module_is_kept_alive():
    layer, changes = Layer(), Changes()
    changes.wrap(layer, plus(1))
    changes.hook(layer.register_forward_hook, lambda *_: None)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
    changes.close()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_weights_and_nothing_of_ours(layer, how):
    model, called = nn.Sequential(layer), []
    with Changes() as changes:
        changes.wrap(layer, plus(1))
        changes.wrap(layer, plus(1), "extra_repr")
        changes.hook(layer.register_forward_hook, lambda *_: called.append(1))
        other = how(model)
        again = how(other)
    for one in (other, again):
        one[0].factor.fill_(50)
        called.clear()
        assert one(X).item() == 50
        assert one[0].extra_repr() == ""
        assert not called
        was = dict(vars(one[0]))
        with Changes() as changes:
            changes.wrap(one[0], plus(1))
            assert one(X).item() == 51
        assert vars(one[0]) == was
    assert layer(X).item() == 2


class User:
    """Something that may be dropped."""


def made_in(log, name):
    """A change that writes what becomes of it."""

    def change():
        log.append(name)
        return lambda: log.append(f"not {name}")

    return change


def test_changes_for_an_object_are_undone_once_from_the_last_to_the_first():
    log, user = [], User()
    changes = ChangesFor(user)
    changes.make(made_in(log, "a"), made_in(log, "b"))
    assert len(changes.made) == 2
    changes.undo()
    changes.undo()
    del user
    gc.collect()
    assert log == ["a", "b", "not b", "not a"]
    assert changes.made == []


def test_changes_for_an_object_that_is_dropped_are_undone():
    log, user = [], User()
    ChangesFor(user).make(made_in(log, "a"))
    del user
    gc.collect()
    assert log == ["a", "not a"]


def test_of_changes_that_fail_none_is_made_and_earlier_ones_stay():
    def fail():
        raise RuntimeError("no")

    log, user = [], User()
    changes = ChangesFor(user)
    changes.make(made_in(log, "a"))
    with pytest.raises(RuntimeError, match="no"):
        changes.make(made_in(log, "b"), made_in(log, "c"), fail, made_in(log, "d"))
    assert log == ["a", "b", "c", "not c", "not b"]
    changes.undo()
    assert log[5:] == ["not a"]


def test_an_interrupted_undo_is_completed_by_the_next(layer):
    """Wherever Ctrl-C comes."""
    config, was = SimpleNamespace(name="before", other=1), dict(vars(layer))

    def changed():
        user = Layer()
        changes = ChangesFor(user)

        def change():
            made = Changes()
            made.wrap(layer, plus(1))
            made.set(config, "name", "ours")
            made.set(config, "other", 2)
            return made.close

        changes.make(change)
        return user, changes

    _, first = changed()
    for at in range(lines_of(first.undo)):
        _user, changes = changed()
        assert (config.name, config.other, layer(X).item()) == ("ours", 2, 3)
        where = interrupted(changes.undo, at)
        changes.undo()
        assert vars(config) == {"name": "before", "other": 1}, where
        assert dict(vars(layer)) == was, where
        assert changes.made == [], where
    assert not changes_module._settings


def test_an_interrupted_change_is_undone(layer):
    config, was = SimpleNamespace(name="before"), dict(vars(layer))

    def change():
        made = Changes()
        try:
            made.wrap(layer, plus(1))
            made.set(config, "name", "ours")
            return made.close
        except BaseException:
            made.close()
            raise

    user = Layer()
    changes = ChangesFor(user)
    count = lines_of(lambda: changes.make(change))
    changes.undo()
    for at in range(count):
        where = interrupted(lambda changes=changes: changes.make(change), at)
        if where:
            changes.undo()  # what the interrupt left of it, if it was made
        assert (config.name, dict(vars(layer))) == ("before", was), where
