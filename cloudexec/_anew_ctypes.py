"""Reducers for libraries that ctypes has loaded, their functions and types; see ``_anew``."""

from __future__ import annotations

import ctypes
import gc
import operator
from typing import Any

import cloudpickle

from cloudexec._anew_basics import is_importable, make, set_attributes

__all__ = [
    "reduce_array_type",
    "reduce_function_pointer",
    "reduce_function_pointer_type",
    "reduce_library",
    "reduce_pointer_type",
    "reduce_structure",
]


def reduce_library(library: Any) -> tuple[Any, ...]:
    """Reduce a library that was loaded: it is loaded there by the same name."""
    if library is ctypes.pythonapi:
        return getattr, (ctypes, "pythonapi")
    function = library._FuncPtr
    settings = {
        name: _function_settings(value)
        for name, value in vars(library).items()
        if isinstance(value, function)
    }
    flags = function._flags_
    keywords = {
        "use_errno": bool(flags & ctypes._FUNCFLAG_USE_ERRNO),  # type: ignore[attr-defined]
        "use_last_error": bool(flags & ctypes._FUNCFLAG_USE_LASTERROR),  # type: ignore[attr-defined]
    }
    args = type(library), (library._name,), keywords
    return make, args, settings, None, None, _set_functions


def _function_settings(function: Any) -> dict[str, Any]:
    """Return what the script has told about a function of a library."""
    kind = type(function)
    names = ("argtypes", "restype", "errcheck")
    found = {name: getattr(function, name, None) for name in names}
    usual = {"argtypes": None, "restype": kind._restype_, "errcheck": None}
    return {name: value for name, value in found.items() if value is not usual[name]}


def _set_functions(library: Any, settings: dict[str, dict[str, Any]]) -> None:
    for name, attributes in settings.items():
        set_attributes(getattr(library, name), attributes)


def reduce_function_pointer(function: Any) -> tuple[Any, ...] | None:
    """Reduce a function of a library, or one that C may call."""
    kind = type(function)
    if kind.__module__ == "ctypes" and kind.__qualname__ in _CALLBACKS:
        targets = [
            each
            for each in gc.get_referents(function)
            if callable(each) and each is not kind and not isinstance(each, type)
        ]
        return (kind, (targets[0],)) if len(targets) == 1 else None
    library = (function._objects or {}).get("0")
    name = getattr(function, "__name__", None)
    if not isinstance(library, ctypes.CDLL) or not isinstance(name, str):
        return None
    args = library, name, vars(library).get(name) is function
    state = _function_settings(function) or None
    return _find_in_library, args, state, None, None, set_attributes


def _find_in_library(library: Any, name: str, is_attribute: bool) -> Any:
    return getattr(library, name) if is_attribute else library[name]


_CALLBACKS = {"CFUNCTYPE.<locals>.CFunctionType", "PYFUNCTYPE.<locals>.CFunctionType"}


def reduce_function_pointer_type(kind: Any) -> tuple[Any, ...] | None:
    """Reduce the type of functions that C may call."""
    if kind.__module__ != "ctypes" or kind.__qualname__ not in _CALLBACKS:
        return None
    args = kind._restype_, *kind._argtypes_
    if kind.__qualname__.startswith("PYFUNCTYPE"):
        return ctypes.PYFUNCTYPE, args
    flags = kind._flags_
    keywords = {
        "use_errno": bool(flags & ctypes._FUNCFLAG_USE_ERRNO),  # type: ignore[attr-defined]
        "use_last_error": bool(flags & ctypes._FUNCFLAG_USE_LASTERROR),  # type: ignore[attr-defined]
    }
    return make, (ctypes.CFUNCTYPE, args, keywords)


def reduce_array_type(kind: Any) -> tuple[Any, ...] | None:
    """Reduce the type of ``c_int * 3``, of which a process has one."""
    type_, length = getattr(kind, "_type_", None), getattr(kind, "_length_", None)
    if type_ is None or type_ * length is not kind:
        return None  # a class of the user's
    return operator.mul, (type_, length)


def reduce_pointer_type(kind: Any) -> tuple[Any, ...] | None:
    """Reduce the type of pointers to something, of which a process has one."""
    type_ = getattr(kind, "_type_", None)
    if type_ is None or ctypes.POINTER(type_) is not kind:
        return None
    return ctypes.POINTER, (type_,)


def reduce_structure(kind: Any) -> tuple[Any, ...] | None:
    """Reduce a structure or union of the script's: setting ``_fields_`` makes its descriptors."""
    if is_importable(kind):
        return None
    make, args, state, *_, _set = cloudpickle.cloudpickle._dynamic_class_reduce(kind)
    attributes, slots = state
    fields = attributes.pop("_fields_", None)
    attributes = {
        name: value
        for name, value in attributes.items()
        if type(value).__qualname__ != "CField"  # of _ctypes, since Python 3.14 of ctypes
    }
    if fields is not None:
        attributes["_fields_"] = fields  # behind what says how they are laid out
    return make, args, (attributes, slots), None, None, _set_structure


def _set_structure(kind: Any, state: tuple[dict[str, Any], Any]) -> Any:
    attributes, slots = state
    if "_fields_" in vars(kind):
        attributes.pop("_fields_", None)  # it has come before, and they are final
    return cloudpickle.cloudpickle._class_setstate(kind, (attributes, slots))
