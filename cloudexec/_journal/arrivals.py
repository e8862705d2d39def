"""Notices modules that appear in the user's own folders while a program runs.

An import statement takes the first module of that name on its search path. A new file can therefore
make an import succeed that found nothing before, or hide a module that lies in a later folder.
"""

from __future__ import annotations

import importlib.machinery
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from cloudexec._journal.sources import COARSE, stamp_of

__all__ = ["Arrivals", "Place"]

_SUFFIXES = (".py", *importlib.machinery.EXTENSION_SUFFIXES)


class Place(Protocol):
    """Where a module was found."""

    @property
    def path(self) -> str:
        """The module's file, or an empty string if it has no file."""

    @property
    def search(self) -> Sequence[str] | None:
        """Folders that hold the package's submodules; ``None`` if the module is no package."""


class _Watched(NamedTuple):
    folders: Sequence[str]
    """Folders that the module may be in, in the order in which an import searches them."""
    before: frozenset[str]
    """Paths of this name that existed when the module was first looked for."""


class Arrivals:
    """Watches folders for modules by the names that a program imports.

    A folder is read again only when its modification time has changed.

    Args:
        is_own: Says whether a folder holds the user's own code. Only such folders are watched.
    """

    def __init__(self, is_own: Callable[[str], bool]) -> None:
        self._is_own = is_own
        self._names: dict[str, _Watched] = {}
        self._in_folder: dict[str, set[str]] = {}
        # The stamps of a folder that has not changed since it was read.
        self._settled: dict[str, list[tuple[int, ...]]] = {}
        self._inner: dict[str, list[str]] = {}  # its subfolders, which may become packages

    def watch(self, names: Mapping[str, Iterable[str]]) -> None:
        """Watch for more modules.

        Args:
            names: Maps each module's name to the folders that it may be in.
        """
        listings: dict[str, frozenset[str]] = {}
        places: dict[tuple[str, ...], tuple[str, ...]] = {}
        for name, folders in names.items():
            as_given = tuple(folders)
            all_of = places.get(as_given)
            if all_of is None:
                all_of = places[as_given] = tuple(map(os.path.abspath, as_given))
            known = self._names.get(name)
            if known is not None and known.folders == all_of:
                continue
            last = name.rpartition(".")[2]
            before: set[str] = set()
            for folder in all_of:
                if not self._is_own(folder):
                    continue
                if folder not in listings:
                    listings[folder] = _listing(folder)
                before.update(_files(folder, last, listings[folder]))
                self._in_folder.setdefault(folder, set()).add(name)
            self._names[name] = _Watched(all_of, frozenset(before))

    def first(self, place_of: Callable[[str], Place | None]) -> str:
        """Return a module's file that appeared and that an import would now take.

        Args:
            place_of: Returns where a module was found, or ``None`` if it was not found.

        Returns:
            A path relative to the module's folder, as messages show it; empty if there is none.
        """
        for folder, names in self._in_folder.items():
            stamps, read_at = self._stamps(folder), time.time_ns()
            if self._settled.get(folder) == stamps:
                continue
            inner = self._inner[folder] = []
            listing = _listing(folder)
            for name in names:
                watched = self._names[name]
                if folder not in watched.folders:
                    continue
                for path in _files(folder, name.rpartition(".")[2], listing):
                    if os.path.isdir(path):
                        inner.append(path)
                    if path not in watched.before and _is_taken(
                        path, folder, watched.folders, place_of(name)
                    ):
                        parts = [*name.split(".")[:-1], os.path.relpath(path, folder)]
                        return "/".join(parts)
            stamps = self._stamps(folder)
            if max([stamp[1] for stamp in stamps]) < read_at - COARSE:
                self._settled[folder] = stamps
        return ""

    def _stamps(self, folder: str) -> list[tuple[int, ...]]:
        return [stamp_of(each) for each in (folder, *self._inner.get(folder, ()))]


def _listing(folder: str) -> frozenset[str]:
    """Return the names in a folder.

    Reading the folder once is cheaper than asking the file system for each of thousands of modules.
    """
    try:
        return frozenset(os.listdir(folder))
    except OSError:  # the folder was removed, or is an archive
        return frozenset()


def _files(folder: str, name: str, listing: frozenset[str]) -> Iterator[str]:
    """Yield the paths in a folder that an import of this name could take."""
    if name in listing and os.path.isdir(path := os.path.join(folder, name)):
        if os.path.isfile(inner := os.path.join(path, "__init__.py")):
            yield inner
        yield path
    for suffix in _SUFFIXES:
        file = name + suffix
        if file in listing and os.path.isfile(path := os.path.join(folder, file)):
            yield path


def _is_taken(path: str, folder: str, folders: Sequence[str], place: Place | None) -> bool:
    """Say whether an import takes the new path instead of the module that was found before."""
    if place is None:
        return True
    is_bare = os.path.isdir(path)  # a folder without __init__.py does not hide a module
    if not place.path:
        # The module is built in, or is a namespace package with parts in several folders.
        return place.search is not None and path not in place.search
    if is_bare or os.path.abspath(place.path) == path:
        return False
    home = os.path.dirname(os.path.abspath(place.path))
    if place.search is not None:
        home = os.path.dirname(home)
    return home not in folders or folders.index(folder) <= folders.index(home)
