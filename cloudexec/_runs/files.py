"""The files that are sent with a run: its own modules, and those that the user names."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cloudexec._errors import ConfigError, PayloadTooLargeError
from cloudexec._journal.sources import source_of, text_source
from cloudexec._modules import installed_directories, package_files
from cloudexec._runs.ignoring import files_in

__all__ = ["FILES_LIMIT_BYTES", "Archive", "RunFiles", "collect", "packed", "unpack"]

FILES_LIMIT_BYTES = 1024 * 1024 * 1024
"""Most bytes that are sent, before compression: larger data belongs into the bucket."""
_ELSEWHERE = ".elsewhere"
"""Folder of a run for files that are not below the client's current folder."""
_READ_BYTES = 1024 * 1024
_COMPRESSION = 1
"""Source compresses well at any level, data at none: what counts is the time."""


@dataclass(slots=True)
class RunFiles:
    """Files to send."""

    files: dict[str, Path] = field(default_factory=dict)
    """By path below the run's folder."""
    python_path: list[str] = field(default_factory=list)
    """Folders below the run's in which its modules are found."""
    target: str = ""
    """Path of the script or notebook below the run's folder."""
    ignored: int = 0
    """Files and folders that were left out by rules."""
    links: list[str] = field(default_factory=list)
    """Symbolic links to folders, which were left out."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive of files, in a temporary file."""

    path: Path
    size: int
    sha256: bytes


def collect(
    kind: str, target: str, extra: Sequence[str] = (), base: Path | None = None
) -> RunFiles:
    """Find the files of a run.

    The modules that a script or module imports, directly or not, are found without running them,
    among those that are not installed: beside the script, in the current folder for a module, and
    in the folders of ``PYTHONPATH``. What is imported by a name that is made at run time is not
    found, and can be named with ``extra``.

    Args:
        kind: As of ``RunPlan``.
        target: Path of the script or notebook, or name of the module.
        extra: Paths and patterns of further files, below ``base``.
        base: The folder that the run's folder stands for; by default the current one.

    Raises:
        ConfigError: If there is no such file or module, or a file is not below ``base``.
        PayloadTooLargeError: If there is too much.
    """
    # Symbolic links stay in these paths, so that files are found below where the user is.
    base = Path(os.path.abspath(base or "."))
    found = RunFiles()
    if kind in ("script", "notebook"):
        script = Path(os.path.abspath(target))
        if not script.is_file():
            raise ConfigError(
                f"there is no file {target!r}; `-m MODULE` runs a module, `-- COMMAND` a command"
            )
        roots = _Roots(base, [script.parent, *_own_path()])
        found.target = roots.place(script)
        found.files[found.target] = script
        if kind == "script":
            _add_imports(found, roots, script)
        else:
            _add_cells(found, roots, script)
    elif kind == "module":
        roots = _Roots(base, [base, *_own_path()])
        _add_module(found, roots, target)
    else:
        roots = _Roots(base, [])
    found.python_path = roots.used
    for pattern in extra:
        _add_named(found, base, pattern)
    if (size := found.size) > FILES_LIMIT_BYTES:
        largest = max(found.files.values(), key=lambda path: path.stat().st_size)
        raise PayloadTooLargeError(
            f"the files for the run have {size / 2**20:,.0f} MiB together, and "
            f"{FILES_LIMIT_BYTES // 2**20:,} MiB is the most; the largest is {largest} with "
            f"{largest.stat().st_size / 2**20:,.0f} MiB. Leave out what is not needed, with a "
            f"narrower --files or lines in a file .cloudexecignore, or put large data into the "
            f"profile's bucket (under data/), from where the program reads it",
            size_bytes=size,
            limit_bytes=FILES_LIMIT_BYTES,
        )
    return found


def _own_path() -> list[Path]:
    """Return the folders of ``PYTHONPATH`` that have no installed modules."""
    installed = installed_directories()
    listed = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    here = (Path(os.path.abspath(each)) for each in listed if each)
    return [
        each
        for each in here
        if each.is_dir() and not (os.path.realpath(each) + os.sep).startswith(installed)
    ]


class _Roots:
    """Folders in which the run's own modules are looked for.

    Args:
        base: Which folder the run's stands for.
        folders: In which modules are looked for, in this order.
    """

    def __init__(self, base: Path, folders: Sequence[Path]) -> None:
        self.used: list[str] = []
        self.packages: dict[Path, list[Path]] = {}
        """Sources of packages that were added, by their folders."""
        self._base = base
        self._folders = list(dict.fromkeys(folders))

    def place(self, path: Path) -> str:
        """Return where a file is below the run's folder, and remember the folder it is found in."""
        if path.is_relative_to(self._base):
            return path.relative_to(self._base).as_posix()
        for number, folder in enumerate(self._folders):
            if path.is_relative_to(folder):
                return (
                    PurePosixPath(_ELSEWHERE, str(number)) / path.relative_to(folder)
                ).as_posix()
        raise AssertionError(f"{path} is in none of the folders")

    def find(self, name: str) -> tuple[Path, bool] | None:
        """Return the file of a module and whether it is a package; ``None``: it is not our own."""
        inner = name.replace(".", "/")
        for folder in self._folders:
            for path, is_package in (
                (folder / inner / "__init__.py", True),
                (folder / f"{inner}.py", False),
            ):
                if path.is_file():
                    used = self.place(folder) if folder != self._base else "."
                    if used not in self.used:
                        self.used.append(used)
                    return path, is_package
        return None


