"""Finds what a script has registered in libraries, and what it has replaced in them.

Reducers, adapters and virtual classes are registered; ``json.dumps = dumps`` replaces a function,
and ``logging.setLoggerClass()`` a class. A worker that is no copy of the program imports libraries
anew. What they have of the script is sent with the script's globals, as only these can be found by
then.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from cloudexec._describing import is_a
from cloudexec._main import NAMES, namespace
from cloudexec._modules import own_modules

__all__ = ["Registration", "registrations"]

_TABLES = (("copyreg", "dispatch_table"), ("sqlite3", "adapters"), ("sqlite3", "converters"))
"""Dictionaries, with classes or functions of programs in their keys or values."""
_ABSTRACT = ("collections.abc", "numbers", "os")
"""Modules with abstract classes for which programs register their own."""


class Registration:
    """What a worker that unpickles it registers: entries of a table, attributes, pairs of classes.

    Args:
        where: The names of a module, and of a dictionary or a class in it if there is a second one;
            empty for pairs of an abstract class and a class that is registered with it.
        entries: The entries of the dictionary, or the attributes of the module or class, by name;
            or the pairs.
    """

    def __init__(self, where: tuple[str, ...], entries: Any) -> None:
        self.where = where
        self.entries = entries

    def __reduce__(self) -> Any:
        return _register, (self.where, self.entries)


def _register(where: tuple[str, ...], entries: Any) -> None:
    if not where:
        for abstract, cls in entries:
            abstract.register(cls)
        return
    holder: Any = importlib.import_module(where[0])
    for name in where[1:]:
        holder = getattr(holder, name)
    if isinstance(holder, dict):
        holder.update(entries)
        return
    for name, value in entries.items():
        setattr(holder, name, value)


def registrations() -> Iterator[Registration]:
    """Yield what the script has registered."""
    for where in _TABLES:
        table = getattr(sys.modules.get(where[0]), where[1], {})
        entries = {
            key: value
            for key, value in list(table.items())
            if _is_of_script(value) or any(map(_is_of_script, _parts(key)))
        }
        if entries:
            yield Registration(where, entries)
    pairs = [
        (abstract, cls)
        for module in _ABSTRACT
        for abstract in list(vars(sys.modules.get(module, sys)).values())
        if is_a(abstract, type) and hasattr(abstract, "_abc_impl")
        for cls in _registered_with(abstract)
        if _is_of_script(cls)
    ]
    if pairs:
        yield Registration((), pairs)
    yield from _replaced()


def _replaced() -> Iterator[Registration]:
    """Yield what modules and classes that the script imports have of it as attributes."""
    places: dict[int, tuple[str, ...]] = {}
    for value in list(namespace().values()):
        if issubclass(type(value), ModuleType):
            content = vars(value)
            module = content.get("__name__")
            places[id(value)] = (module,)
            for name, each in list(content.items()):
                if issubclass(type(each), type) and _top(_module_of(each)) == _top(module):
                    places.setdefault(id(each), (module, name))
        elif issubclass(type(value), type):
            places.setdefault(id(value), (_module_of(value), value.__name__))
    for number, where in places.items():
        if where[0] in NAMES:
            continue
        found: Any = sys.modules.get(where[0])
        for name in where[1:]:
            found = getattr(found, "__dict__", {}).get(name)
        if id(found) != number:
            continue
        entries = {name: value for name, value in list(vars(found).items()) if _is_of_script(value)}
        # What the user's own modules have is sent with their state.
        if entries and where[0] not in own_modules():
            yield Registration(where, entries)


def _module_of(cls: type) -> str:
    return str(type.__getattribute__(cls, "__dict__").get("__module__", ""))


def _top(module: object) -> str:
    return str(module).partition(".")[0]


def _parts(key: object) -> tuple[object, ...]:
    return key if isinstance(key, tuple) else (key,)


def _is_of_script(value: object) -> bool:
    # What a class has for ``__class__`` and ``__module__`` may be a property that raises.
    if is_a(value, type):
        return _module_of(value) in NAMES
    return is_a(value, FunctionType) and value.__module__ in NAMES


def _registered_with(abstract: type) -> list[object]:
    try:
        found = importlib.import_module("_abc")._get_dump(abstract)[0]
    except (ImportError, AttributeError):
        return []  # another implementation of Python
    return [each() for each in found]
