"""Parts of an environment as files: what one distribution, project or directory puts there."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import stat
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cloudexec._environment.elf import needed_libraries
from cloudexec._environment.inventory import SITES, Distribution, source_files
from cloudexec._environment.target import ENVIRONMENT_ROOT, Target
from cloudexec._errors import ConfigError

__all__ = [
    "LOOSE",
    "Component",
    "Entry",
    "is_native",
    "libraries_of",
    "misfit",
    "missing_libraries",
    "of_directory",
    "of_distribution",
    "of_loose",
    "of_wheel",
]

LOOSE = "modules without a distribution"
"""Name of the component that has them."""
_NATIVE = re.compile(r"\.so(\.[0-9.]+)?$")
"""What Python imports on Linux, and what that loads."""
_MACHINES = {b"\x3e\x00": "x86_64", b"\xb7\x00": "aarch64"}
"""Of the ELF header, little-endian. ELF-64 Object File Format, "e_machine"."""
_SHEBANG = re.compile(rb"\A#!(?:/[^\n]*/python[0-9.]*w?|/bin/sh\n'''exec' \"?/[^\n]*\n' ''')")
_GLIBC = re.compile(rb"GLIBC_2\.(\d+)")
_IN_IMAGE = re.compile(
    r"(lib(c|m|dl|rt|pthread|util|resolv|nsl|anl|mvec|BrokenLocale|thread_db)|ld-linux-[\w-]+"
    r"|libgcc_s|libstdc\+\+|libz|libpython3(\.\d+)?|libcuda)\.so(\.[0-9.]+)?"
)
"""What every base of this kind has: glibc, what runs C++, zlib, Python. On machines with a GPU, the
driver is added."""
_BESIDE = ("bin", "etc", "include", "man", "share")
"""What uv and pip lay beside the packages where they install into a directory."""
_SCRIPT_BYTES = 65_536
_CAN_ASK = os.access in os.supports_effective_ids


@dataclass(frozen=True, slots=True)
class Entry:
    """One file."""

    path: str
    """In the environment."""
    source: Path | bytes
    is_executable: bool = False

    def read(self) -> bytes:
        """Return the content as it is in the image."""
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        if self.is_script and len(content) < _SCRIPT_BYTES:
            # Scripts name the interpreter of the environment that they are in.
            content = _SHEBANG.sub(f"#!/{ENVIRONMENT_ROOT}/bin/python".encode(), content)
        return content

    def head(self, size: int) -> bytes:
        """Return the first bytes."""
        if isinstance(self.source, bytes):
            return self.source[:size]
        with open(self.source, "rb") as file:
            return file.read(size)

    @property
    def is_script(self) -> bool:
        """Whether its first line may name an interpreter."""
        return self.path.startswith("bin/")

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """What goes into a layer together."""

    name: str
    version: str = ""
    entries: tuple[Entry, ...]
    is_own: bool = False
    """Whether it changes often, and so has a layer of its own: a project, cloudexec itself."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.entries)

    def signature(self) -> str:
        """Return what differs whenever a file may have changed: from names, sizes and times."""
        whole = hashlib.sha256(f"{self.name} {self.version}\n".encode())
        for entry in self.entries:
            if isinstance(entry.source, bytes):
                line = f"{entry.path} {hashlib.sha256(entry.source).hexdigest()}"
            else:
                found = entry.source.stat()
                line = f"{entry.path} {entry.source} {found.st_size} {found.st_mtime_ns}"
            whole.update(os.fsencode(f"{line} {entry.is_executable}\n"))
        return whole.hexdigest()

    def content_key(self) -> str:
        """Return what differs whenever a file differs: from names and content."""
        whole = hashlib.sha256()
        for entry in sorted(self.entries, key=lambda each: each.path):
            if isinstance(entry.source, Path) and not entry.is_script:
                with open(entry.source, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            else:
                digest = hashlib.sha256(entry.read()).hexdigest()
            whole.update(os.fsencode(f"{entry.path} {digest} {entry.is_executable}\n"))
        return whole.hexdigest()


def of_distribution(found: Distribution, target: Target, *, is_own: bool = False) -> Component:
    """Return the files that a distribution has installed.

    Args:
        found: Installed in an environment, or by uv or pip into a directory.
        target: Where they are to be.
        is_own: As for ``Component``.
    """
    entries: list[Entry] = []
    rows: list[tuple[str, str, str]] = []
    for name in found.files or ():
        path = _place_of(found, name, target)
        source = found.site / name
        if not source.exists() and name.startswith("../../"):
            source = found.site / name.removeprefix(
                "../../"
            )  # pip has moved it after it wrote that
        if path is None or not source.is_file():
            continue
        entry = _of_file(path, source)
        entries.append(entry)
        rows.append(_row(entry, name, target))
    info = f"{target.site_packages}/{found.info.name}"
    if found.info.suffix == ".dist-info":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [*rows, (f"{found.info.name}/RECORD", "", "")]
        )
        entries.append(Entry(f"{info}/RECORD", text.getvalue().encode()))
        entries.append(Entry(f"{info}/INSTALLER", b"cloudexec\n"))
    return Component(
        name=found.name,
        version=found.version,
        entries=tuple(sorted(entries, key=lambda each: each.path)),
        is_own=is_own,
    )


