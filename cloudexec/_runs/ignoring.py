"""Files that are not sent with a folder: as ``.gitignore`` and ``.cloudexecignore`` say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["files_in"]

_RULES = (".gitignore", ".cloudexecignore")
"""The second one counts more. Both are read in each folder, for that folder and those below."""
_NEVER = frozenset({"__pycache__", ".git", ".hg", ".svn", ".venv", "venv", "node_modules"})
"""Folders that have nothing of the user's own."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """One line of such a file."""

    pattern: re.Pattern[str]
    is_for_folders: bool
    keeps: bool
    """Whether it takes back what an earlier rule says."""


def files_in(folder: Path, base: Path | None = None) -> Iterator[tuple[Path, str]]:
    """Yield the files in a folder and below, sorted, and why each is left out; empty: it is not.

    Of a folder that is left out, the folder itself is yielded, and nothing in it. The reason is
    ``"rules"``, or ``"link"`` of a symbolic link to a folder, which could lead round in circles.

    Args:
        folder: Whose own name no rule is held against: it was asked for.
        base: A folder above, whose rules count as well, as do those of the folders in between, and
            of those up to the root of a Git repository that it is in; ``None``: the folder itself.
    """
    top = _top(base or folder)
    rules: list[tuple[str, _Rule]] = []
    below = ""
    for part in folder.relative_to(top).parts:
        rules += ((below, rule) for name in _RULES for rule in _read(top / below / name))
        below += f"{part}/"
    yield from _walk(folder, below, rules)


def _top(base: Path) -> Path:
    """Return the root of the Git repository that a folder is in; or, if there is none, itself."""
    return next((each for each in (base, *base.parents) if (each / ".git").exists()), base)


def _walk(folder: Path, below: str, rules: list[tuple[str, _Rule]]) -> Iterator[tuple[Path, str]]:
    rules = [*rules, *((below, rule) for name in _RULES for rule in _read(folder / name))]
    for entry in sorted(os.scandir(folder), key=lambda each: each.name):
        path = f"{below}{entry.name}"
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_folder and entry.name in _NEVER:
            continue
        if _is_ignored(path, rules, is_folder=is_folder):
            yield Path(entry.path), "rules"
        elif is_folder:
            yield from _walk(Path(entry.path), f"{path}/", rules)
        elif entry.is_file():
            yield Path(entry.path), ""
        elif entry.is_dir():
            yield Path(entry.path), "link"


def _is_ignored(path: str, rules: list[tuple[str, _Rule]], *, is_folder: bool) -> bool:
    """Say what the last rule that fits says."""
    found = False
    for base, rule in rules:
        if rule.is_for_folders and not is_folder:
            continue
        if rule.pattern.fullmatch(path.removeprefix(base)):
            found = not rule.keeps
    return found


def _read(path: Path) -> list[_Rule]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    lines = (line.rstrip() for line in text.splitlines())
    rules = [_rule(line) for line in lines if line.strip("/!") and not line.startswith("#")]
    return [each for each in rules if each is not None]


def _rule(line: str) -> _Rule | None:
    """Read a line as Git does; ``None``: it is no pattern, and fits nothing.

    References:
        gitignore(5), "Pattern format".
    """
    keeps = line.startswith("!")
    line = line.removeprefix("!").removeprefix("\\")
    is_for_folders = line.endswith("/")
    line = line.rstrip("/")
    # With a slash at its beginning or in it, it is about that folder; otherwise about all below.
    prefix = "" if "/" in line else "(?:.*/)?"
    line = line.lstrip("/")
    parts = re.split(r"(\*\*/|/\*\*|\*|\?|\[[^]]+\])", line)
    try:
        pattern = re.compile(prefix + "".join(map(_expression, parts)))
    except re.error:  # such as [z-a]
        return None
    return _Rule(pattern, is_for_folders, keeps)


def _expression(part: str) -> str:
    known = {"**/": "(?:.*/)?", "/**": "/.*", "*": "[^/]*", "?": "[^/]"}
    if part in known:
        return known[part]
    if part.startswith("[") and part.endswith("]"):
        return "[^" + part[2:] if part.startswith("[!") else part
    return re.escape(part)
