"""Which packages workers are to have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloudexec._errors import ConfigError

__all__ = ["Packages"]

_FILES = ("uv.lock", "pyproject.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packages:
    """Which packages workers are to have, and on which image.

    Raises:
        ConfigError: If a field is out of its range.
    """

    source: str | Path = "here"
    """``"here"``: what is installed in the environment of this process. ``"none"``: only what a
    worker itself needs. Otherwise a requirements file, a ``pyproject.toml`` or a ``uv.lock``."""
    exclude: Sequence[str] = ()
    """Names of packages that workers do without."""
    extra: Sequence[str] = ()
    """Requirements of packages that workers have as well, or in another version, such as
    ``"polars>=1"``."""
    base: str = ""
    """Image to put them on, with that Python and glibc; empty: the official one of Python."""
    wheelhouse: str | Path | None = None
    """Directory that has all wheels that are needed and are not here, instead of an index."""

    def __post_init__(self) -> None:
        for name, given in (("exclude", self.exclude), ("extra", self.extra)):
            if isinstance(given, str) or not all(isinstance(each, str) for each in given):
                raise ConfigError(f"{name} must be a list of strings, not {given!r}")
            object.__setattr__(self, name, tuple(given))
        if not isinstance(self.source, (str, Path)) or not str(self.source).strip():
            raise ConfigError(
                f"packages must be 'here', 'none' or the path of a file, not {self.source!r}"
            )
        file = self.file
        if file is not None and not file.is_file():
            raise ConfigError(
                f"packages must be 'here', 'none' or the path of a file; there is no file "
                f"{str(file)!r}"
            )
        if file is not None and file.name not in _FILES and file.suffix != ".txt":
            raise ConfigError(
                f"packages={str(file)!r} must be a requirements file (.txt), a pyproject.toml or a "
                f"uv.lock; other tools can write a requirements file, such as `poetry export`"
            )
        wheels = self.wheelhouse
        if wheels is not None and not (isinstance(wheels, (str, Path)) and str(wheels).strip()):
            raise ConfigError(f"wheelhouse must be the path of a directory, not {wheels!r}")
        if self.wheels is not None and not self.wheels.is_dir():
            raise ConfigError(f"the wheelhouse {self.wheelhouse} is not a directory")

    @property
    def file(self) -> Path | None:
        """The file that names the packages; ``None``: none does."""
        return None if self.source in ("here", "none") else Path(self.source).absolute()

    @property
    def wheels(self) -> Path | None:
        """The directory that has all wheels; ``None``: an index has them."""
        return None if self.wheelhouse is None else Path(self.wheelhouse)

    def describe(self) -> str:
        """Say in a few words what these are."""
        if self.source == "here":
            return "the packages that are installed here"
        if self.source == "none":
            return "no packages but the worker's own"
        return f"the packages of {self.source}"


Packages.__module__ = "cloudexec.aws"
