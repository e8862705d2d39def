"""The output of a run: a file that is locked for one run, or a stream that is only written."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from cloudexec.cli._errors import CommandError, RunError

try:
    import fcntl
except ImportError:  # on Windows, nothing keeps two runs from writing to the same output
    _HAS_LOCKS = False
else:
    _HAS_LOCKS = True


class ReaderGoneError(Exception):
    """The program that read standard output has stopped reading."""


class Output(Protocol):
    """The file or stream that records are written to."""

    @property
    def name(self) -> str:
        """The output's name in messages."""

    def append(self, data: bytes) -> None:
        """Write bytes so that they survive the end of this process.

        Raises:
            RunError: If they cannot be written.
            ReaderGoneError: If the program that read them has ended.
        """

    def close(self) -> None:
        """Close the output."""


class StreamOutput:
    """Standard output, a pipe or a device: written once, never read."""

    def __init__(self, path: str | None) -> None:
        """Open the stream.

        Args:
            path: A pipe's or device's path; None for standard output.
        """
        self.name = "standard output" if path is None else path
        # Unbuffered, so that nothing must be flushed after the reading program has ended.
        self._fd = 1 if path is None else os.open(path, os.O_WRONLY | _O_BINARY)

    def append(self, data: bytes) -> None:
        """Write bytes at once."""
        try:
            _write_all(self._fd, data)
        except BrokenPipeError:
            raise ReaderGoneError(self.name) from None
        except OSError as exc:
            raise RunError(f"cannot write to {self.name}: {exc.strerror}") from exc

    def close(self) -> None:
        """Close a pipe or device; standard output stays open."""
        if self._fd != 1:
            os.close(self._fd)


class OutputFile:
    """A regular file, locked against other runs while it is open."""

    def __init__(self, path: Path) -> None:
        """Open the file, or create it empty, and lock it.

        Args:
            path: The file's path.

        Raises:
            CommandError: If it cannot be written, or another run has it.
        """
        self.path = path
        self.name = str(path)
        if not path.parent.is_dir():
            raise CommandError(f"the folder of {path} does not exist")
        try:
            self._fd = self._open(path)
        except OSError as exc:
            raise CommandError(f"{path} cannot be written: {exc.strerror}") from exc

    def _open(self, path: Path) -> int:
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _O_BINARY, 0o666)
            if not _lock(fd):
                os.close(fd)
                raise CommandError(f"{path} is being written by another run")
            # The other run may have replaced the file between our open and our lock.
            if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
            os.close(fd)

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return os.fstat(self._fd).st_size

    def lines(self) -> Iterator[bytes]:
        """Read the lines from the start, each with its line end."""
        with open(self.path, "rb") as stream:
            yield from stream

    def append(self, data: bytes) -> None:
        """Write bytes at the end, in one system call if the system accepts all at once."""
        try:
            _write_all(self._fd, data)
        except OSError as exc:
            raise RunError(f"cannot write to {self.name}: {exc.strerror}") from exc

    def truncate(self, size: int) -> None:
        """Cut the file to its first ``size`` bytes."""
        os.ftruncate(self._fd, size)

    def replace(self, pieces: Iterable[bytes]) -> None:
        """Replace the file's content as a whole; a crash leaves the old or the new content.

        Args:
            pieces: The new content, which may be read from this file while it is written.

        Raises:
            RunError: If it cannot be written; the file is then unchanged.
        """
        beside = self.path.with_name(f"{self.path.name}.rewriting")
        try:
            fd = os.open(
                beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | _O_BINARY, 0o666
            )
            try:
                os.chmod(beside, stat.S_IMODE(os.fstat(self._fd).st_mode))
                with open(fd, "wb", closefd=False) as stream:
                    stream.writelines(pieces)
                if _HAS_LOCKS:
                    _lock(fd)  # before the file gets the name by which other runs open it
                    os.replace(beside, self.path)
                    os.close(self._fd)
                else:  # Windows cannot replace a file that is open
                    os.close(fd)
                    os.close(self._fd)
                    os.replace(beside, self.path)
                    fd = os.open(self.path, os.O_RDWR | os.O_APPEND | _O_BINARY)
            except BaseException:
                os.close(fd)
                beside.unlink(missing_ok=True)
                raise
        except OSError as exc:
            raise RunError(f"cannot rewrite {self.name}: {exc.strerror}") from exc
        self._fd = fd

    def close(self) -> None:
        """Unlock and close the file."""
        os.close(self._fd)


_O_BINARY: int = getattr(os, "O_BINARY", 0)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _lock(fd: int) -> bool:
    """Lock a file for as long as it is open; return false if another process has locked it."""
    if not _HAS_LOCKS:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some file systems, such as network shares, have no locks
        return True
    return True


def is_stream(path: Path) -> bool:
    """Whether the path is a pipe or a device, which cannot be read back."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
