"""What the reducers of ``_anew`` share: objects that are made first and filled afterwards."""

from __future__ import annotations

import contextlib
import copyreg
import sys
from collections.abc import Callable
from typing import Any

import cloudpickle

__all__ = [
    "attributes_of",
    "bare",
    "is_importable",
    "is_of_script",
    "make",
    "own_attributes",
    "reduce_by_init",
    "set_attributes",
]


def bare(kind: Any) -> Any:
    """Make an object whose ``__init__`` is still to be called."""
    return kind.__new__(kind)


def attributes_of(obj: Any) -> dict[str, Any]:
    """Return all attributes of an object, those in slots too."""
    found = dict(getattr(obj, "__dict__", ()))
    for name in copyreg._slotnames(type(obj)):  # type: ignore[attr-defined]
        with contextlib.suppress(AttributeError):
            found[name] = getattr(obj, name)
    return found


def own_attributes(obj: Any, base: type, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes that a class of the user's has added to one of the library's."""
    usual = attributes_of(base(**parameters))
    return {name: value for name, value in attributes_of(obj).items() if name not in usual}


def reduce_by_init(
    obj: Any, base: type, parameters: dict[str, Any], kept: dict[str, Any]
) -> tuple[Any, ...]:
    """Reduce an object to its class's ``__init__`` and what was set besides."""
    state = (base, parameters, own_attributes(obj, base, parameters) | kept)
    return bare, (type(obj),), state, None, None, _initialize


def _initialize(obj: Any, state: tuple[type[Any], dict[str, Any], dict[str, Any]]) -> None:
    base, parameters, attributes = state
    base.__init__(obj, **parameters)
    for name, value in attributes.items():
        setattr(obj, name, value)


def set_attributes(obj: Any, attributes: dict[str, Any]) -> None:
    """Give an object its attributes back."""
    for name, value in attributes.items():
        setattr(obj, name, value)


def make(kind: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Call a class with keywords, too."""
    return kind(*args, **keywords)


def is_importable(fn: Any) -> bool:
    """Whether a function travels by its name: it is in a module that can be imported elsewhere."""
    module = getattr(fn, "__module__", None)
    if is_of_script(module):
        return False
    found: Any = sys.modules.get(module) if isinstance(module, str) else None
    try:
        for part in fn.__qualname__.split("."):
            found = getattr(found, part)
    except AttributeError:
        return False
    return found is fn


def is_of_script(module: Any) -> bool:
    """Whether what is in the module of that name travels by value."""
    if not isinstance(module, str) or module in ("__main__", "__mp_main__"):
        return True
    by_value = cloudpickle.list_registry_pickle_by_value()
    while by_value and module:
        if module in by_value:
            return True
        module = module.rpartition(".")[0]
    return False
