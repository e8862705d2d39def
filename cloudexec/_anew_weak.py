"""Reducers for weak references, and for what consists of them; see ``_anew``."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from cloudexec._anew_basics import bare, own_attributes, set_attributes

__all__ = [
    "reduce_finalizer",
    "reduce_proxy",
    "reduce_reference",
    "reduce_weak_container",
    "reduce_weak_method",
]

_held: deque[Any] = deque(maxlen=1024)
"""What weak references point to lives on: what holds it in the client may not have been sent."""


class _Dead:
    """Something to refer to that has ended."""

    def method(self) -> None: ...


def reduce_reference(reference: Any) -> tuple[Any, ...] | None:
    """Reduce a weak reference with what it points to."""
    if type(reference) is not weakref.ref:
        return None
    target = reference()
    if target is None:
        return _make_dead, (weakref.ref,)
    callback = reference.__callback__
    args = (target,) if callback is None else (target, callback)
    return _refer, (weakref.ref, target, *args)


def reduce_weak_method(reference: Any) -> tuple[Any, ...] | None:
    """Reduce a weak reference to a method."""
    method = reference()
    if method is None:
        return _make_dead, (weakref.WeakMethod,)
    return _refer, (weakref.WeakMethod, method.__self__, method)


def reduce_proxy(proxy: Any) -> tuple[Any, ...] | None:
    """Reduce a proxy with what it stands for."""
    try:
        target = proxy.__repr__.__self__
    except ReferenceError:
        return _make_dead, (weakref.proxy,)
    return _refer, (weakref.proxy, target, target)


def _refer(make: Callable[..., Any], target: Any, *args: Any) -> Any:
    _held.append(target)
    return make(*args)


def _make_dead(make: Callable[..., Any]) -> Any:
    dead = _Dead()
    return make(dead.method if make is weakref.WeakMethod else dead)


def reduce_weak_container(container: Any) -> tuple[Any, ...]:
    """Reduce a set or dictionary of weak references with what these point to."""
    base = next(base for base in _WEAK_CONTAINERS if isinstance(container, base))
    items = list(container if base is weakref.WeakSet else container.items())
    attributes = own_attributes(container, base, {})
    return bare, (type(container),), (base, items, attributes), None, None, _fill


_WEAK_CONTAINERS: tuple[type[Any], ...] = (
    weakref.WeakSet,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
)


def _fill(container: Any, state: tuple[type[Any], list[Any], dict[str, Any]]) -> None:
    base, items, attributes = state
    base.__init__(container, items)
    set_attributes(container, attributes)
    _held.append(items)


def reduce_finalizer(_: Any) -> tuple[Any, ...]:
    """Reduce a finalizer to one that has nothing to do: what it ends is the original's."""
    return bare, (weakref.finalize,)
