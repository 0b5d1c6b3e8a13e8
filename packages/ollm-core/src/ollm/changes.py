"""`Changes`: everything that is done to somebody else's model, and the one way in which it is undone.

A change is kept where it is made, in the module whose forward is wrapped or for the setting that has another value, not
by who asked for it: so it does not matter how many ask, under which wrapper of the model, and who is done first. With
the last undo each object is as it was. A copy or pickle of a module, made meanwhile, has nothing of it: a wrapper is a
method itself there, a hook does nothing. Knows modules and attributes; not transformers, and not what changes are for.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol, Self

import attrs
from torch import nn

from ollm.endings import end

Around = Callable[..., Any]
"""`around(forward, *args, **kwargs)`: calls the forward that it is given, or does not, and returns what that would."""

Change = Callable[[], Callable[[], None]]
"""Makes a change, and returns what undoes it."""

_lock = threading.RLock()  # whoever is collected undoes its changes in any thread, and perhaps in the midst of another


def _begin_child() -> None:
    """Right behind a fork, in the child: a thread of the parent that held the lock would never give it back."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_child)


class _Handle(Protocol):
    def remove(self) -> None: ...


class Changes:
    """What one user does to a model. `close` undoes it, as does the end of a `with` block; `pop_all` takes it out of
    the block. Keeps no module alive, and leaves what somebody else has changed since as it is."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []  # each may be called again, and before its change is made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def pop_all(self) -> Changes:
        """What was done so far, for somebody else to undo."""
        taken = Changes()
        taken._undo, self._undo = self._undo, []
        return taken

    def close(self) -> None:
        """Undo all, from the last to the first. May be called until it has succeeded, and afterwards."""
        with ExitStack() as steps:  # the next one is done even if one fails
            for undo in self._undo:
                steps.callback(undo)
        self._undo.clear()

    def callback(self, undo: Callable[..., object], *arguments: Any) -> None:
        """Call this when all is undone."""
        self._undo.append(functools.partial(undo, *arguments))

    def hook(self, register: Callable[..., _Handle], function: Callable[..., Any], **settings: Any) -> None:
        """Register a hook: `register` is a method of the module, such as `register_forward_hook`."""
        self.callback(register(_Hook(function), **settings).remove)

    def wrap(self, module: nn.Module, around: Around, name: str = "forward") -> None:
        """Put a wrapper around a method of a module, by default its `forward`, outside of those that are there."""
        token = object()
        with _lock:
            method = vars(module).get(name)
            if not isinstance(method, _Method):
                method = _Method(module, name)
            self.callback(_unwrap, weakref.ref(method), token)
            method.around[token] = around
            setattr(module, name, method)

    def set(self, target: Any, name: str, value: Any) -> None:
        """Give an attribute that `target` has another value. Where several do, the newest that is not undone holds."""
        token = object()
        with _lock:
            setting = _settings.setdefault((id(target), name), _Setting(target, name))
            self.callback(_unset, setting, token)
            setting.put(token, value)


class ChangesFor:
    """Changes that are made for an object, and undone with `undo` or when it is dropped."""

    def __init__(self, user: object) -> None:
        self._user = weakref.ref(user)
        self._undo: list[tuple[Change, weakref.finalize[Any, Any]]] = []

    @property
    def made(self) -> list[Change]:
        """Those that are not undone, for whoever wants to make them for another object, too."""
        return [change for change, undo in self._undo if undo.alive]

    def make(self, *changes: Change) -> None:
        """Make all of them, or none."""
        before, user = len(self._undo), self._user()
        assert user is not None
        try:
            for change in changes:
                self._make(change, user)
        except BaseException:
            self.undo(before)
            raise

    def undo(self, keep: int = 0) -> None:
        """Undo all, or all but the first `keep`, from the last to the first; nothing of them is kept alive then. May be
        called until it has succeeded, and afterwards."""
        with ExitStack() as steps:  # the next one is done even if one fails
            for _, undo in self._undo[keep:]:
                steps.callback(end, undo)
        del self._undo[keep:]

    def _make(self, change: Change, user: object) -> None:
        undo: Callable[[], None] | None = None
        try:
            undo = change()
            finalizer = weakref.finalize(user, undo)
            finalizer.atexit = False  # at exit the model goes as well
            self._undo.append((change, finalizer))
        except BaseException:
            if undo is not None:
                undo()
            raise


def is_ours(target: Any, name: str) -> bool:
    """Whether an attribute has the value that a change gave it."""
    setting = _settings.get((id(target), name))
    return setting is not None and setting.holds


def beneath(module: nn.Module, name: str) -> Any:
    """What a module has of its own, or from somebody else, in place of its class's method, under our wrappers; `None`
    where that is nothing."""
    method = vars(module).get(name)
    return method.before if isinstance(method, _Method) else method


def is_our_hook(function: Any) -> bool:
    """Whether a hook was registered by a change."""
    return isinstance(function, _Hook)


class _Hook:
    """A hook of ours; in a copy of its module, one that does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _Hook, (_nothing,)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What is left of a hook in a copy."""


class _Method:
    """Stands in for a method of a module while there are wrappers around it.

    When there are none any more and somebody else has wrapped it, it cannot go; then it does nothing, and goes as soon
    as it is called and is the module's own again.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.around: dict[object, Around] = {}
        self._module = module
        self._name = name
        self.before = vars(module).get(name)
        self._method = getattr(module, name)
        functools.update_wrapper(self, self._method)  # its signature is asked for

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = self._method
        for around in list(self.around.values()):
            method = functools.partial(around, method)
        if not self.around:
            self.go()
        return method(*args, **kwargs)

    def __reduce__(self) -> Any:
        """In a copy of the module it is the method itself, bound to the copy."""
        if self.before is None:
            return getattr, (self._module, self._name)
        return _itself, (self.before,)

    def go(self) -> None:
        """Give the module its own method back, unless somebody has wrapped it again."""
        with _lock:
            if self.around or vars(self._module).get(self._name) is not self:
                return
            if self.before is None:
                delattr(self._module, self._name)
            else:
                setattr(self._module, self._name, self.before)


def _itself(value: Any) -> Any:
    return value


@attrs.define(eq=False)
class _Setting:
    """An attribute of one object, and the values that it was given, the newest last."""

    target: Any
    name: str
    values: dict[object, Any] = attrs.field(factory=dict)
    before: Any = None

    @property
    def holds(self) -> bool:
        return bool(self.values) and getattr(self.target, self.name) == next(reversed(self.values.values()))

    def put(self, token: object, value: Any) -> None:
        if not self.holds:  # then what somebody else has set is what comes back
            self.before = getattr(self.target, self.name)
            self.values.clear()
        self.values[token] = value
        setattr(self.target, self.name, value)

    def take(self, token: object) -> None:
        if self.holds:
            left = [value for other, value in self.values.items() if other is not token]
            setattr(self.target, self.name, left[-1] if left else self.before)
        self.values.pop(token, None)


_settings: dict[tuple[int, str], _Setting] = {}
"""By the identity of the target, which lives as long as it is here: configs have no hash."""


def _unwrap(method_of: weakref.ref[_Method], token: object) -> None:
    with _lock:
        method = method_of()
        if method is not None:
            method.around.pop(token, None)
            method.go()


def _unset(setting: _Setting, token: object) -> None:
    with _lock:
        setting.take(token)
        if not setting.values:
            _settings.pop((id(setting.target), setting.name), None)