def _of_file(path: str, source: Path) -> Entry:
    if not os.access(source, os.R_OK, effective_ids=_CAN_ASK):
        raise ConfigError(
            f"{source} is to be copied to the workers, and you may not read it: change its "
            f"permissions, or leave out what it belongs to (exclude=)"
        )
    return Entry(path, source, bool(source.stat().st_mode & stat.S_IXUSR))


def _row(entry: Entry, name: str, target: Target) -> tuple[str, str, str]:
    if entry.path.startswith(f"{target.site_packages}/"):
        return (entry.path.removeprefix(f"{target.site_packages}/"), "", "")
    return (os.path.relpath(entry.path, target.site_packages), "", "")


def _place_of(found: Distribution, name: str, target: Target) -> str | None:
    """Return where a file belongs in the environment; ``None``: nowhere in it."""
    if found.site.name not in SITES:
        # Installed into a directory: pip says where scripts were before it moved them there.
        beside = name.removeprefix("../../")
        if beside.startswith(("../", "/")):
            return None
        outside = beside != name or beside.partition("/")[0] in _BESIDE
        return beside if outside else f"{target.site_packages}/{name}"
    if not name.startswith(("../", "/")):
        return f"{target.site_packages}/{name}"
    place = PurePosixPath(os.path.normpath(found.site / name))
    prefix = found.site.parents[2]  # of lib/python3.11/site-packages
    return str(place.relative_to(prefix)) if place.is_relative_to(prefix) else None


