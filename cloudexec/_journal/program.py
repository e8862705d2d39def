"""Digests the code of a program: its script and all modules that are the user's own.

A module is the user's own if it is neither part of Python nor installed. Modules count if they are
loaded, or if an import statement in one that counts names them, also inside a function. Installed
modules count by the versions of their distributions, and Python by its version. No module is
imported or run for this.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.machinery
import json
import os
import pkgutil
import sys
import sysconfig
import threading
from collections.abc import Iterable, Sequence
from types import CodeType
from typing import Any, NamedTuple

from cloudexec._journal.arrivals import Arrivals
from cloudexec._journal.distributions import names_of, versions_of
from cloudexec._journal.sources import (
    Source,
    code_digest,
    imports_in,
    source_of,
    text_source,
)

__all__ = ["Manifest", "Program"]

_RULE = 2
"""Version of the rule by which programs are digested. Another version finds no earlier results."""
_OURS = "cloudexec"
_ALIASES = frozenset({"__mp_main__"})  # multiprocessing's second name for the script
_CODES_KEPT = 4096

Manifest = dict[str, Any]
"""The parts of a program, as JSON: ``python``, ``modules`` and ``distributions``."""


class _Place(NamedTuple):
    """Where a module was found."""

    path: str
    """The module's file, or an empty string if it has no file."""
    search: Sequence[str] | None
    """Folders that hold the package's submodules; ``None`` if the module is no package."""
    loader: Any


_NO_PLACE = _Place("", None, None)


class _Found:
    """The sources of a set of modules and of all modules that they import.

    Attributes:
        sources: Sources of the user's own modules, by the modules' names.
        installed: Top-level names of installed modules.
        seen: All names of modules that were looked at.
        names: Strings in the sources that may be names of modules.
        is_importing: Whether any of the sources imports a module whose name is a string.
    """

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}
        self.installed: set[str] = set()
        self.seen: set[str] = set()
        self.names: set[str] = set()
        self.is_importing = False

    def add(self, name: str, source: Source) -> None:
        """Add the source of one of the user's own modules."""
        self.sources[name] = source
        self.names |= source.names
        self.is_importing = self.is_importing or source.is_importing


