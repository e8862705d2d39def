"""A lock on a journal that its holder's death releases, and that says who holds it.

Two files are locked. One lies beside the journal and says who has it. The other is the journal
itself, as it may have further names: hard links, or places where its file system is mounted twice.
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
except ImportError:  # Windows: two programs on one journal are not kept apart there
    _HAS_LOCKS = False
else:
    _HAS_LOCKS = True

_ARE_APART = sys.platform.startswith("linux")
"""Whether ``flock`` is no concern of SQLite's own locks on the same file."""

__all__ = ["Lock", "locked_error", "owner", "whoami"]


def locked_error(name: str, pid: int | None, host: str) -> JournalLockedError:
    """Say who has a journal."""
    who = "another program" if pid is None else f"process {pid} on {host}"
    return JournalLockedError(
        f"the journal {name} is in use by {who}: wait for it, end it, or give another journal",
        pid=pid,
        host=host,
    )


class Lock:
    """A locked file beside a journal; a file of its own, as SQLite has locks of another kind.

    Args:
        path: The journal's, the one name that it has by whatever links it is called.

    Raises:
        JournalLockedError: If somebody else has it.
        JournalError: If there can be no such file, or what is there is no such file of ours.
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
                # The one before us may have removed it between our open and our lock.
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
        """Look whether this was written as a lock, before anything else is written to it."""
        data = os.pread(fd, 4096, 0)
        if os.fstat(fd).st_nlink > 1 or (data and owner(data)[0] is None):
            raise JournalError(
                f"{self.path} is there and no lock of a journal: remove it, or give another journal"
            )

    def hold(self) -> None:
        """Have the journal itself, too, once there is one, or there is another in its place.

        Raises:
            JournalLockedError: If somebody has it by another name.
            JournalError: If it is not this user's alone.
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
        """Let the next one have it."""
        _locks.discard(self)
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
        self._close()

    def _forget(self) -> None:
        # In a forked child: the parent alone holds it, so that its death ends it.
        self._close()

    def _close(self) -> None:
        descriptors, self._fd, self._file = (self._fd, self._file), -1, -1
        for fd in descriptors:
            if fd >= 0:
                os.close(fd)


def _holder(found: os.stat_result) -> int | None:
    """Return the process that has a file locked, as the kernel tells."""
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
    """Return what others are to read of this process."""
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()


def owner(data: bytes) -> tuple[int | None, str]:
    """Read what ``whoami`` wrote: a process, ``None`` if it cannot be read, and its machine."""
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
