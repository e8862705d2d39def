"""The versions of installed packages, as a worker tells them and the client compares them."""

from __future__ import annotations

import functools
import os
import sys
import zlib

__all__ = ["differences", "installed_versions", "pack_versions"]

_SITES = ("site-packages", "dist-packages")
_PACKED_LARGEST = 8 * 1024
"""Half of what a worker may say before it has proved who it is."""
_TEXT_LARGEST = 256 * 1024
_NAMED = 8


@functools.cache
def installed_versions() -> dict[str, str]:
    """Return the version of each installed distribution, by name: from the names of directories.

    That is what reading their metadata would say, in a hundredth of the time. Where a directory has
    two versions, the one that was installed last counts.
    """
    found: dict[str, str] = {}
    for path in sys.path:
        if os.path.basename(path) not in _SITES:
            continue
        try:
            names = os.listdir(path)
        except OSError:
            continue
        here: dict[str, str] = {}  # by a distribution's name, that of its directory
        for each in names:
            if each.endswith(".dist-info"):
                name = each.removesuffix(".dist-info").rpartition("-")[0]
                name = name.replace("_", "-").replace(".", "-").lower()
                if name not in here or _installed(path, each) > _installed(path, here[name]):
                    here[name] = each
        for name, each in here.items():
            found.setdefault(name, each.removesuffix(".dist-info").rpartition("-")[2])
    return found


def _installed(path: str, name: str) -> tuple[int, str]:
    try:
        return os.stat(f"{path}/{name}").st_mtime_ns, name
    except OSError:
        return 0, name


def pack_versions() -> bytes:
    """Return the versions here as they travel; nothing where that would be too much."""
    text = "\n".join(f"{name}=={version}" for name, version in sorted(installed_versions().items()))
    packed = zlib.compress(text.encode())
    return packed if len(packed) <= _PACKED_LARGEST else b""


def differences(packed: bytes) -> str:
    """Say which packages have other versions there than here; empty: none that both sides have.

    Args:
        packed: From ``pack_versions`` of a worker, which has proved who it is.
    """
    try:
        text = zlib.decompressobj().decompress(packed, _TEXT_LARGEST).decode(errors="replace")
    except zlib.error:
        return ""
    here = installed_versions()
    found = []
    for line in text.splitlines():
        name, _, version = line.partition("==")
        if here.get(name, version) != version:
            found.append(f"{name} {version} there and {here[name]} here")
    named = ", ".join(found[:_NAMED])
    more = len(found) - _NAMED
    return f"{named} and {more} more" if more > 0 else named
