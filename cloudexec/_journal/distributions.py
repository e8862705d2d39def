"""The versions of what is installed: which distributions a module belongs to, and what they need.

Code of theirs is known by these alone.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from importlib import metadata

__all__ = ["names_of", "versions_of"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OURS = "cloudexec"


def names_of(module: str) -> tuple[str, ...]:
    """Return the distributions that have a top-level module; none: it was not installed as one."""
    found = _of_same_name(module)
    return found if found else tuple(sorted(set(_table().get(module, ()))))


@functools.cache
def _of_same_name(module: str) -> tuple[str, ...]:
    """Spare the many modules that are called as their distribution the reading of all of them."""
    try:
        found = metadata.distribution(module)
        files = f"\n{found.read_text('RECORD') or ''}"
    except (metadata.PackageNotFoundError, ValueError, OSError):
        return ()
    is_there = module == _OURS or f"\n{module}/__init__.py," in files or f"\n{module}.py," in files
    return (module,) if is_there else ()


@functools.cache
def _table() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def versions_of(names: Iterable[str]) -> dict[str, str]:
    """Return versions by name: of distributions, and of what they require, and so on.

    What they require for extras alone is not among them, nor what cloudexec requires.
    """
    versions: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = _plain(waiting.pop())
        if name in versions:
            continue
        version, required = _look(name)
        if version:
            versions[name] = version
            waiting += required
    return versions


def _look(name: str) -> tuple[str, tuple[str, ...]]:
    try:
        found = metadata.distribution(name)
        version = found.version or "?"
        commit = json.loads(found.read_text("direct_url.json") or "{}").get("vcs_info", {})
    except (metadata.PackageNotFoundError, ValueError, OSError, AttributeError):
        return "", ()
    if commit:  # its version alone does not say which code it is
        version = f"{version} ({commit.get('commit_id', '?')})"
    if name == _OURS:
        return version, ()
    required = [each.partition(";") for each in found.requires or ()]
    names = [_NAME.match(each.strip()) for each, _, when in required if "extra" not in when]
    return version, tuple([each[0] for each in names if each is not None])


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
