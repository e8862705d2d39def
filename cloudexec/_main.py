"""The script, ``__main__``: which objects travel as a name in it, and what shares its globals.

In a process that runs tasks it is a mirror of the client's: see ``worker/main_module.py``.
"""

from __future__ import annotations

import ast
import functools
import os
import runpy
import sys
from types import CellType, CodeType, FunctionType
from typing import Any

__all__ = ["NAMED", "Again", "function", "name_of", "namespace", "way_to_script"]

NAMED = frozenset({FunctionType, type, type(functools.lru_cache(len))})
"""Types of what a module defines under the name that it knows itself; and all classes."""
_NAMES = frozenset({"__main__", "__mp_main__"})
"""What the script is called, also in a process that ``multiprocessing`` has spawned from it."""
_ABSENT = object()


def namespace() -> dict[str, Any]:
    """Return the globals of the script."""
    return sys.modules["__main__"].__dict__


def name_of(obj: Any) -> str | None:
    """Return the name that a function or class has in the script; ``None``: it has none there."""
    try:
        name, module = obj.__qualname__, obj.__module__
    except Exception:
        return None
    if module not in _NAMES or type(name) is not str:
        return None
    first, _, rest = name.partition(".")
    found = namespace().get(first, _ABSENT)
    while rest and found is not _ABSENT:
        first, _, rest = rest.partition(".")
        try:
            found = getattr(found, first)
        except Exception:
            return None
    return name if found is obj else None


def function(code: CodeType, closure: tuple[CellType, ...] | None) -> FunctionType:
    """Make a function that shares the globals of the script."""
    return FunctionType(code, namespace(), None, None, closure)


class Again:
    """Globals of the script that are taken from it by running it once more, in another process.

    Args:
        way: ``"path"`` or ``"module"``.
        where: Which it is.
        names: Of the globals.
    """

    def __init__(self, way: str, where: str, names: list[str]) -> None:
        self._arguments = way, where, names

    def __reduce__(self) -> Any:
        return _take_again, self._arguments


@functools.cache
def _run_again(way: str, where: str) -> dict[str, Any]:
    run = runpy.run_module if way == "module" else runpy.run_path
    return run(where, run_name="__mp_main__")


def _take_again(way: str, where: str, names: list[str]) -> dict[str, Any]:
    found = _run_again(way, where)
    return {name: found[name] for name in names}


@functools.cache
def way_to_script() -> tuple[tuple[str, str] | None, str]:
    """Say how another process on this machine can run the script up to its guard.

    Returns:
        The way and where it leads, or ``None``; then, why not, if the user can change that.
    """
    names = namespace()
    path, spec = names.get("__file__"), names.get("__spec__")
    if not isinstance(path, str) or not path.endswith(".py"):
        return None, ""
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read())
    except (OSError, ValueError, SyntaxError):
        return None, ""
    if not any(isinstance(each, ast.If) and _is_guard(each.test) for each in tree.body):
        return None, "or put what starts the program under if __name__ == '__main__':"
    if spec is not None:
        return ("module", spec.name), ""
    return ("path", os.path.abspath(path)), ""


def _is_guard(test: ast.expr) -> bool:
    names = {each.id for each in ast.walk(test) if isinstance(each, ast.Name)}
    values = {each.value for each in ast.walk(test) if isinstance(each, ast.Constant)}
    return "__name__" in names and "__main__" in values
