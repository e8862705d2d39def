"""Makes sure that only this user could have written the files of a journal.

A journal holds pickles, and reading a pickle can run code. So no file is opened that another user
owns or may write to. Files are made exclusively and links are not followed, because in a directory
such as ``/tmp`` any user can put a link or a file where one of ours is about to be made.
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
    """Check that a file belongs to this user and that no other user may write to it.

    Args:
        path: The file's path, for the message.
        found: The file's status, as ``os.lstat`` returns it.
        is_folder: Whether it must be a directory, not a file.

    Raises:
        JournalError: If another user may have written it, or if it is of another kind.
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
    """Check that other users cannot replace files in a directory.

    Raises:
        JournalError: If everybody can write to the directory, and its sticky bit is not set.
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
    """Resolve the symbolic links of a path.

    Raises:
        JournalError: If the path's last part is a link of another user, who can redirect it.
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
    """Open a file that only this user may have written; a new file gets mode 0600.

    Raises:
        JournalError: If another user may have written it.
        OSError: If it cannot be opened.
    """
    try:
        fd = os.open(path, flags | _NOFOLLOW | _CLOEXEC, 0o600)
    except OSError:
        if os.path.islink(path):
            check_ours(path, os.lstat(path))  # raises an error that names the link
        raise
    try:
        check_ours(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def claim(path: Path) -> bool:
    """Make an empty file if there is none, so that no other user can make one of that name.

    Returns:
        Whether the file is new.

    Raises:
        JournalError: If there is a file that another user may have written.
        OSError: If the file cannot be made.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _CLOEXEC, 0o600)
    except FileExistsError:
        check_ours(path, os.lstat(path))
        return False
    os.close(fd)
    return True
