"""What the workers run on, in the words of packaging: tags of wheels, markers, glibc."""

from __future__ import annotations

import functools
import platform
import sys
from dataclasses import dataclass

__all__ = ["ENVIRONMENT_ROOT", "Target"]

ENVIRONMENT_ROOT = "opt/worker"
"""Where the environment is in an image."""

_MACHINES = {"linux/amd64": "x86_64", "linux/arm64": "aarch64"}
_OLDEST_GLIBC = 17
"""Of the oldest wheels that are still made. PEP 599."""
_LEGACY = {"x86_64": ("manylinux2010", "manylinux1"), "aarch64": ()}
_UV_NEWEST_GLIBC = 40
"""uv Reference, "--python-platform"."""


@dataclass(frozen=True, slots=True)
class Target:
    """Linux on one kind of processor, with one Python and one C library."""

    python: str
    """Minor version, such as ``"3.11"``."""
    platform: str
    """``"linux/amd64"`` or ``"linux/arm64"``."""
    glibc: int = 28
    """Minor version of glibc 2."""

    def __str__(self) -> str:
        return f"{self.platform} with Python {self.python}"

    @property
    def machine(self) -> str:
        """The processor as Python and wheels name it."""
        return _MACHINES[self.platform]

    @property
    def site_packages(self) -> str:
        """Where packages are in the environment."""
        return f"lib/python{self.python}/site-packages"

    @property
    def is_own_python(self) -> bool:
        """Whether this process compiles the bytecode that workers read."""
        return (
            self.python == f"{sys.version_info.major}.{sys.version_info.minor}"
            and sys.implementation.name == "cpython"
        )

    @property
    def is_like_this_machine(self) -> bool:
        """Whether environment markers have the same values here."""
        is_same = sys.platform == "linux" and platform.machine() == self.machine
        return is_same and self.is_own_python

    def markers(self) -> dict[str, str]:
        """Return the values of environment markers there."""
        full = platform.python_version() if self.is_own_python else f"{self.python}.0"
        return {
            "implementation_name": "cpython",
            "implementation_version": full,
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": full,
            "python_version": self.python,
            "sys_platform": "linux",
        }

    @property
    def wheel_platforms(self) -> list[str]:
        """The platforms of wheels that run there, the best first."""
        versions = (
            range(self.glibc, 4, -1) if self.machine == "x86_64" else range(self.glibc, 16, -1)
        )
        found = [f"manylinux_2_{minor}_{self.machine}" for minor in versions]
        legacy = ("manylinux2014", *_LEGACY[self.machine])
        return found + [f"{name}_{self.machine}" for name in legacy]

    def uv_platform(self) -> str:
        """Return the value of uv's option ``--python-platform``."""
        minor = max(min(self.glibc, _UV_NEWEST_GLIBC), _OLDEST_GLIBC)
        # uv knows 2_17 by its older name, and every version from 2_28 on.
        name = "manylinux2014" if minor < 28 else f"manylinux_2_{minor}"
        return f"{self.machine}-{name}"

    def accepts(self, tags: frozenset[str]) -> bool:
        """Whether a wheel with one of these tags runs there."""
        return not tags.isdisjoint(_tags(self))


@functools.cache
def _tags(target: Target) -> frozenset[str]:
    from packaging.tags import compatible_tags, cpython_tags

    major, minor = map(int, target.python.split("."))
    platforms = target.wheel_platforms
    tags = [
        *cpython_tags((major, minor), platforms=platforms),
        *compatible_tags((major, minor), f"cp{major}{minor}", platforms),
    ]
    return frozenset(map(str, tags))
