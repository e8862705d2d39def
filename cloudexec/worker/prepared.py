"""What an initializer leaves in the globals of a script, for the calls that come after it.

In a process pool all functions of a script share its globals, so that an initializer can prepare
what tasks use. Here functions and classes of a script come by value, each with its globals and
attributes as they are in the client when it is submitted. What the initializer has bound anew in
this process, or has changed in place, takes precedence over that. It stays here: functions and
classes that results refer to go back with what they came with, as it may not survive pickling, is
often large, and would take the place of the client's own.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import deque
from collections.abc import Callable, Mapping
from types import FunctionType, ModuleType
from typing import Any

from cloudpickle import cloudpickle

from cloudexec._payload import Pickler

__all__ = ["ResultPickler", "initialize"]

_MISSING = object()
_prepared: dict[str, dict[str, Any]] = {}  # by the name of the module that they are globals of
_attributes: dict[type, dict[str, Any]] = {}  # of classes that came by value
_sent_attributes: dict[type, dict[str, Any]] = {}  # what these have in the client
_SENT = "__cloudexec_sent__"  # among a function's globals: what those prepared are in the client


def initialize(initializer: Callable[..., object], initargs: tuple[Any, ...]) -> None:
    """Call an initializer, and keep what it leaves for the functions that come later.

    Raises:
        BaseException: Whatever the initializer raises.
    """
    scope = _globals_of(initializer)
    if scope is None:
        initializer(*initargs)
        return
    name = scope.get("__name__", "")
    candidates = (*scope.values(), getattr(initializer, "__self__", None))
    classes = {each for each in candidates if isinstance(each, type) and each.__module__ == name}
    before = _noted(scope)
    attributes = {each: _noted(vars(each)) for each in classes}
    initializer(*initargs)
    changed = _changed(scope, before)
    changed.pop("__builtins__", None)  # put there by whoever runs code in it
    if changed:
        _prepared[name] = changed
        scope[_SENT] = _replaced(changed, before)
        cloudpickle._function_setstate = _set_function_state
    for each, noted in attributes.items():
        if differing := _changed(vars(each), noted):
            _attributes[each] = differing
            _sent_attributes[each] = _replaced(differing, noted)
            cloudpickle._class_setstate = _set_class_state


_Noted = dict[str, tuple[Any, "list[Any] | None"]]


def _noted(names: Mapping[str, Any]) -> _Noted:
    return {name: (value, _content(value)) for name, value in names.items()}


def _changed(names: Mapping[str, Any], before: _Noted) -> dict[str, Any]:
    changed = {}
    for name, value in list(names.items()):  # threads of the initializer may add to them
        old, content = before.get(name, (_MISSING, None))
        if value is not old or not _is_same(_content(value), content):
            changed[name] = value
    return changed


def _replaced(changed: dict[str, Any], before: _Noted) -> dict[str, Any]:
    """Return what stood where there is something else now; what changed in place is lost."""
    olds = {name: before[name][0] for name in changed.keys() & before.keys()}
    return {name: old for name, old in olds.items() if old is not changed[name]}


def _globals_of(fn: Any) -> dict[str, Any] | None:
    """Return the globals of a function that came by value; ``None``: of a module, or there are
    none."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    fn = getattr(fn, "__func__", fn)
    if not isinstance(fn, FunctionType):
        fn = type(fn).__call__
    if not isinstance(fn, FunctionType):
        return None
    fn = inspect.unwrap(fn)  # a decorator has globals of its own
    scope: dict[str, Any] | None = getattr(fn, "__globals__", None)
    if scope is None:
        return None
    module = sys.modules.get(scope.get("__name__", ""))
    return None if module is not None and module.__dict__ is scope else scope


def _content(value: Any) -> list[Any] | None:
    """Return what is directly in a container or an object; ``None``: it is something else."""
    try:
        if isinstance(value, (ModuleType, FunctionType, type)):
            return None
        if isinstance(value, dict):
            return [*value.keys(), *value.values()]
        if isinstance(value, (list, set, deque)):
            return list(value)
        attributes = getattr(value, "__dict__", None)
    except BaseException:
        return None  # a proxy of something that is not there yet, for instance
    return [*attributes.keys(), *attributes.values()] if type(attributes) is dict else None


def _is_same(one: list[Any] | None, other: list[Any] | None) -> bool:
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


_function_state, _class_state = cloudpickle._function_setstate, cloudpickle._class_setstate


def _set_function_state(fn: FunctionType, state: Any) -> None:
    """Give a function that comes by value its globals."""
    own = state[1]["__globals__"]
    _function_state(fn, state)
    scope = fn.__globals__
    prepared = _prepared.get(scope.get("__name__", ""))
    if prepared is not None:
        sent = scope.setdefault(_SENT, {})
        sent.update({name: own[name] for name in own.keys() & prepared.keys()})
        scope.update(prepared)


def _set_class_state(kind: type, state: Any) -> type:
    """Give a class that comes by value, for the first time or once more, its attributes."""
    _class_state(kind, state)
    attributes = _attributes.get(kind)
    if attributes is not None:
        own = state[0]
        sent = {name: own[name] for name in own.keys() & attributes.keys()}
        _sent_attributes[kind] = sent
        for name, value in attributes.items():
            setattr(kind, name, value)
    return kind


# They stand in for cloudpickle's, also in what is pickled here.
for _new, _old in ((_set_function_state, _function_state), (_set_class_state, _class_state)):
    _new.__module__, _new.__qualname__, _new.__name__ = (
        _old.__module__,
        _old.__qualname__,
        _old.__name__,
    )


class ResultPickler(Pickler):
    """Sends back what the client has, not what the initializer has put in its place."""

    def reducer_override(self, obj: Any) -> Any:
        reduced = super().reducer_override(obj)
        if type(reduced) is tuple and len(reduced) == 6:
            if type(obj) is FunctionType:
                scope = obj.__globals__
                prepared = _prepared.get(scope.get("__name__", ""), {})
                _restore(reduced[2][1]["__globals__"], prepared, scope.get(_SENT, {}))
            elif obj in _attributes:
                _restore(reduced[2][0], _attributes[obj], _sent_attributes[obj])
        return reduced


def _restore(names: dict[str, Any], prepared: dict[str, Any], sent: dict[str, Any]) -> None:
    for name in names.keys() & prepared.keys():
        if names[name] is not prepared[name]:
            continue  # a task has put it there
        if name in sent:
            names[name] = sent[name]
        else:
            del names[name]
