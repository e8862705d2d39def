"""Which modules workers on this machine are to import in advance: those that the script imports.

Looked up in the source of the script, of the module that the first function is from, and of the
user's own modules that these import. What counts is what is installed and was imported here: the
user's own modules may do anything when they are imported, so each process that runs tasks imports
those by itself, when a task needs them.
"""

from __future__ import annotations

import ast
import functools
import os
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import resolve_name
from types import ModuleType

from cloudexec._modules import installed_directories

__all__ = ["modules_of"]

_MOST_SOURCE = 512 * 1024
"""Bytes of source that are looked at: parsing takes some ten milliseconds per thousand lines."""
_NEVER = {"cloudexec", "IPython", "ipykernel", "ipywidgets", "polars"}
"""Packages that serve the client alone, or that start threads when they are imported: a worker
would find that out by itself, and start over, which takes it as long as the import."""


def modules_of(fn: object) -> list[str]:
    """Return the names of modules that tasks will probably import, in the order of the source.

    Args:
        fn: The function of the first task, or ``None``.
    """
    installed = (*installed_directories(), os.path.realpath(sysconfig.get_path("scripts")) + os.sep)
    found: dict[str, None] = {}
    seen: set[str] = set()
    roots = {_module_of(fn), "__main__", "__mp_main__"}
    waiting = [name for name in roots if name in sys.modules]
    room = _MOST_SOURCE
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if name in seen or not isinstance(module, ModuleType):
            continue
        seen.add(name)
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in _NEVER:
            continue
        if _is_installed(module, installed):
            if top not in ("__main__", "__mp_main__"):
                found[name] = None
            continue
        source = _source(module)
        room -= len(source)
        if room < 0:
            break
        names = _imported(source, module.__package__ or "") if source else _named(module)
        # The first one is to be looked at first.
        waiting += reversed([each for each in names if each in sys.modules])
    return list(found)


def _module_of(fn: object) -> str:
    try:
        for _ in range(8):
            inner = fn.func if isinstance(fn, functools.partial) else fn
            fn = getattr(inner, "_called_for_each", inner)  # of map(chunksize=...)
            if fn is inner and not isinstance(fn, functools.partial):
                break
        return str(getattr(fn, "__module__", None) or type(fn).__module__)
    except Exception:
        return ""  # a proxy of something, for instance


def _is_installed(module: ModuleType, installed: tuple[str, ...]) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and os.path.realpath(file).startswith(installed)


def _source(module: ModuleType) -> str:
    spec = getattr(module, "__spec__", None)
    try:
        name = module.__name__ if spec is None else spec.name
        return module.__loader__.get_source(name) or ""  # type: ignore[union-attr]
    except Exception:
        return ""  # a notebook, or what was typed


def _imported(source: str, package: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                base = resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:
                continue
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _named(module: ModuleType) -> Iterator[str]:
    """Return the modules that a module without source names: itself, or as those of its classes
    and functions."""
    for value in list(vars(module).values()):
        if isinstance(value, ModuleType):
            yield value.__name__
        elif type(value).__name__ in ("function", "builtin_function_or_method", "type"):
            yield str(getattr(value, "__module__", ""))
