"""A lock on a journal. It names its holder, and the operating system releases it when that ends.

Two files are locked. One lies beside the journal and holds the process id and the host of the
program that uses it. The other is the journal itself, because one file can have several names: hard
links, or two mounts of its file system.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import weakref
from pathlib import Path

from cloudexec._errors import JournalError, JournalLockedError
from cloudexec._journal.ownership import open_ours

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two programs from using one journal there
    _HAS_LOCKS = False
else:
    _HAS_LOCKS = True

_ARE_APART = sys.platform.startswith("linux")
"""Whether ``flock`` and SQLite's own (``fcntl``) locks on one file do not affect each other."""

__all__ = ["Lock", "locked_error", "owner", "whoami"]


def locked_error(name: str, pid: int | None, host: str) -> JournalLockedError:
    """Return an error that says which process uses a journal.

    Args:
        name: The journal.
        pid: The process; ``None`` if it is not known.
        host: The host that the process runs on.
    """
    who = "another program" if pid is None else f"process {pid} on {host}"
    return JournalLockedError(
        f"the journal {name} is in use by {who}: wait for it, end it, or give another journal",
        pid=pid,
        host=host,
    )


class Lock:
    """A file beside a journal that is locked with ``flock``; SQLite locks its own files itself.

    Args:
        path: The journal's real path, with symbolic links resolved.

    Raises:
        JournalLockedError: If another program holds the lock.
        JournalError: If the file cannot be made, or a file of that name is not a lock file.
    """

    def __init__(self, path: Path) -> None:
        self._journal = path
        self._file = -1
        self.path = path.with_name(f"{path.name}.lock")
        try:
            self._fd = self._take(path)
        except OSError as exc:
            raise JournalError(
                f"the journal {path} cannot be used: {self.path}: {exc.strerror}; give a journal "
                f"where you may write"
            ) from exc
        _locks.add(self)

    def _take(self, path: Path) -> int:
        while True:
            fd = open_ours(self.path, os.O_RDWR | os.O_CREAT)
            try:
                if _HAS_LOCKS:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The previous holder may have removed the file between our open and our lock.
                if self._is_there(fd):
                    self._check_content(fd)
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, whoami(), 0)
                    return fd
            except BlockingIOError:
                pid, host = owner(os.pread(fd, 4096, 0))
                os.close(fd)
                raise locked_error(str(path), pid, host) from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _is_there(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _check_content(self, fd: int) -> None:
        """Check that the file is empty or a lock file, before anything is written to it."""
        data = os.pread(fd, 4096, 0)
        if os.fstat(fd).st_nlink > 1 or (data and owner(data)[0] is None):
            raise JournalError(
                f"{self.path} is there and no lock of a journal: remove it, or give another journal"
            )

    def hold(self) -> None:
        """Lock the journal's file itself, too, once it exists and again whenever it was replaced.

        Raises:
            JournalLockedError: If another program uses the file by another name.
            JournalError: If other users own the file or may write to it.
            OSError: If it cannot be opened.
        """
        if not (_HAS_LOCKS and _ARE_APART):
            return
        fd = open_ours(self._journal, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _holder(os.fstat(fd))
            os.close(fd)
            raise locked_error(str(self._journal), pid, socket.gethostname()) from None
        except BaseException:
            os.close(fd)
            raise
        self._file, before = fd, self._file
        if before >= 0:
            os.close(before)

    def release(self) -> None:
        """Release the lock, and remove the lock file."""
        _locks.discard(self)
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
        self._close()

    def _forget(self) -> None:
        # In a forked child. A lock ends when its last open descriptor is closed: a child that kept
        # one would hold the lock beyond its parent's death.
        self._close()

    def _close(self) -> None:
        descriptors, self._fd, self._file = (self._fd, self._file), -1, -1
        for fd in descriptors:
            if fd >= 0:
                os.close(fd)


def _holder(found: os.stat_result) -> int | None:
    """Return the process that holds the ``flock`` on a file, according to ``/proc/locks``."""
    device = found.st_dev
    wanted = f"{os.major(device):02x}:{os.minor(device):02x}:{found.st_ino}"
    try:
        with open("/proc/locks") as locks:
            for line in locks:
                parts = line.split()
                if "FLOCK" in parts and wanted in parts:
                    return int(parts[parts.index(wanted) - 1])
    except (OSError, ValueError):
        pass
    return None


def whoami() -> bytes:
    """Return what a lock file says of this process: JSON with its id and its host."""
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()


def owner(data: bytes) -> tuple[int | None, str]:
    """Read what ``whoami`` wrote: a process id (``None`` if it cannot be read) and its host."""
    try:
        found = json.loads(data)
        return int(found["pid"]), str(found["host"])
    except (ValueError, KeyError, TypeError):
        return None, ""


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for lock in list(_locks):
        lock._forget()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
