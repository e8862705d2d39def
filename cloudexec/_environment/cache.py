"""What is remembered between two starts, in a directory of this user's."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from cloudexec._errors import ConfigError

__all__ = ["Cache"]

Kind: TypeAlias = Literal["archives", "contents", "images", "layers", "projects", "wheels"]
"""What is kept; each has a directory."""
_KEY = re.compile(r"[0-9a-f]{64}(\.json)?")
"""Names of what is kept: keys are digests."""
_NEW = ".new-"
"""How names of what is not finished begin."""
_SCRATCH = ".scratch-"
_KEPT = 30 * 86400.0
"""Seconds after which what nobody has used is removed."""
_LEFT = 86400.0
"""The same, of what a process that was killed has left unfinished."""


class Cache:
    """Small records and directories, each under a key that says all that they depend on.

    Several processes may use it at once: each file and directory appears in one step.

    Args:
        root: The directory; by default ``cloudexec`` in ``$CLOUDEXEC_CACHE_DIR``, or in the user's
            cache directory.

    Raises:
        ConfigError: If nothing can be written there.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or _usual_root()
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise self._unusable(exc) from exc

    def _unusable(self, exc: OSError) -> ConfigError:
        return ConfigError(
            f"the cache {self.root} cannot be used: {exc.strerror}; CLOUDEXEC_CACHE_DIR names "
            f"another directory"
        )

    def read(self, kind: Kind, key: str) -> Any:
        """Return a record; ``None``: there is none."""
        path = self.root / kind / f"{key}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def write(self, kind: Kind, key: str, record: Any) -> None:
        """Keep a record.

        Raises:
            ConfigError: If it cannot be written.
        """
        path = self.root / kind / f"{key}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=path.parent, prefix=_NEW, delete=False, encoding="utf-8"
            ) as file:
                json.dump(record, file)
            os.replace(file.name, path)
        except OSError as exc:
            raise self._unusable(exc) from exc

    def directory(self, kind: Kind, key: str) -> Path | None:
        """Return a directory that is kept; ``None``: there is none."""
        path = self.root / kind / key
        if not path.is_dir():
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return path

    @contextlib.contextmanager
    def fill(self, kind: Kind, key: str, *, replace: bool = False) -> Iterator[Path]:
        """Yield the name of a directory to make, which is kept if nothing is raised.

        Args:
            kind: Of the directory.
            key: Of the directory.
            replace: Whether it takes the place of one that is there by then. Otherwise that one is
                kept, as the process that has made it may be reading it.

        Raises:
            ConfigError: If it cannot be written.
        """
        path = self.root / kind / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=_NEW) as name:
                yield Path(name, "new")
                try:
                    os.rename(Path(name, "new"), path)
                except OSError:
                    # There is one, of before or of somebody else.
                    if path.is_dir() and not replace:
                        return
                    os.rename(path, Path(name, "old"))
                    os.rename(Path(name, "new"), path)
        except OSError as exc:
            raise self._unusable(exc) from exc

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a directory that is removed at the end.

        Raises:
            ConfigError: If it cannot be made.
        """
        try:
            made = tempfile.TemporaryDirectory(dir=self.root, prefix=_SCRATCH)
        except OSError as exc:
            raise self._unusable(exc) from exc
        with made as name:
            yield Path(name)

    def tidy(self) -> None:
        """Remove what nobody has used for a month, and nothing that is not of a cache."""
        now = time.time()
        folders = [self.root / kind for kind in get_args(Kind)]
        left = [*self.root.glob(f"{_SCRATCH}*")]
        left += [path for folder in folders for path in folder.glob(f"{_NEW}*")]
        kept = [
            path for folder in folders for path in folder.glob("*") if _KEY.fullmatch(path.name)
        ]
        for path in [*left, *kept]:
            with contextlib.suppress(OSError):
                if path.stat().st_mtime > now - (_LEFT if path in left else _KEPT):
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def _usual_root() -> Path:
    # A directory of its own in any case: the one that is named may have other things in it.
    base = os.environ.get("CLOUDEXEC_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    return Path(base or os.path.expanduser("~/.cache"), "cloudexec")