def of_wheel(name: str, version: str, wheel: bytes, target: Target) -> Component:
    """Return the files of a wheel that has nothing but modules in it."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        entries = tuple(
            Entry(f"{target.site_packages}/{each}", archive.read(each))
            for each in sorted(archive.namelist())
        )
    return Component(name=name, version=version, entries=entries, is_own=True)


def of_directory(path: Path, target: Target) -> Component:
    """Return a directory that a ``.pth`` file adds to the path, and such a file."""
    number = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    inside = f"paths/{path.name}-{number}"
    entries = [
        _of_file(f"{inside}/{each.relative_to(path).as_posix()}", each)
        for each in source_files(path)
    ]
    # Relative to the file, so that it holds wherever the environment is.
    line = os.fsencode(f"{os.path.relpath(inside, target.site_packages)}\n")
    entries.append(Entry(f"{target.site_packages}/cloudexec-{path.name}-{number}.pth", line))
    return Component(name=f"{path}", entries=tuple(entries), is_own=True)


def of_loose(paths: Iterable[Path], target: Target) -> Component:
    """Return modules and packages that lie in site-packages without a distribution."""
    entries: dict[str, Entry] = {}
    for path in paths:
        for each in [path] if path.is_file() else source_files(path):
            inside = f"{target.site_packages}/{each.relative_to(path.parent).as_posix()}"
            entries.setdefault(inside, _of_file(inside, each))
    listed = tuple(entries[each] for each in sorted(entries))
    return Component(name=LOOSE, entries=listed)


def misfit(component: Component, tags: frozenset[str], target: Target) -> str:
    """Say why files that are installed here would not work there; empty: they would.

    A wheel's tags may promise too much, and what was built on this machine promises nothing: its
    libraries themselves say which processor and which C library they need.
    """
    built_here = _is_built_here(tags, target)
    if (
        tags
        and not target.accepts(tags)
        and not (built_here and target.accepts(_as_there(tags, target)))
    ):
        return f"what is installed here is for {min(tags)}"
    is_promised = _is_promised(tags, target)
    machines: set[str] = set()
    newest = 0
    for entry in component.entries:
        if not _NATIVE.search(entry.path):
            continue
        machine = _machine_of(entry.head(20))
        if machine != target.machine:
            if _is_module(entry):
                machines.add(machine)
            continue
        machines.add(machine)
        if not is_promised:
            newest = max([newest, *map(int, _GLIBC.findall(entry.read()))])
    if machines and target.machine not in machines:
        return f"its libraries here are for {' and '.join(sorted(machines))}"
    if newest > target.glibc:
        return f"it needs glibc 2.{newest}, and workers have 2.{target.glibc}"
    return ""


def is_native(component: Component) -> bool:
    """Whether there are libraries in it."""
    return any(_NATIVE.search(entry.path) for entry in component.entries)


def libraries_of(component: Component) -> Iterable[str]:
    """Return the names of the libraries in it."""
    names = (entry.path.rpartition("/")[2] for entry in component.entries)
    return (name for name in names if _NATIVE.search(name))


def missing_libraries(
    component: Component, tags: frozenset[str], target: Target, present: frozenset[str]
) -> list[str]:
    """Return the libraries that what was compiled on this machine needs, and an image lacks.

    Wheels from an index have theirs in them, or need what their tag promises.

    Args:
        component: Files that fit otherwise.
        tags: Of the wheel they came as.
        target: Where they are to be.
        present: Names of libraries that other packages bring.
    """
    if _is_promised(tags, target):
        return []
    native = [entry for entry in component.entries if _NATIVE.search(entry.path)]
    inside = {entry.path.rpartition("/")[2] for entry in native}
    needed = {
        name
        for entry in native
        if _machine_of(entry.head(20)) == target.machine
        for name in needed_libraries(entry.read())
    }
    return sorted(
        name
        for name in needed - inside - present
        if not _IN_IMAGE.fullmatch(name.rpartition("/")[2])
    )


def _is_built_here(tags: frozenset[str], target: Target) -> bool:
    return any(tag.endswith(f"-linux_{target.machine}") for tag in tags)


def _is_promised(tags: frozenset[str], target: Target) -> bool:
    """Whether tags say that a wheel's libraries work on other machines."""
    is_any = any(tag.endswith("-any") for tag in tags)
    return bool(tags) and not _is_built_here(tags, target) and not is_any


def _machine_of(head: bytes) -> str:
    if head[:4] != b"\x7fELF":
        return "another system"
    return _MACHINES.get(head[18:20], "another processor")


def _is_module(entry: Entry) -> bool:
    """Whether Python imports it: some packages have libraries for many systems as data."""
    stem = entry.path.rpartition("/")[2].partition(".")[0]
    return f"PyInit_{stem}".encode() in entry.read()


def _as_there(tags: frozenset[str], target: Target) -> frozenset[str]:
    """Return the tags as if what was built on this machine had been built for the target."""
    return frozenset(f"{tag.rpartition('-')[0]}-{target.wheel_platforms[0]}" for tag in tags)
