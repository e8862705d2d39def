"""Files that are this user's alone: what a journal is kept in is run when it is read.

Pickles are code. So nothing is opened that another user owns or may write, and nothing is made
under a name that another user may have taken: in a directory such as ``/tmp``, anybody can put a
link, or a file, where one of ours is about to be.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cloudexec._errors import JournalError

__all__ = ["check_folder", "check_ours", "claim", "open_ours", "real_path"]

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_HAS_USERS = hasattr(os, "geteuid")
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS = 40


def check_ours(path: Path, found: os.stat_result, *, is_folder: bool = False) -> None:
    """Look whether a file is this user's alone.

    Args:
        path: Which, for the message.
        found: What it is.
        is_folder: Whether it has to be a directory, not a file.

    Raises:
        JournalError: If it is not.
    """
    if stat.S_ISLNK(found.st_mode):
        raise JournalError(f"{path} is a symbolic link, and is not followed: remove it")
    if not (stat.S_ISDIR if is_folder else stat.S_ISREG)(found.st_mode):
        kind = "directory" if is_folder else "file"
        raise JournalError(f"{path} is not a {kind}: remove it, or give another journal")
    if not _HAS_USERS:
        return
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.geteuid():
        raise JournalError(
            f"{path} belongs to user {found.st_uid}, and this process runs as user "
            f"{os.geteuid()} (mode {mode:04o}): it holds pickles, and reading them runs what their "
            f"owner wrote. Give another journal, or, if you trust it, run `chown {os.geteuid()} "
            f"{path}`"
        )
    if mode & _OTHERS_MAY_WRITE:
        right = "700" if is_folder else "600"
        raise JournalError(
            f"{path} may be written by others than its owner, user {found.st_uid} (mode "
            f"{mode:04o}): it holds pickles, and reading them runs what was written. If you trust "
            f"what is in it, run `chmod {right} {path}`"
        )


def check_folder(path: Path) -> None:
    """Look whether others may put their files in the place of ours.

    Raises:
        JournalError: If they may: everybody can write there, and the sticky bit is not set.
        OSError: If there is no such directory.
    """
    found = os.stat(path)
    if _HAS_USERS and found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise JournalError(
            f"everybody may replace files in {path} (owner: user {found.st_uid}, mode "
            f"{stat.S_IMODE(found.st_mode):04o}), and so what a journal there holds, which is run "
            f"when it is read: run `chmod o-w {path}`, or give a journal elsewhere"
        )


def real_path(path: Path) -> Path:
    """Return the one name that a file has by whatever links it is called.

    Raises:
        JournalError: If one of the links is another user's, and so its aim is.
    """
    for _ in range(_MOST_LINKS):
        try:
            found = os.lstat(path)
        except OSError:
            break
        if not stat.S_ISLNK(found.st_mode):
            break
        if _HAS_USERS and found.st_uid not in (os.geteuid(), 0):
            raise JournalError(
                f"{path} is a symbolic link of user {found.st_uid}, and is not followed: remove "
                f"it, or give the path that it leads to"
            )
        path = path.parent / os.readlink(path)
    return Path(os.path.realpath(path))


def open_ours(path: Path, flags: int) -> int:
    """Open a file that is this user's alone; one that is made is private.

    Raises:
        JournalError: If it is not ours.
        OSError: If it cannot be opened.
    """
    try:
        fd = os.open(path, flags | _NOFOLLOW | _CLOEXEC, 0o600)
    except OSError:
        if os.path.islink(path):
            check_ours(path, os.lstat(path))  # no error says this well
        raise
    try:
        check_ours(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def claim(path: Path) -> bool:
    """Have a name, so that nobody else can take it; say whether the file is new.

    Raises:
        JournalError: If somebody else has it.
        OSError: If it cannot be made.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _CLOEXEC, 0o600)
    except FileExistsError:
        check_ours(path, os.lstat(path))
        return False
    os.close(fd)
    return True
