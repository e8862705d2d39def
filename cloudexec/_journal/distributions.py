"""The versions of installed distributions, and of the distributions that these require.

A journal identifies installed code by these versions, and does not read the installed files.
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
    """Return the distributions that contain a top-level module; empty if none does."""
    found = _of_same_name(module)
    return found if found else tuple(sorted(set(_table().get(module, ()))))


@functools.cache
def _of_same_name(module: str) -> tuple[str, ...]:
    """Return the distribution of the module's own name, if it contains that module.

    This is the usual case, and spares reading the files of all installed distributions.
    """
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
    """Return the versions of distributions and of all that they require, directly or indirectly.

    The result leaves out what is required by extras only, and what cloudexec itself requires.
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
    if commit:  # it was installed from version control: many commits have the same version
        version = f"{version} ({commit.get('commit_id', '?')})"
    if name == _OURS:
        return version, ()
    required = [each.partition(";") for each in found.requires or ()]
    names = [_NAME.match(each.strip()) for each, _, when in required if "extra" not in when]
    return version, tuple([each[0] for each in names if each is not None])


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