class Program:
    """The code of this process, as it is on the disk when it is first looked at.

    Any thread may call it.
    """

    def __init__(self) -> None:
        importlib.invalidate_caches()  # a module may have been written a moment ago
        self._lock = threading.Lock()
        self._places: dict[str, _Place | None] = {}
        self._found = _Found()
        self._by_path: dict[str, tuple[str, Source]] = {}
        self._codes: dict[int, tuple[CodeType, tuple[Any, ...]]] = {}
        self._closures: dict[frozenset[str], bytes] = {}
        self._further: dict[str, Source] = {}  # imported by code that is pickled by value only
        self._arrivals = Arrivals(lambda folder: _kind_of_folder(folder) == "own")
        self._watched: set[str] = set()
        self._path: tuple[str, ...] = ()  # ``sys.path`` when ``_watched`` was last brought up
        self._stems: dict[str, frozenset[str] | None] = {}  # names in folders, for ``_may_hold``
        self._loaded: dict[str, Any] = {}
        self._last: Any = None
        self._count = -1
        self._replaced = ""  # the file of a module that was imported again, after an edit
        self._digest = b""
        self.manifest: Manifest = {}
        """The program's parts, for the journal and for messages."""
        self.digest()

    def digest(self, module: object = None) -> bytes:
        """Digest the program, including modules that were loaded since the last call.

        Args:
            module: The name of a module for which a replacement in ``sys.modules`` is always
                noticed. For other modules it is noticed only if they were deleted first.
        """
        modules = sys.modules
        try:
            # If as many modules were removed as were added, the last one is another one.
            name = next(reversed(modules))
            known = (
                len(modules) == self._count
                and modules[name] is self._last
                and (type(module) is not str or modules.get(module) is self._loaded.get(module))
            )
        except (RuntimeError, LookupError):  # another thread imports something
            known = False
        if not known:
            with self._lock:
                self._grow()
        return self._digest

    def _grow(self) -> None:
        loaded, before_it = dict(sys.modules), self._loaded
        new = {name for name, module in loaded.items() if before_it.get(name) is not module}
        before = {name: each.digest for name, each in self._found.sources.items()}
        installed = len(self._found.installed)
        if "__main__" in new:
            self._add_script()
        own = [name for name in new if name != "__main__" and _is_loaded_own(name)]
        # Modules that were not found before, or were replaced, are looked at anew.
        for name in own:
            if name in before_it or self._places.get(name, _NO_PLACE) is None:
                self._places.pop(name, None)
                self._found.seen.discard(name)
                self._found.sources.pop(name, None)
                self._further.pop(name, None)
                self._closures.clear()
                self._codes.clear()
        self._follow(own, self._found)
        self._watch(self._found.seen)
        now = {name: each.digest for name, each in self._found.sources.items()}
        for name, digest in before.items():
            if name != "__main__" and now.get(name) != digest:
                source = self._found.sources.get(name)
                self._replaced = name if source is None else _file_name(name, source)
        if not self._digest or before != now or installed != len(self._found.installed):
            self._sum_up()
        self._loaded = loaded
        self._last = loaded[next(reversed(loaded))]
        self._count = len(loaded)  # last, as ``digest`` in other threads then skips ``_grow``

    def _watch(self, names: Iterable[str]) -> None:
        """Have ``_arrivals`` notice new files of these modules' names."""
        path = tuple(sys.path)
        if path != self._path:
            self._path = path
            names, self._watched = self._watched | set(names), set()
        places: dict[str, Iterable[str]] = {}
        for name in [name for name in names if name not in self._watched]:
            self._watched.add(name)
            parent, _, last = name.rpartition(".")
            if last == "*" or name == "__main__" or name.partition(".")[0] == _OURS:
                continue
            above = self._places.get(parent)
            places[name] = path if not parent else (above and above.search) or ()
        self._arrivals.watch(places)

    def _sum_up(self) -> None:
        for name, source in self._found.sources.items():
            if source.path:
                self._by_path[os.path.abspath(source.path)] = name, source
        versions = versions_of(self._distributions(self._found))
        self.manifest = {
            "python": _python(),
            "modules": {
                name: [_file_name(name, source), source.digest.hex()]
                for name, source in sorted(self._found.sources.items())
            },
            "distributions": dict(sorted(versions.items())),
        }
        self._digest = _digest_of(self.manifest)

    def _add_script(self) -> None:
        """Add the script, whether it is a file, a module, a ``-c`` option or a notebook."""
        values = _values("__main__")
        spec = values.get("__spec__")
        package = values.get("__package__") or ""
        path = values.get("__file__")
        if not isinstance(path, str):
            code = _code_option()
            # The code of a notebook's cells, or of an interactive session, is not digested here: it
            # counts where functions of that code are pickled by value.
            source = Source(b"") if code is None else text_source(code, "")
            self._by_path[os.path.abspath("<string>")] = "__main__", source
        elif _kind_of(path) == "own":
            loader = getattr(spec, "loader", None) or values.get("__loader__")
            source = source_of(os.path.abspath(path), package, loader, getattr(spec, "name", ""))
        else:  # the script is installed, and counts by its version
            self._follow([package], self._found)
            return
        self._found.add("__main__", source)
        self._follow([*source.imports, package], self._found)

    def _follow(self, names: Iterable[str], found: _Found) -> None:
        """Add modules, the packages that they are in, and the modules that they import."""
        self._stems.clear()  # the folders may have changed since the last call
        waiting = list(names)
        while True:
            if not waiting and found.is_importing:
                # Any string in any source may become the name that is imported.
                waiting += found.names - found.seen
            if not waiting:
                break
            name = waiting.pop()
            if not name or name in found.seen:
                continue
            found.seen.add(name)
            parent, _, last = name.rpartition(".")
            if parent:
                waiting.append(parent)
            if last == "*":
                place = self._place(parent)
                if place is not None and _kind_of(place.path) in ("own", ""):
                    parts = pkgutil.iter_modules(place.search or ())
                    waiting += [f"{parent}.{part.name}" for part in parts]
                continue
            top = name.partition(".")[0]
            if top == _OURS:
                found.installed.add(top)
                continue
            place = self._place(name)
            if place is None or not place.path:
                continue
            kind = _kind_of(place.path)
            if kind == "installed" and names_of(top):
                found.installed.add(top)
            elif kind != "python":
                is_package = place.search is not None
                package = name if is_package else parent
                source = source_of(place.path, package, place.loader, name, is_package=is_package)
                found.add(name, source)
                waiting += source.imports

    def _place(self, name: str) -> _Place | None:
        """Find a module without importing any module; ``None`` if there is none of that name."""
        if name not in self._places:
            self._places[name] = None
            self._places[name] = _loaded_place(name) or self._find(name)
        return self._places[name]

    def _find(self, name: str) -> _Place | None:
        parent = name.rpartition(".")[0]
        search: Sequence[str] | None = None
        if parent:
            place = self._place(parent)
            if place is None or place.search is None:
                return None
            search = place.search
        last = name.rpartition(".")[2]
        is_ruled_out = not self._may_hold(sys.path if search is None else search, last)
        for finder in sys.meta_path:
            if is_ruled_out and finder is importlib.machinery.PathFinder:
                continue
            try:
                spec = finder.find_spec(name, search, None)
            except Exception:  # a finder of another library may fail, and nothing is imported here
                continue
            if spec is not None:
                path = os.path.abspath(spec.origin) if spec.has_location and spec.origin else ""
                below = spec.submodule_search_locations
                return _Place(path, None if below is None else list(below), spec.loader)
        # A namespace package inside another one is not found before the outer one is imported.
        folders = [os.path.join(each, last) for each in search or ()]
        folders = [folder for folder in folders if os.path.isdir(folder)]
        return _Place("", folders, None) if folders else None

    def _may_hold(self, folders: Iterable[str], name: str) -> bool:
        """Say whether a module can be in one of these folders.

        Most strings in a source name no module. Python's own search of every folder for each of
        thousands of strings would take seconds.
        """
        for folder in folders:
            if folder not in self._stems:
                self._stems[folder] = _stems(folder)
            stems = self._stems[folder]
            if stems is None or name.lower() in stems:
                return True
        return False

    @staticmethod
    def _distributions(found: _Found) -> set[str]:
        return {each for top in found.installed for each in names_of(top)}

    # Code that is pickled by value.

    def code(self, code: CodeType, package: str) -> tuple[Any, ...]:
        """Identify a code object by its place in a source of this program, or by its content.

        Args:
            code: The code object of a function.
            package: The package that relative imports in the code refer to.
        """
        with self._lock:
            known = self._codes.get(id(code))
            if known is None:
                if len(self._codes) >= _CODES_KEPT:
                    self._codes.clear()
                # The code is kept alive, so that Python does not reuse its id.
                known = self._codes[id(code)] = code, self._known_as(code, package)
            return known[1]

    def _known_as(self, code: CodeType, package: str) -> tuple[Any, ...]:
        digest = code_digest(code)
        found = self._by_path.get(os.path.abspath(code.co_filename))
        if found is not None and found[1].text is not None:
            name, source = found
            place = source.place_of(digest)
            if place is not None:
                return name, place
        # The code was made while the program runs, in a notebook, or from a source that has
        # changed since.
        return digest, self._closure(frozenset(imports_in(code, package)))

    def _closure(self, names: frozenset[str]) -> bytes:
        digest = self._closures.get(names)
        if digest is None:
            found = _Found()
            self._follow(names, found)
            self._watch(found.seen)
            self._further.update(found.sources)
            sources = {name: each.digest.hex() for name, each in found.sources.items()}
            what = {"modules": sources, "distributions": versions_of(self._distributions(found))}
            digest = self._closures[names] = _digest_of(what)
        return digest

    # Changes on the disk.

    def edited(self) -> str:
        """Return the name of a file whose code has changed since it was digested.

        A new file that an import would now take counts as well. The script's file does not: workers
        receive the script as it was loaded.

        Returns:
            The file, as messages show it; empty if no file has changed.
        """
        with self._lock:
            if self._replaced:
                return self._replaced
            sources = {**self._further, **self._found.sources}
            arrived = self._arrivals.first(self._places.get)
        if arrived:
            return arrived
        for name, source in sources.items():
            if name == "__main__" or source.is_settled():
                continue
            place = self._places.get(name)
            is_package = place is not None and place.search is not None
            package = name if is_package else name.rpartition(".")[0]
            loader = None if place is None else place.loader
            now = source_of(source.path, package, loader, name, is_package=is_package)
            if now.digest != source.digest:
                return _file_name(name, source)
        return ""