def _add_module(found: RunFiles, roots: _Roots, name: str) -> None:
    """Add a module that is run by its name, unless it is installed."""
    module = roots.find(f"{name}.__main__") or roots.find(name)
    if module is None:
        from importlib.util import find_spec

        try:
            is_installed = find_spec(name.partition(".")[0]) is not None
        except (ImportError, ValueError):
            is_installed = False
        if not is_installed:
            raise ConfigError(
                f"there is no module {name!r}, neither in the current folder nor installed"
            )
        return
    top = name.partition(".")[0]
    package = roots.find(top)
    if package is not None and package[1]:
        _add_package(found, roots, top, package[0].parent)
    _add_imports(found, roots, module[0], name.rpartition(".")[0])


def _add_package(found: RunFiles, roots: _Roots, top: str, folder: Path) -> list[Path]:
    """Add all files of a package, once; return its sources."""
    if folder not in roots.packages:
        files = [Path(file) for _, file in package_files(top, str(folder))]
        found.files |= {roots.place(path): path for path in files}
        roots.packages[folder] = [path for path in files if path.suffix == ".py"]
    return roots.packages[folder]


def _add_imports(found: RunFiles, roots: _Roots, start: Path, package: str = "") -> None:
    """Add a source, and all of our own that it imports, directly or not."""
    seen: set[Path] = set()
    waiting = [(start, package, start.name == "__init__.py")]
    while waiting:
        path, package, is_package = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        found.files[roots.place(path)] = path
        imports = source_of(str(path), package, is_package=is_package).imports
        waiting += _sources(found, roots, imports)


def _add_cells(found: RunFiles, roots: _Roots, notebook: Path) -> None:
    """Add what the cells of a notebook import.

    Raises:
        ConfigError: If it is no notebook.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{notebook} cannot be read as a notebook: {exc!r}") from exc
    for source in sources:
        # Magics and shell commands are lines of IPython, not of Python.
        lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
        for path, package, _ in _sources(found, roots, text_source("\n".join(lines), "").imports):
            _add_imports(found, roots, path, package)


def _sources(
    found: RunFiles, roots: _Roots, imports: Iterable[str]
) -> Iterator[tuple[Path, str, bool]]:
    """Yield our own sources among what is imported: file, package of its relative imports, and
    whether it is a package's own. Of a package, all files are added."""
    for imported in sorted(imports):
        name = imported.removesuffix(".*")
        top = name.partition(".")[0]
        if not top or top in ("__main__", "cloudexec"):
            continue
        first = roots.find(top)
        if first is not None and first[1]:
            folder = first[0].parent
            for inner in [first[0], *_add_package(found, roots, top, folder)]:
                within = ".".join(inner.relative_to(folder.parent).parent.parts)
                yield inner, within, inner.name == "__init__.py"
        elif first is not None:
            yield first[0], "", False
        elif (module := roots.find(name)) is not None:
            # It lies in a folder without __init__.py, of which only this is taken.
            yield module[0], name if module[1] else name.rpartition(".")[0], module[1]


def _add_named(found: RunFiles, base: Path, pattern: str) -> None:
    """Add files that the user names: a file, a folder, or a pattern."""
    whole = os.path.join(base, os.path.expanduser(pattern))
    matches = [whole] if os.path.lexists(whole) else sorted(glob.glob(whole, recursive=True))
    if not matches:
        raise ConfigError(f"there is no file that {pattern!r} names")
    for match in matches:
        path = Path(os.path.abspath(match))
        if not path.is_relative_to(base):
            raise ConfigError(
                f"{pattern!r} is not below the current folder, {base}: the run has its files at "
                f"the same places below a folder of its own. Start it from a folder above"
            )
        if path.is_dir():
            for file, why in files_in(path, base):
                if why == "link":
                    found.links.append(file.relative_to(base).as_posix())
                elif why:
                    found.ignored += 1
                else:
                    found.files[file.relative_to(base).as_posix()] = file
        elif path.is_file():
            found.files[path.relative_to(base).as_posix()] = path
        else:
            raise ConfigError(f"{path} is neither a file nor a folder")


@contextmanager
def packed(files: RunFiles) -> Iterator[Archive | None]:
    """Yield an archive of files, and remove it; ``None``: there are no files.

    Raises:
        ConfigError: If a file cannot be read.
    """
    if not files.files:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="cloudexec-run-") as folder:
        path = Path(folder) / "files.tar.gz"
        try:
            with tarfile.open(
                path, "w:gz", compresslevel=_COMPRESSION, dereference=True
            ) as archive:
                for name in sorted(files.files):
                    # What a symbolic link leads to is sent in its place.
                    info = archive.gettarinfo(os.path.realpath(files.files[name]), name)
                    info.uid = info.gid = 0
                    info.uname = info.gname = ""
                    with open(files.files[name], "rb") as file:
                        archive.addfile(info, file)
        except OSError as exc:
            raise ConfigError(f"a file for the run cannot be read: {exc}") from exc
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        yield Archive(path, path.stat().st_size, digest)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack such an archive into a folder.

    By hand: not every Python 3.11 has the filter by which ``extractall`` stays in the folder.

    Raises:
        tarfile.TarError: If it cannot be unpacked, or would write elsewhere.
    """
    with tarfile.open(archive, "r:gz") as opened:
        for member in opened:
            path = PurePosixPath(member.name)
            source = opened.extractfile(member) if member.isfile() else None
            if source is None or path.is_absolute() or ".." in path.parts:
                raise tarfile.ReadError(f"{member.name!r} has no place in the files of a run")
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)
            target.chmod(member.mode & 0o777)
            os.utime(target, (member.mtime, member.mtime))
