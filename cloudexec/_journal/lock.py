"""A lock on a journal that its holder's death releases, and that says who holds it."""

from __future__ import annotations

import json
import os
import socket
import weakref
from pathlib import Path

from cloudexec._errors import JournalError, JournalLockedError

try:
    import fcntl
except ImportError:  # Windows: two programs on one journal are not kept apart there
    _HAS_LOCKS = False
else:
    _HAS_LOCKS = True

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
        path: The journal's.

    Raises:
        JournalLockedError: If somebody else has it.
        JournalError: If there can be no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(f"{path.name}.lock")
        try:
            self._fd = self._take(path)
        except OSError as exc:
            raise JournalError(
                f"the journal {path} cannot be used: {self.path}: {exc.strerror}"
            ) from exc
        _locks.add(self)

    def _take(self, path: Path) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if _HAS_LOCKS:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid, host = owner(os.pread(fd, 4096, 0))
                os.close(fd)
                raise locked_error(str(path), pid, host) from None
            except BaseException:
                os.close(fd)
                raise
            # The one before us may have removed it between our open and our lock.
            if os.path.exists(self.path) and os.path.samestat(os.fstat(fd), os.stat(self.path)):
                os.ftruncate(fd, 0)
                os.pwrite(fd, whoami(), 0)
                return fd
            os.close(fd)

    def release(self) -> None:
        """Let the next one have it."""
        _locks.discard(self)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(fd)

    def _forget(self) -> None:
        # In a forked child: the parent alone holds it, so that its death ends it.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


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
