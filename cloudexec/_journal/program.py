"""The code of a program: of its script and of all modules that are the user's own.

The user's own are those that are loaded, and those that an import statement anywhere in them names,
also inside functions, as long as they are not part of Python and not installed. What is installed
counts by the versions of its distributions, and Python by its own. No module is run for it.
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
"""Of what goes into a digest: results that were recorded under another rule are not found."""
_OURS = "cloudexec"
_ALIASES = frozenset({"__mp_main__"})  # the script, under a second name
_CODES_KEPT = 4096

Manifest = dict[str, Any]
"""What a program consists of: ``python``, ``modules`` and ``distributions``."""


class _Place(NamedTuple):
    """Where a module is."""

    path: str
    """Its file; empty: it has none."""
    search: Sequence[str] | None
    """Where the modules below it are; ``None``: it is no package."""
    loader: Any


_NO_PLACE = _Place("", None, None)


class _Found:
    """What a set of modules consists of, with all that they import.

    Attributes:
        sources: Of the user's own modules, by name.
        installed: Top-level names of modules that are installed.
        seen: All names that were looked at.
        names: What strings of the sources name, if they name modules.
        is_importing: Whether any of the sources imports by name.
    """

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}
        self.installed: set[str] = set()
        self.seen: set[str] = set()
        self.names: set[str] = set()
        self.is_importing = False

    def add(self, name: str, source: Source) -> None:
        """Take a source of the user's own."""
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
        self._further: dict[str, Source] = {}  # what only code that travels by value imports
        self._arrivals = Arrivals(lambda folder: _kind_of_folder(folder) == "own")
        self._watched: set[str] = set()
        self._path: tuple[str, ...] = ()  # where top-level modules are looked for
        self._stems: dict[str, frozenset[str] | None] = {}  # while modules are followed
        self._loaded: dict[str, Any] = {}
        self._last: Any = None
        self._count = -1
        self._replaced = ""  # the file of a module that was imported again, after an edit
        self._digest = b""
        self.manifest: Manifest = {}
        """What it consists of, as it is said in messages."""
        self.digest()

    def digest(self, module: object = None) -> bytes:
        """Return a digest of all of it; modules that were loaded since count from now on.

        Args:
            module: The name of one that is looked at in any case. Others that take the place of
                one are not noticed unless they were deleted first.
        """
        modules = sys.modules
        try:
            # The last one is another if as many came as went.
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
        # What was not found, or was another module, is looked at anew.
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
        self._count = len(loaded)  # now that others need not wait for it

    def _watch(self, names: Iterable[str]) -> None:
        """Be told of it if a module of one of these names comes."""
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
        """Add what was started; it counts as a module of whatever file, or of none."""
        values = _values("__main__")
        spec = values.get("__spec__")
        package = values.get("__package__") or ""
        path = values.get("__file__")
        if not isinstance(path, str):
            code = _code_option()
            # A notebook's cells and what is typed are known where functions of theirs are sent.
            source = Source(b"") if code is None else text_source(code, "")
            self._by_path[os.path.abspath("<string>")] = "__main__", source
        elif _kind_of(path) == "own":
            loader = getattr(spec, "loader", None) or values.get("__loader__")
            source = source_of(os.path.abspath(path), package, loader, getattr(spec, "name", ""))
        else:  # it is installed, and counts by its version
            self._follow([package], self._found)
            return
        self._found.add("__main__", source)
        self._follow([*source.imports, package], self._found)

    def _follow(self, names: Iterable[str], found: _Found) -> None:
        """Look at modules, at the packages that they are in, and at what they import."""
        self._stems.clear()  # a folder may hold others by now
        waiting = list(names)
        while True:
            if not waiting and found.is_importing:
                # Which of its sources hands a name to the one that imports is not known.
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
        """Find a module without importing it, or any other; ``None``: there is none."""
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
            except Exception:  # it is somebody else's, and this is no import
                continue
            if spec is not None:
                path = os.path.abspath(spec.origin) if spec.has_location and spec.origin else ""
                below = spec.submodule_search_locations
                return _Place(path, None if below is None else list(below), spec.loader)
        # What has no file itself, in another such package, is not found before that is imported.
        folders = [os.path.join(each, last) for each in search or ()]
        folders = [folder for folder in folders if os.path.isdir(folder)]
        return _Place("", folders, None) if folders else None

    def _may_hold(self, folders: Iterable[str], name: str) -> bool:
        """Say whether a module can be in one of these folders: most strings name none.

        Python asks each folder for each name, which takes seconds for thousands of strings.
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

    # Code that travels by value.

    def code(self, code: CodeType, package: str) -> tuple[Any, ...]:
        """Return what a code is known by: its place in a source of this program, or what it does.

        Args:
            code: Which.
            package: What relative imports in it begin at.
        """
        with self._lock:
            known = self._codes.get(id(code))
            if known is None:
                if len(self._codes) >= _CODES_KEPT:
                    self._codes.clear()
                # The code is held, so that its id is nobody else's.
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
        # Made while the program runs, in a notebook, or of a source that has changed since.
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
        """Return the name of a file whose code is not what it was when it was looked at.

        One that was not there then, and that an import statement would take now, is such a file.
        The script's file is not asked: what is in it is sent as it was loaded.

        Returns:
            Empty if there is none.
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
    """Return what people call a module's file."""
    base = os.path.basename(source.path)
    if name == "__main__":
        return base or "the script"
    parts = name.split(".")
    parts[-1:] = [parts[-1], base] if base.startswith("__init__.") else [base or parts[-1]]
    return "/".join(parts)


def _stems(folder: str) -> frozenset[str] | None:
    """Return what names of files in a folder begin with; ``None``: it may be something else."""
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
    """Return what is in a loaded module, without waking one that loads itself when it is used."""
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
    except Exception:  # a path that is none
        return _Place(path, None, loader)


def _kind_of(path: str) -> str:
    """Say what a file is part of: ``python``, ``installed``, or ``own``; of no file nothing."""
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
    """Return what follows ``-c`` on this process's command line."""
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
