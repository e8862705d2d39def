"""A worker's environment as a .zip archive, for functions of AWS Lambda without an image.

Lambda unpacks the archive, and starts the Python of its own managed runtime by way of a script in
it, which has that Python run a worker instead. The environment is the user site of that Python, so
that it is found by each process that a task starts, too, and its ``.pth`` files are read.

References:
    AWS Lambda Developer Guide, "Modifying the runtime environment" (wrapper scripts), "Lambda
    runtimes", "Lambda quotas" and "Working with .zip file archives for Python Lambda functions".
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import io
import stat
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloudexec._aws import image_contents
from cloudexec._environment.base import Report
from cloudexec._environment.cache import Cache
from cloudexec._environment.collection import Collection
from cloudexec._environment.components import of_wheel
from cloudexec._environment.fetching import find_installer
from cloudexec._environment.inventory import Inventory, signature_of, take_inventory
from cloudexec._environment.layers import Group, Node, bytecode_of, content_key, group, members
from cloudexec._environment.packages import Packages
from cloudexec._environment.target import ENVIRONMENT_ROOT, Target
from cloudexec._errors import ConfigError

__all__ = ["MOST_UNPACKED", "ROOT", "RUNTIMES", "WRAPPER", "Archive", "find_archive"]

RUNTIMES: Mapping[str, int] = {"3.11": 26, "3.12": 34, "3.13": 34, "3.14": 34}
"""Versions of Python that Lambda has managed runtimes of, with the minor version of their glibc:
that of Amazon Linux 2, and from Python 3.12 on that of Amazon Linux 2023. AWS Lambda Developer
Guide, "Lambda runtimes"."""
MOST_UNPACKED = 262_144_000
"""Bytes of all files: 250 MB in "Lambda quotas", AWS Lambda Developer Guide, and this number in
what Lambda answers."""
ROOT = "/var/task"
"""Where Lambda unpacks it. AWS Lambda Developer Guide, "Using Lambda environment variables",
``LAMBDA_TASK_ROOT``."""
_WRAPPER_NAME = "cloudexec-function"
WRAPPER = f"{ROOT}/{_WRAPPER_NAME}"
"""Value of ``AWS_LAMBDA_EXEC_WRAPPER``: the program with which Lambda starts the runtime. It is
given the path of the interpreter, and the arguments with which that usually starts. AWS Lambda
Developer Guide, "Modifying the runtime environment"."""
_SCRIPT = b"""#!/bin/bash
# In PYTHONPATH are the packages that the runtime brings. They would hide those of this archive.
unset PYTHONPATH
export PYTHONUSERBASE="$LAMBDA_TASK_ROOT"
export PATH="$LAMBDA_TASK_ROOT/bin:${1%/*}:$PATH"
exec "$1" -P -m cloudexec.worker
"""
_SHEBANG = f"#!/{ENVIRONMENT_ROOT}/bin/python".encode()
_NEW_SHEBANG = b"#!/usr/bin/env python3"
"""The interpreter is found by the ``PATH`` that the script above has set."""
_FORMAT = 1
"""Raised when the same components make another archive."""
_TIME = (1980, 1, 1, 0, 0, 0)
"""Of all files: the earliest that an archive can have."""
_LEVEL = 5
_LARGEST = 5
"""Packages that are named where all of them do not fit."""
_HOLDS = 3600.0
"""Seconds for which it is not tried again what did not fit."""


@dataclass(slots=True)
class Archive:
    """An archive that fits, whose bytes are made when they are needed."""

    content: str
    """64 hexadecimal digits that differ whenever a file in it does."""
    runtime: str
    """The managed runtime that it is for, such as ``"python3.12"``."""
    size: int
    """Bytes of the archive."""
    unpacked: int
    """Bytes of all files in it."""
    _packer: _Packer = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return f"a .zip archive of {self.size / 1e6:,.1f} MB for the runtime {self.runtime}"

    def data(self) -> bytes:
        """Return the archive. It is packed again if it was not packed just now.

        Raises:
            ConfigError: If the environment has changed meanwhile.
        """
        found = self._packer.pack()
        if found.content != self.content:
            raise ConfigError("the packages were changed while they were prepared: start again")
        return found.data

    def forget(self) -> None:
        """Free the memory of the archive, which is packed again if it is needed again."""
        self._packer.forget()


@dataclass(frozen=True, slots=True)
class _Packed:
    content: str
    data: bytes
    unpacked: int


def find_archive(
    packages: Packages,
    *,
    python: str,
    platform: str,
    report: Report,
    demanded: bool,
    cache: Cache | None = None,
    inventory: Inventory | None = None,
) -> Archive:
    """Return the archive with packages for a managed runtime.

    Args:
        packages: What workers are to have.
        python: Minor version of the workers' Python.
        platform: Of the workers: ``"linux/amd64"`` or ``"linux/arm64"``.
        report: Told what is going on, in any thread.
        demanded: Whether nothing else will do: otherwise what did not fit is not tried again for
            an hour.
        cache: What is known from before.
        inventory: What is installed; by default in the environment of this process.

    Raises:
        ConfigError: If there is no such runtime, a package cannot be had for it, or all together
            are too large.
    """
    if python not in RUNTIMES:
        raise ConfigError(
            f"AWS Lambda has no runtime for Python {python}, only for {', '.join(RUNTIMES)}: "
            f"functions without an image cannot run there"
        )
    if packages.base:
        raise ConfigError(
            f"packages with base={packages.base!r} need an image, as that is what they are put on"
        )
    cache = cache or Cache()
    packer = _Packer(packages, Target(python, platform, RUNTIMES[python]), cache, inventory, report)
    key = packer.key()
    known = cache.read("archives", key)
    if known is not None and "content" in known:
        return Archive(runtime=f"python{python}", _packer=packer, **known)
    if known is not None and not demanded and time.time() - known["at"] < _HOLDS:
        raise ConfigError(known["misfit"])
    try:
        packed = packer.pack()
    except ConfigError as exc:
        cache.write("archives", key, {"misfit": str(exc), "at": time.time()})
        raise
    record: dict[str, Any] = {
        "content": packed.content,
        "size": len(packed.data),
        "unpacked": packed.unpacked,
    }
    cache.write("archives", key, record)
    cache.tidy()
    return Archive(runtime=f"python{python}", _packer=packer, **record)


class _Packer:
    """Packs an environment, once unless it is forgotten."""

    def __init__(
        self,
        packages: Packages,
        target: Target,
        cache: Cache,
        inventory: Inventory | None,
        report: Report,
    ) -> None:
        self._packages = packages
        self._target = target
        self._cache = cache
        self._report = report
        self._packed: _Packed | None = None
        # The last one is the init of images.
        self._pins = image_contents.worker_pins()[:-1]
        self._collection = Collection(
            packages,
            inventory or take_inventory(),
            self._pins,
            cache,
            functools.cache(lambda: find_installer(packages.wheels)),
        )

    def key(self) -> str:
        """Return what differs whenever the archive may."""
        facts = (
            _FORMAT,
            self._target,
            _SCRIPT,
            image_contents.own_version(),
            self._pins,
            signature_of(image_contents.own_folder()),
            self._collection.signature(),
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def pack(self) -> _Packed:
        """Return the archive.

        Raises:
            ConfigError: If a package cannot be had, or all together are too large.
        """
        if self._packed is None:
            self._packed = self._pack()
        return self._packed

    def forget(self) -> None:
        """Free the memory of the archive."""
        self._packed = None

    def _pack(self) -> _Packed:
        target = self._target
        self._report(f"packing {self._packages.describe()} into a .zip archive for {target}")
        version = image_contents.own_version()
        groups = group(
            [
                *self._collection.components(target),
                of_wheel("cloudexec", version, image_contents.own_wheel(), target),
            ]
        )
        size = sum(component.size for each in groups for component in each.components)
        if size > MOST_UNPACKED:
            raise _too_large(groups, size)
        bytecode = bytecode_of(groups, target, ROOT)
        if size + sum(map(len, bytecode.values())) > MOST_UNPACKED:
            bytecode = {}  # A worker that starts compiles what it imports.
        whole = hashlib.sha256(f"{_FORMAT} {target}\n".encode() + _SCRIPT)
        whole.update((importlib.util.MAGIC_NUMBER if bytecode else b"none") + b"\n")
        for each in groups:
            for component in each.components:
                whole.update(f"{content_key(component, self._cache)}\n".encode())
        data, unpacked = _zipped(_nodes(groups, bytecode))
        return _Packed(whole.hexdigest(), data, unpacked)


def _nodes(groups: Sequence[Group], bytecode: Mapping[str, bytes]) -> Iterator[tuple[str, Node]]:
    """Yield all files with their places in the archive, in an order that is always the same."""
    yield _WRAPPER_NAME, Node(_SCRIPT, 0o755)
    for each in groups:
        yield from members(each, bytecode)


def _zipped(nodes: Iterator[tuple[str, Node]]) -> tuple[bytes, int]:
    """Return an archive, with times that are always the same, and the bytes of all files in it."""
    file, unpacked = io.BytesIO(), 0
    with zipfile.ZipFile(file, "w") as archive:
        for path, node in nodes:
            content = node.content.read_bytes() if isinstance(node.content, Path) else node.content
            assert content is not None, "there are files alone"
            if content.startswith(_SHEBANG):
                content = _NEW_SHEBANG + content.removeprefix(_SHEBANG)
            info = zipfile.ZipInfo(path, _TIME)
            info.create_system = 3  # Unix, whose modes follow.
            info.external_attr = (stat.S_IFREG | node.mode) << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED, _LEVEL)
            unpacked += len(content)
    return file.getvalue(), unpacked


def _too_large(groups: Sequence[Group], size: int) -> ConfigError:
    components = [component for each in groups for component in each.components]
    largest = sorted(components, key=lambda each: (-each.size, each.name))[:_LARGEST]
    named = ", ".join(f"{each.name} {each.size / 1e6:,.1f} MB" for each in largest)
    return ConfigError(
        f"the packages have {size / 1e6:,.1f} MB, and a function of AWS Lambda without an image "
        f"has {MOST_UNPACKED / 1e6:,.1f} MB at most. The largest are {named}. Leave out what tasks "
        f"do not need (exclude=)"
    )