def _digest_of(manifest: Manifest) -> bytes:
    named = {
        **manifest,
        "modules": {
            name: each if isinstance(each, str) else each[1]
            for name, each in manifest["modules"].items()
        },
    }
    return hashlib.sha256(json.dumps([_RULE, named], sort_keys=True).encode()).digest()


def _python() -> str:
    version = ".".join(map(str, sys.version_info[:3]))
    level = "" if sys.version_info[3] == "final" else "".join(map(str, sys.version_info[3:]))
    optimized = f" -{'O' * sys.flags.optimize}" if sys.flags.optimize else ""
    return f"{sys.implementation.name} {version}{level}{optimized}"


def _file_name(name: str, source: Source) -> str:
    """Return a module's file as messages show it, such as ``package/module.py``."""
    base = os.path.basename(source.path)
    if name == "__main__":
        return base or "the script"
    parts = name.split(".")
    parts[-1:] = [parts[-1], base] if base.startswith("__init__.") else [base or parts[-1]]
    return "/".join(parts)


def _stems(folder: str) -> frozenset[str] | None:
    """Return the names in a folder, in lower case and up to the first dot.

    Returns:
        ``None`` if an import would not search the folder as a directory of files (an archive, or a
        finder of another library), so that nothing can be ruled out.
    """
    finder = sys.path_importer_cache.get(folder or os.getcwd())
    if finder is not None and type(finder) is not importlib.machinery.FileFinder:
        return None
    try:
        return frozenset([each.partition(".")[0].lower() for each in os.listdir(folder or ".")])
    except NotADirectoryError:
        return None
    except OSError:
        return frozenset()


