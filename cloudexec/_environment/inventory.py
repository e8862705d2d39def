"""What is installed in the environment of this process: distributions, projects, ``.pth`` files."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from packaging.utils import canonicalize_name

__all__ = [
    "SITES",
    "Distribution",
    "Inventory",
    "signature_of",
    "source_files",
    "take_inventory",
]

SITES = ("site-packages", "dist-packages")
"""Names of the directories that packages are installed in."""
_SKIPPED = frozenset({"__pycache__", "node_modules", "site-packages", "venv", "__pypackages__"})
"""Directories beside the source of a project that are no part of it."""
_BUILT = frozenset({"build", "dist"})
"""The same, only at the top of a project, and only if they are no packages."""
_INSTALLERS_OWN = frozenset(
    {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_build.json", "uv_cache.json"}
)
"""Files of metadata that differ from one installation to the next. direct_url.json may have a
password in it."""
_NOBODYS = re.compile(
    r"(_virtualenv\.(py|pth)|README(\.txt)?|.*\.(dist-info|egg-info|egg-link|pth|so\.lock)"
    r"|__pycache__|\..*|.*\.virtualenv|distutils-precedence\.pth|__editable__.*|~.*)"
)
"""What lies in site-packages, belongs to no distribution, and is of no use elsewhere."""


class _Metadata(importlib.metadata.PathDistribution):
    """Metadata of which some bytes may not be UTF-8, such as an author's name of an old package."""

    def __init__(self, info: Path) -> None:
        super().__init__(info)
        self._info = info

    def read_text(self, filename: str | os.PathLike[str]) -> str | None:
        """Return a file of it; ``None``: there is none that can be read."""
        try:
            return (self._info / filename).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """One installed distribution."""

    name: str
    """As compared: lower case, with hyphens."""
    version: str
    site: Path
    """The directory it is installed in."""
    files: tuple[str, ...] | None
    """What it has installed, relative to ``site``, without bytecode; ``None``: not known."""
    info: Path
    """The directory or file with its metadata."""
    source: Path | None = None
    """The directory of a project that is installed as editable."""
    origin: str = ""
    """Where it came from, if not from an index, without user name and password."""
    is_requested: bool = False
    """Whether somebody asked for it, and not just for something that requires it."""

    @property
    def requires(self) -> list[str]:
        """Its requirements, as its metadata has them."""
        return _Metadata(self.info).requires or []

    @property
    def tags(self) -> frozenset[str]:
        """The tags of its wheel; empty where it did not come as one."""
        return frozenset(re.findall(r"^Tag:\s*(\S+)", _text(self.info, "WHEEL"), re.MULTILINE))

    @property
    def installer(self) -> str:
        """The program that says that it has installed it; may be empty."""
        return _text(self.info, "INSTALLER").strip()

    @property
    def is_of_system(self) -> bool:
        """Whether it belongs to a Linux distribution, which has not installed it for the user."""
        return self.files is None and self.site.name == "dist-packages"

    @property
    def label(self) -> str:
        """Name and version as requirements have them."""
        return f"{self.name}=={self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """All that is installed."""

    distributions: dict[str, Distribution]
    """By name."""
    paths: tuple[Path, ...]
    """Directories that ``.pth`` files add to the path, and that belong to no distribution."""
    loose: tuple[Path, ...] = ()
    """Modules and packages in site-packages that belong to no distribution."""
    conda: str = ""
    """The conda environment that this is; empty: none."""

    def signature(self, without: frozenset[str] = frozenset()) -> str:
        """Return what differs whenever a file of it may have changed: from names, sizes and times.

        Args:
            without: Names of distributions that do not count.
        """
        whole = hashlib.sha256()
        for name in sorted(self.distributions.keys() - without):
            whole.update(_signature_of(self.distributions[name]).encode())
        for path in (*self.paths, *self.loose):
            whole.update(signature_of(path).encode())
        return whole.hexdigest()


def _signature_of(distribution: Distribution) -> str:
    whole = hashlib.sha256(f"{distribution.name} {distribution.version}\n".encode())
    base = str(distribution.site)
    for name in distribution.files or ():
        whole.update(_stat_line(name, f"{base}/{name}"))
    if distribution.source is not None:
        whole.update(signature_of(distribution.source).encode())
    return whole.hexdigest()


def signature_of(root: Path) -> str:
    """Return what differs whenever a file of a project or directory may have changed."""
    whole = hashlib.sha256(os.fsencode(f"{root}\n"))
    for path in [root] if root.is_file() else source_files(root):
        whole.update(_stat_line(str(path), str(path)))
    return whole.hexdigest()


def _stat_line(name: str, path: str) -> bytes:
    try:
        found = os.stat(path)
    except OSError:
        return os.fsencode(f"{name} gone\n")
    return os.fsencode(f"{name} {found.st_size} {found.st_mtime_ns} {found.st_mode}\n")


def source_files(root: Path) -> Iterator[Path]:
    """Yield the files of a project or a directory of modules, sorted, also those behind links.

    What has no content, such as a socket or a link to nothing, is left out.
    """
    yield from _files_below(str(root), ())


def _files_below(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    try:
        found = sorted(os.scandir(folder), key=lambda each: each.name)
        own = os.stat(folder)
    except OSError:
        return
    identity = (own.st_dev, own.st_ino)
    names = {each.name for each in found}
    # A link to a directory that it is in leads to nothing new.
    if identity in above or (above and "pyvenv.cfg" in names):
        return
    is_top = not above and "__init__.py" not in names
    for each in found:
        if each.name.startswith("."):
            continue
        if os.path.isdir(each.path):
            if not _is_skipped(each, is_top):
                yield from _files_below(each.path, (*above, identity))
        elif not _is_superfluous(each.path) and os.path.isfile(each.path):
            yield Path(each.path)


def _is_skipped(folder: os.DirEntry[str], is_top: bool) -> bool:
    if folder.name in _BUILT:
        return is_top and not os.path.exists(f"{folder.path}/__init__.py")
    return folder.name in _SKIPPED or folder.name.endswith(".egg-info")


def _is_superfluous(path: str) -> bool:
    """Whether a file is bytecode of a source that is there, too."""
    return path.endswith((".pyc", ".pyo")) and os.path.exists(path[:-1])


def take_inventory(path: Sequence[str] | None = None) -> Inventory:
    """List what is installed.

    Args:
        path: Directories to look in; by default those of ``sys.path`` that packages are installed
            in.
    """
    sites = [
        Path(each) for each in (sys.path if path is None else path) if os.path.isdir(each or ".")
    ]
    sites = [site.absolute() for site in sites]
    if path is None:
        sites = [site for site in sites if _is_site(site)]
    sites = list(dict.fromkeys(sites))
    added = [each for site in sites for each in _added_by_pth(site)]
    found: dict[str, Distribution] = {}
    owned: set[Path] = set()
    for place in dict.fromkeys([*sites, *added]):
        for name in sorted(os.listdir(place)):
            if not name.endswith((".dist-info", ".egg-info")):
                continue
            distribution = _read(place / name, is_site=place in sites)
            if distribution is not None:
                known = found.get(distribution.name)
                if known is None or _replaces(distribution.info, known.info):
                    found[distribution.name] = distribution
                tops = {each.partition("/")[0] for each in distribution.files or ()}
                owned.update(place / top for top in tops)
                if distribution.files is None:
                    owned.update(_named_by(distribution.info))
    projects = {each.source for each in found.values() if each.source is not None}
    paths = [
        each
        for each in dict.fromkeys(added)
        if each not in sites and not any(each.is_relative_to(project) for project in projects)
    ]
    return Inventory(
        distributions=found,
        paths=tuple(paths),
        loose=tuple(loose for site in sites for loose in _loose(site, owned)),
        conda=os.path.basename(sys.prefix) if os.path.isdir(f"{sys.prefix}/conda-meta") else "",
    )


def _replaces(info: Path, known: Path) -> bool:
    """Say whether a version was installed over another one whose metadata was not removed."""
    if info.parent != known.parent:
        return False  # the first directory of the path counts, as for imports
    # The same order as in ``_versions.installed_versions``.
    return (info.stat().st_mtime_ns, info.name) > (known.stat().st_mtime_ns, known.name)


def _is_site(place: Path) -> bool:
    if place.name in SITES:
        return True
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # As paths, which are the same with a slash at the end.
    is_given = place in [Path(each).absolute() for each in given if each]
    return is_given and any(place.glob("*.dist-info"))


def _added_by_pth(site: Path) -> Iterator[Path]:
    """Yield the directories that the ``.pth`` files of a site add, as ``site`` reads them."""
    for file in sorted(site.glob("*.pth")):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            continue
        for line in map(str.strip, text.splitlines()):
            if not line or line.startswith(("#", "import ", "import\t")):
                continue
            added = Path(os.path.normpath(site / line))
            if added.is_dir():
                yield added


def _named_by(info: Path) -> Iterator[Path]:
    """Yield what metadata without a list of files names of the directory that it is in."""
    for line in _text(info, "installed-files.txt").split():
        # Relative to the metadata itself.
        inside = os.path.relpath(os.path.normpath(info / line), info.parent)
        yield info.parent / inside.partition("/")[0]
    modules = set(_text(info, "top_level.txt").split())
    for name in os.listdir(info.parent) if modules else ():
        if name.partition(".")[0] in modules:
            yield info.parent / name


def _loose(site: Path, owned: set[Path]) -> Iterator[Path]:
    if site.name != "site-packages":
        return  # Debian's own, or a directory on PYTHONPATH: those are not the user's environment
    for path in sorted(site.iterdir()):
        if (
            path not in owned
            and not _NOBODYS.fullmatch(path.name)
            and not _is_superfluous(str(path))
        ):
            yield path


def _read(info: Path, *, is_site: bool) -> Distribution | None:
    place = info.parent
    name, _, version = info.name.removesuffix(".dist-info").rpartition("-")
    if info.suffix == ".egg-info":
        metadata = _Metadata(info).metadata
        name, version = metadata["Name"] or "", metadata["Version"] or ""
    if not name or not version or name.startswith("~"):
        return None  # what an interrupted installation leaves behind
    origin, source = "", None
    if direct := _direct_url(info):
        url = str(direct.get("url", ""))
        details = direct.get("dir_info")
        try:
            origin = _without_credentials(url)
            if isinstance(details, dict) and details.get("editable"):
                source = _local_path(url)
        except ValueError:
            pass  # no address
    if not is_site and any((place / each).is_file() for each in ("pyproject.toml", "setup.py")):
        source = place  # `setup.py develop`, which leaves its metadata beside the source
    return Distribution(
        name=canonicalize_name(name),
        version=version,
        site=place,
        files=_files(info),
        info=info,
        source=source,
        origin=origin,
        # uv says so of everything.
        is_requested=(info / "REQUESTED").is_file() and _text(info, "INSTALLER").strip() == "pip",
    )


def _text(info: Path, name: str) -> str:
    try:
        return (info / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _files(info: Path) -> tuple[str, ...] | None:
    record = _text(info, "RECORD")
    if not record or "\0" in record:
        return None
    try:
        rows = list(csv.reader(record.splitlines(), strict=True))
    except csv.Error:
        return None  # a damaged list may lack files
    names = []
    for row in rows:
        if not row or "__pycache__/" in row[0] or _is_superfluous(str(info.parent / row[0])):
            continue
        folder, _, name = row[0].rpartition("/")
        if name in _INSTALLERS_OWN and folder.endswith(".dist-info"):
            continue
        names.append(row[0].replace("\\", "/"))
    return tuple(sorted(names))


def _direct_url(info: Path) -> dict[str, object]:
    try:
        data = json.loads(_text(info, "direct_url.json") or "{}")
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _local_path(url: str) -> Path | None:
    parts = urlsplit(url)
    if parts.scheme != "file":
        return None
    return Path(url2pathname(unquote(parts.path) if "%" in parts.path else parts.path))
