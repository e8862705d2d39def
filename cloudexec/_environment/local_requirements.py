"""Projects and wheels on this machine that requirements files, locks and projects name."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from packaging.utils import canonicalize_name

from cloudexec._errors import ConfigError

__all__ = [
    "Local",
    "all_lines_of",
    "is_dynamic",
    "is_for_pip_only",
    "lines_of",
    "local_of",
    "masked",
    "places_of",
    "project_name",
    "project_table",
    "refuse_local",
]

_COMMENT = re.compile(r"(^|\s+)#.*$")
# What follows an option of one letter may follow it at once.
_EDITABLE = re.compile(r"(?:-e|--editable)(?:(?<=-e)|\s+|=)\s*=?(.+)")
_INCLUDE = re.compile(
    r"(-[rcf]|--requirement|--constraint|--find-links)(?:(?<=-[rcf])|\s+|=)\s*=?(.+)"
)
_NAMED = re.compile(r"[\w.-]+\s*(\[[^\]]*\])?\s*@\s*(\S+)")
_PATH = re.compile(r"(.*?)(\[[^\]]*\])?")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")
"""User name and password in an address; a password may have an "@" in it."""
_QUERY = re.compile(r"(?<=\?)[\w.%-]+=[^\s#'\"]*")
"""The query of an address, or of its path alone: a signature or a token may be in it."""
_GLUED = re.compile(r"^\s*-[rcfe][^\s=]", re.MULTILINE)
"""An option of one letter with its value behind it, which pip reads so, and uv does not."""


class Local(NamedTuple):
    """What one line of a requirements file names."""

    path: Path
    """A directory, or a file such as a wheel."""
    extras: str
    """In brackets; may be empty."""
    marker: str
    """May be empty."""


def lines_of(file: Path) -> list[str]:
    """Return the lines of a requirements file and of those that it includes.

    They can be read from another directory: paths that are relative to the file are absolute.

    Raises:
        ConfigError: If a file cannot be read.
    """
    return list(_lines_of(file, set()))


def _lines_of(file: Path, seen: set[Path]) -> Iterator[str]:
    if file in seen:
        return
    seen.add(file)
    for line in re.sub(r"\\\r?\n", " ", _text_of(file)).splitlines():
        plain = _COMMENT.sub("", line).strip()
        included = _INCLUDE.fullmatch(plain)
        if included is None:
            yield plain
            continue
        option, place = included[1], file.parent / included[2]
        if "://" in included[2] or "${" in included[2]:
            yield plain
        elif option in ("-r", "--requirement") and place.exists():
            yield from _lines_of(place, seen)
        else:
            yield f"{option} {place.absolute()}"


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as exc:
        raise ConfigError(f"{file} cannot be read: {exc.strerror}") from exc


def all_lines_of(file: Path) -> list[str]:
    """Return the lines of a requirements file, and of the files that it includes or constrains by.

    Files that are named by an address, or that do not exist, are left out: the installer reads or
    refuses them.

    Raises:
        ConfigError: If a file cannot be read.
    """
    lines: list[str] = []
    pending, seen = [file], set[Path]()
    while pending:
        each = pending.pop()
        if each in seen:
            continue
        seen.add(each)
        found = lines_of(each)
        lines += found
        for line in found:
            included = _INCLUDE.fullmatch(line)
            if included is not None and included[1] in ("-c", "--constraint"):
                place = Path(included[2])
                pending += [place] if place.is_file() else []
    return lines


def local_of(line: str, folder: Path) -> Local | None:
    """Return the project or file on this machine that a line names; ``None``: it names none.

    Args:
        line: As ``lines_of`` returns it.
        folder: The directory that paths are relative to.

    Raises:
        ConfigError: If the line has an editable project that is not on this machine.
    """
    editable = _EDITABLE.fullmatch(line)
    text = editable[1] if editable is not None else line
    if not text or text.startswith("-"):
        return None
    text = re.split(r"\s+--", text)[0]
    # In an address, a semicolon begins a marker only if there is a space before it.
    text, separator, marker = text.partition(" ;" if "://" in text or " @ " in text else ";")
    found = _NAMED.fullmatch(text.strip())
    extras, place = (found[1], found[2]) if found else ("", text.strip().strip("\"'"))
    if not found and (parts := _PATH.fullmatch(place)):
        place, extras = parts[1], parts[2]
    place = os.path.expandvars(place).partition("#")[0]
    if place.startswith("file:"):
        place = url2pathname(unquote(urlsplit(place).path))
    elif "://" in place:
        if editable is None:
            return None
        raise ConfigError(
            f"{masked(line)!r} is an editable project that is not on this "
            f"machine, and workers cannot have it so: leave out {line.split()[0]}"
        )
    path = folder / place
    is_path = os.sep in place or place.startswith(".")
    if editable is None and not (is_path and path.exists()):
        return None
    return Local(
        Path(os.path.normpath(path)), extras or "", f" {separator.strip()}{marker}".rstrip()
    )


def masked(text: str) -> str:
    """Return a requirement without the password and the query in its address."""
    return _QUERY.sub("****", _CREDENTIALS.sub("****@", text))


def is_for_pip_only(file: Path) -> bool:
    """Whether uv cannot read a requirements file, or one that it includes, as it is.

    Raises:
        ConfigError: If a file cannot be read.
    """
    seen: set[Path] = set()
    list(_lines_of(file, seen))
    return any(_GLUED.search(_text_of(each)) for each in seen)


def places_of(file: Path) -> list[Path]:
    """Return the projects and files on this machine that a file names, and its own project only
    where that alone knows what it requires.

    Raises:
        ConfigError: If a file cannot be read.
    """
    if file.suffix == ".txt":
        locals_ = [local_of(line, file.parent) for line in lines_of(file)]
        return [each.path for each in locals_ if each is not None]
    if file.name != "uv.lock":
        return [file.parent] if is_dynamic(file) else []
    sources = [each.get("source", {}) for each in _toml(file).get("package", ())]
    named = [
        each[kind]
        for each in sources
        for kind in ("editable", "directory", "path")
        if each.get(kind, ".") != "."
    ]
    return [Path(os.path.normpath(file.parent / each)) for each in named]


def project_name(project: Path) -> str:
    """Return the name of a project as its ``pyproject.toml`` has it; empty: it does not say."""
    file = project / "pyproject.toml"
    if not file.is_file():
        return ""
    data = _toml(file)
    name = data.get("project", data.get("tool", {}).get("poetry", {})).get("name", "")
    return canonicalize_name(str(name))


def project_table(file: Path) -> dict[str, Any]:
    """Return the table ``[project]`` of a ``pyproject.toml``; empty: it has none.

    Raises:
        ConfigError: If the file cannot be read, or the table or its dependencies are something
            else.
    """
    table = _toml(file).get("project", {})
    if not isinstance(table, dict):
        raise ConfigError(f"{file}: project must be a table, not {table!r}")
    needs = table.get("dependencies", [])
    if not isinstance(needs, list) or not all(isinstance(each, str) for each in needs):
        raise ConfigError(f"{file}: dependencies must be a list of strings, not {needs!r}")
    return table


def is_dynamic(file: Path) -> bool:
    """Whether only the wheel of a project says what it requires, and its ``pyproject.toml`` not.

    Raises:
        ConfigError: If it is not said how the wheel is built, either.
    """
    data = _toml(file)
    project = data.get("project")
    if project is not None and "dependencies" not in project.get("dynamic", ()):
        return False
    if "build-system" not in data:
        raise ConfigError(
            f"{file} does not say what the project requires, nor how it is built: it has no list "
            f"`dependencies` in [project], and no [build-system]. Add them, or name a requirements "
            f"file (packages=)"
        )
    return True


def refuse_local(file: Path) -> None:
    """Refuse a ``pyproject.toml`` whose dependencies are projects on this machine.

    Raises:
        ConfigError: If one is; it is named.
    """
    data = _toml(file)
    sources = {
        canonicalize_name(name): source if isinstance(source, list) else [source]
        for name, source in data.get("tool", {}).get("uv", {}).get("sources", {}).items()
    }
    for text in data.get("project", {}).get("dependencies", ()):
        name = canonicalize_name(re.split(r"[^\w.-]", str(text).strip())[0])
        is_local = any("path" in each or each.get("workspace") for each in sources.get(name, ()))
        if is_local or re.search(r"@\s*file:", str(text)):
            raise ConfigError(
                f"{name}, which {file} requires, is on this machine, and in no index: run "
                f"`uv lock`, and name the uv.lock (packages='uv.lock'), or install the project as "
                f"editable and take what is installed (packages='here')"
            )


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{file} cannot be read: {exc}") from exc