def _values(name: str) -> dict[str, Any]:
    """Return a loaded module's namespace, without triggering the import of a lazy module."""
    try:
        found: Any = object.__getattribute__(sys.modules[name], "__dict__")
    except (KeyError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_loaded_own(name: str) -> bool:
    if name in _ALIASES or name.partition(".")[0] == _OURS:
        return False
    path = _values(name).get("__file__")
    return isinstance(path, str) and _kind_of(path) == "own"


def _loaded_place(name: str) -> _Place | None:
    values = _values(name)
    if not values:
        return None
    spec = values.get("__spec__")
    search = values.get("__path__")
    path = values.get("__file__")
    path = os.path.abspath(path) if isinstance(path, str) and path else ""
    loader = getattr(spec, "loader", None) or values.get("__loader__")
    try:
        return _Place(path, None if search is None else list(search), loader)
    except Exception:  # ``__path__`` cannot be iterated
        return _Place(path, None, loader)


def _kind_of(path: str) -> str:
    """Return what a file is part of: ``python``, ``installed`` or ``own``; empty without a file."""
    return _kind_of_folder(os.path.dirname(os.path.abspath(path))) if path else ""


@functools.lru_cache(4096)
def _kind_of_folder(folder: str) -> str:
    for each in (folder + os.sep, os.path.realpath(folder) + os.sep):
        if any(f"{os.sep}{name}{os.sep}" in each for name in ("site-packages", "dist-packages")):
            return "installed"
        if each.startswith(_site()):
            return "installed"
        if each.startswith(_python_folders()):
            return "python"
    return "own"


@functools.cache
def _site() -> tuple[str, ...]:
    return _folders("purelib", "platlib")


@functools.cache
def _python_folders() -> tuple[str, ...]:
    return _folders("stdlib", "platstdlib")


def _folders(*names: str) -> tuple[str, ...]:
    paths = [sysconfig.get_paths()[name] for name in names]
    return tuple({each + os.sep for path in paths for each in (path, os.path.realpath(path))})


def _code_option() -> str | None:
    """Return the code that follows ``-c`` on this process's command line, if there is any."""
    if not sys.argv or sys.argv[0] != "-c":
        return None
    waiting = list(sys.orig_argv[1:])
    while waiting:
        option = waiting.pop(0)
        if not option.startswith("-") or option.startswith("--"):
            continue
        for at, letter in enumerate(option[1:], 2):
            if letter == "c":
                return option[at:] or (waiting[0] if waiting else None)
            if letter in "WX":
                if not option[at:] and waiting:
                    waiting.pop(0)
                break
    return None
