"""The user's own modules, sent along to workers on other machines.

What is installed there is part of the worker's image; what is not, and was imported here, is source
on this machine: scripts' neighbours, packages under development. It travels as a zip archive.
"""

from __future__ import annotations

import io
import os
import sys
import sysconfig
import zipfile
from collections.abc import Container, Iterator
from types import ModuleType

from cloudexec._errors import PayloadTooLargeError

__all__ = [
    "MODULES_LIMIT_BYTES",
    "installed_directories",
    "local_modules",
    "own_modules",
    "pack_modules",
]

MODULES_LIMIT_BYTES = 64 * 1024 * 1024
"""Most that is sent, before compression: beyond it, something was imported that is no source."""
_FILE_LIMIT_BYTES = 4 * 1024 * 1024
"""Larger files in a package are data, which a worker gets in another way."""
_SKIPPED = {"__pycache__", "node_modules", "venv", "env", "build", "dist"}
_EPOCH = (1980, 1, 1, 0, 0, 0)


def installed_directories() -> tuple[str, ...]:
    """Return the directories whose modules an image has by installing them."""
    paths = sysconfig.get_paths()
    found = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    found.update(
        path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")
    )
    return tuple(os.path.realpath(path) + os.sep for path in found)


def own_modules() -> list[str]:
    """Return the names of the modules here that are the user's own, in the order of their imports.

    Those are all that come from files which are neither installed nor part of Python or of this
    package; not ``__main__``.
    """
    installed = installed_directories()
    places: dict[str, bool] = {}

    def is_installed(path: str) -> bool:
        directory = os.path.dirname(path)
        if directory not in places:
            places[directory] = (os.path.realpath(directory) + os.sep).startswith(installed)
        return places[directory]

    found = []
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in ("__main__", "__mp_main__", "cloudexec"):
            continue
        where = getattr(module, "__file__", None)
        paths = [where] if where else [f"{path}/" for path in getattr(module, "__path__", ())]
        if paths and not any(isinstance(path, str) and is_installed(path) for path in paths):
            found.append(name)
    return found


def local_modules(only: Container[str] | None = None) -> dict[str, str]:
    """Find the files of modules that were imported and are not installed.

    A package is taken whole, since its parts may be imported later; ``__main__`` travels with the
    functions that are defined in it.

    Args:
        only: Top-level names to take, wherever they are; ``None``: all that are not installed.

    Returns:
        Name in the archive -> path.
    """
    installed = installed_directories()
    files: dict[str, str] = {}
    seen: set[str] = set()
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        if top in seen or top in ("__main__", "__mp_main__", "cloudexec"):
            continue
        path = _source(module)
        if path is None or (only is not None and top not in only):
            continue
        if only is None and os.path.realpath(path).startswith(installed):
            continue
        root = sys.modules.get(top)
        start = _source(root) if root is not None else None
        if start is None:
            # Part of a namespace package: each module on its own.
            files[_arcname(name, path)] = path
            continue
        seen.add(top)
        if os.path.basename(start) == "__init__.py":
            files.update(_package(top, os.path.dirname(start)))
        else:
            files[f"{top}.py"] = start
    return files


def _source(module: ModuleType | None) -> str | None:
    path = getattr(module, "__file__", None)
    return path if isinstance(path, str) and path.endswith(".py") and os.path.isfile(path) else None


def _arcname(name: str, path: str) -> str:
    base = name.replace(".", "/")
    return f"{base}/__init__.py" if os.path.basename(path) == "__init__.py" else f"{base}.py"


def _package(top: str, root: str) -> Iterator[tuple[str, str]]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(
            name for name in subdirectories if name not in _SKIPPED and not name.startswith(".")
        )
        for name in sorted(names):
            path = os.path.join(directory, name)
            if name.startswith(".") or name.endswith((".pyc", ".so", ".pyd")):
                continue
            try:
                if os.path.getsize(path) > _FILE_LIMIT_BYTES or not os.path.isfile(path):
                    continue
            except OSError:
                continue
            inside = os.path.relpath(path, root).replace(os.sep, "/")
            yield f"{top}/{inside}", path


def pack_modules(files: dict[str, str]) -> bytes:
    """Return a zip archive of files; the same files give the same bytes.

    Raises:
        PayloadTooLargeError: If they are too much to be the source of modules.
    """
    if not files:
        return b""
    total = 0
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            try:
                with open(files[name], "rb") as file:
                    data = file.read()
            except OSError:
                continue
            total += len(data)
            if total > MODULES_LIMIT_BYTES:
                raise PayloadTooLargeError(
                    f"the modules that workers need from here are larger than "
                    f"{MODULES_LIMIT_BYTES // 2**20} MiB, at {files[name]}: install them in the "
                    f"image (`cloudexec image push --requirements`) and give modules=False, or "
                    f"name those that are to be sent: modules=['mine']",
                    size_bytes=total,
                    limit_bytes=MODULES_LIMIT_BYTES,
                )
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
