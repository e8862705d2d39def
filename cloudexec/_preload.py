"""Finds the modules that workers on this machine import in advance: those that the script imports.

They are looked up in the source of the script, of the module of the first function, and of the
user's own modules that these import. Only modules that are installed and were imported here are
taken. The user's own modules may do anything when they are imported, so each process that runs
tasks imports those when a task needs them.
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

from cloudexec._describing import is_a
from cloudexec._modules import installed_directories

__all__ = ["modules_of"]

_MOST_SOURCE = 512 * 1024
"""Most bytes of source that are parsed, which takes some ten milliseconds per thousand lines."""
_NEVER = {"cloudexec", "execnet", "IPython", "ipykernel", "ipywidgets", "polars"}
"""Packages that only the client uses, such as what pytest-xdist runs its processes with, or that
start threads when they are imported. A worker would notice the threads and start again without the
package, which takes as long as the import."""


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
        # The list is used from its end, so the first name must come last.
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
        return ""  # reading attributes may raise, for instance those of a proxy object


def _is_installed(module: ModuleType, installed: tuple[str, ...]) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and os.path.realpath(file).startswith(installed)


def _source(module: ModuleType) -> str:
    spec = getattr(module, "__spec__", None)
    try:
        name = module.__name__ if spec is None else spec.name
        return module.__loader__.get_source(name) or ""  # type: ignore[union-attr]
    except Exception:
        return ""  # a notebook or an interactive session has no source


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
    """Yield the modules among a module's globals, and the modules of its classes and functions.

    This serves for a module without source, and for one that pytest has rewritten. pytest adds
    globals such as ``@pytest_ar`` to it, which no program can name: these are left out.
    """
    for name, value in list(vars(module).items()):
        if not name.isidentifier():
            continue
        if is_a(value, ModuleType):
            yield value.__name__
        elif type(value).__name__ in ("function", "builtin_function_or_method", "type"):
            yield str(getattr(value, "__module__", ""))
