"""Bytes of an input, readable from the start as often as needed."""

from __future__ import annotations

import gzip
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cloudexec.cli._errors import CommandError

STDIN = "-"


class Reopenable:
    """An input that is read more than once: first to check it, then to run it.

    What can be read only once (standard input, a pipe) is copied to a temporary file first.
    """

    def __init__(self, path: str) -> None:
        """Check that the input can be read.

        Args:
            path: A file's path, or ``-`` for standard input.

        Raises:
            CommandError: If there is no such file, or it cannot be read.
        """
        self.name = "standard input" if path == STDIN else path
        self._path = path
        self._copy: IO[bytes] | None = None
        try:
            if path == STDIN:
                self._spool(sys.stdin.buffer)
            elif stat.S_ISDIR(os.stat(path).st_mode):
                raise CommandError(f"{path} is a folder: name its files with a glob, '{path}/*'")
            elif stat.S_ISREG(os.stat(path).st_mode):
                with open(path, "rb"):
                    pass
            else:
                with open(path, "rb") as pipe:
                    self._spool(pipe)
        except FileNotFoundError:
            raise CommandError(f"there is no file {path}") from None
        except OSError as exc:
            raise CommandError(f"{path} cannot be read: {exc.strerror or exc}") from exc

    def _spool(self, stream: IO[bytes]) -> None:
        # The temporary file is deleted together with this object.
        self._copy = tempfile.NamedTemporaryFile(prefix="cloudexec-input-")  # noqa: SIM115
        shutil.copyfileobj(stream, self._copy)
        self._copy.flush()

    def lines(self) -> Iterator[bytes]:
        """Read the lines from the start, each with its line end.

        Raises:
            CommandError: If reading fails on the way.
        """
        path = self._path if self._copy is None else self._copy.name
        try:
            with gzip.open(path) if Path(path).suffix == ".gz" else open(path, "rb") as stream:
                yield from stream
        except (OSError, EOFError) as exc:
            raise CommandError(f"{self.name} cannot be read: {exc}") from exc


def stdin_lines() -> Iterator[bytes]:
    """Read standard input line by line as it arrives.

    The file descriptor is read directly: a thread that waits inside ``sys.stdin`` holds a lock
    that the interpreter needs when it ends.
    """
    rest = b""
    while chunk := os.read(0, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest
