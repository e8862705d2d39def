"""Finds the user's own modules and packs them into a zip archive for workers on other machines.

Installed modules are part of the worker's image. All other modules that were imported here, such as
files next to the script and packages under development, are sent as source.
"""

from __future__ import annotations

import io
import os
import sys
import sysconfig
from collections.abc import Callable, Container, Iterator
from types import ModuleType

from cloudexec._errors import PayloadTooLargeError

__all__ = [
    "MODULES_LIMIT_BYTES",
    "installed_directories",
    "local_modules",
    "own_modules",
    "package_files",
    "pack_modules",
]

MODULES_LIMIT_BYTES = 64 * 1024 * 1024
"""Most bytes that are sent, before compression; a larger amount is probably not source."""
_FILE_LIMIT_BYTES = 4 * 1024 * 1024
"""Larger files in a package are taken for data and are not sent with the modules."""
_SKIPPED = {"__pycache__", "node_modules", "venv", "env", "build", "dist"}
_EPOCH = (1980, 1, 1, 0, 0, 0)


def installed_directories() -> tuple[str, ...]:
    """Return the directories of installed modules, which an image has, too."""
    paths = sysconfig.get_paths()
    found = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    found.update(
        path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")
    )
    return tuple(os.path.realpath(path) + os.sep for path in found)


_known: dict[tuple[str, ...], dict[str, bool]] = {}
"""Whether a file, or a directory, is one of installed modules, by the directories of such."""


def _recognizer() -> Callable[[str], bool]:
    """Return a function that says whether a file is that of an installed module.

    It resolves the links of each directory once: programs have thousands of modules.
    """
    installed = installed_directories()
    known = _known.setdefault(installed, {})

    def is_installed(path: str) -> bool:
        found = known.get(path)
        if found is None:
            directory = os.path.dirname(path) + os.sep
            if directory not in known:
                known[directory] = (os.path.realpath(directory) + os.sep).startswith(installed)
            found = known[path] = known[directory]
        return found

    return is_installed


def own_modules() -> list[str]:
    """Return the names of the user's own imported modules, in the order of their imports.

    These are all modules from files that are neither installed nor part of Python or of this
    package. ``__main__`` is left out.
    """
    is_installed = _recognizer()
    found = []
    for name, module in list(sys.modules.items()):
        where = getattr(module, "__file__", None)
        if type(where) is str and is_installed(where):
            continue
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in ("__main__", "__mp_main__", "cloudexec"):
            continue
        paths = [where] if where else [f"{path}/" for path in getattr(module, "__path__", ())]
        if paths and not any(isinstance(path, str) and is_installed(path) for path in paths):
            found.append(name)
    return found


def local_modules(only: Container[str] | None = None) -> dict[str, str]:
    """Find the files of modules that were imported and are not installed.

    All files of a package are taken, since its modules may be imported later. ``__main__`` is left
    out, as its functions and classes are pickled by value.

    Args:
        only: Top-level names to take, even installed ones; ``None`` takes all that are not
            installed.

    Returns:
        The path of each file, by its name in the archive.
    """
    is_installed = _recognizer()
    files: dict[str, str] = {}
    seen: set[str] = set()
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        if top in seen or top in ("__main__", "__mp_main__", "cloudexec"):
            continue
        path = _source(module)
        if path is None or (only is not None and top not in only):
            continue
        if (only is None and is_installed(path)) or not os.path.isfile(path):
            continue
        root = sys.modules.get(top)
        start = _source(root)
        if start is None or not os.path.isfile(start):
            # In a namespace package each module is taken by itself.
            files[_arcname(name, path)] = path
            continue
        seen.add(top)
        if os.path.basename(start) == "__init__.py":
            files.update(package_files(top, os.path.dirname(start)))
        else:
            files[f"{top}.py"] = start
    return files


def _source(module: ModuleType | None) -> str | None:
    """Return the path of a module's source, which need not exist."""
    path = getattr(module, "__file__", None)
    return path if isinstance(path, str) and path.endswith(".py") else None


def _arcname(name: str, path: str) -> str:
    base = name.replace(".", "/")
    return f"{base}/__init__.py" if os.path.basename(path) == "__init__.py" else f"{base}.py"


def package_files(top: str, root: str) -> Iterator[tuple[str, str]]:
    """Yield name in an archive and path of each file of a package that can be sent.

    Args:
        top: The package's name.
        root: Its folder.
    """
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
        PayloadTooLargeError: If the files have more than ``MODULES_LIMIT_BYTES`` together.
    """
    if not files:
        return b""
    key = _state_of(files)
    if (known := _packed.get(key)) is not None:
        return known
    import zipfile  # few programs have modules of their own

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
                    f"the modules to be sent to workers have more than "
                    f"{MODULES_LIMIT_BYTES // 2**20} MiB, counted up to {files[name]}: install "
                    f"them in the image (`cloudexec image push --requirements`) and give "
                    f"modules=False, or name the modules to be sent: modules=['mine']",
                    size_bytes=total,
                    limit_bytes=MODULES_LIMIT_BYTES,
                )
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    packed = buffer.getvalue()
    _packed.clear()
    _packed[key] = packed
    return packed


_packed: dict[tuple[tuple[str, str, int, int], ...], bytes] = {}
"""The last archive, as a program's next executor needs the same, by what was known of its files."""


def _state_of(files: dict[str, str]) -> tuple[tuple[str, str, int, int], ...]:
    found = []
    for name in sorted(files):
        try:
            about = os.stat(files[name])
        except OSError:
            continue
        found.append((name, files[name], about.st_mtime_ns, about.st_size))
    return tuple(found)
