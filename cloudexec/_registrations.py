"""Finds what a script has registered in the standard library: reducers, adapters, virtual classes.

A worker that is no copy of the program imports the standard library anew. What is registered there
for the script's classes is sent with the script's globals, as only these can be found by then.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from cloudexec._main import NAMES

__all__ = ["Registration", "registrations"]

_TABLES = (("copyreg", "dispatch_table"), ("sqlite3", "adapters"), ("sqlite3", "converters"))
"""Dictionaries, with classes or functions of programs in their keys or values."""
_ABSTRACT = ("collections.abc", "numbers", "os")
"""Modules with abstract classes for which programs register their own."""


class Registration:
    """What a worker that unpickles it registers: entries of a table, or pairs of classes.

    Args:
        where: The names of a module and of a dictionary in it; empty for pairs of an abstract class
            and a class that is registered with it.
        entries: The entries of the dictionary, or the pairs.
    """

    def __init__(self, where: tuple[str, ...], entries: Any) -> None:
        self.where = where
        self.entries = entries

    def __reduce__(self) -> Any:
        return _register, (self.where, self.entries)


def _register(where: tuple[str, ...], entries: Any) -> None:
    if where:
        getattr(importlib.import_module(where[0]), where[1]).update(entries)
    else:
        for abstract, cls in entries:
            abstract.register(cls)


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
        if isinstance(abstract, type) and hasattr(abstract, "_abc_impl")
        for cls in _registered_with(abstract)
        if _is_of_script(cls)
    ]
    if pairs:
        yield Registration((), pairs)


def _parts(key: object) -> tuple[object, ...]:
    return key if isinstance(key, tuple) else (key,)


def _is_of_script(value: object) -> bool:
    return isinstance(value, (FunctionType, type)) and value.__module__ in NAMES


def _registered_with(abstract: type) -> list[object]:
    try:
        found = importlib.import_module("_abc")._get_dump(abstract)[0]
    except (ImportError, AttributeError):
        return []  # another implementation of Python
    return [each() for each in found]
