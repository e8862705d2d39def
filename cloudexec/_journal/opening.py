"""Which kind of journal a name means."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cloudexec._errors import ConfigError
from cloudexec._journal.store import Store

if TYPE_CHECKING:
    from cloudexec._server.portal import Portal

__all__ = ["open_store"]

_FORMS = "give a file's path, or 's3://bucket/prefix'"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def open_store(where: str | os.PathLike[str], portal: Portal) -> Store:
    """Open a journal, or begin one.

    Args:
        where: A file's path, or ``s3://bucket/prefix``.
        portal: Has the event loop, for those who need one.

    Raises:
        ConfigError: If ``where`` names no journal.
        JournalError: If it cannot be opened; see its subclasses.
        AwsError: If the bucket cannot be used.
    """
    text = os.fspath(where)
    if not text.strip() or "\0" in text:
        why = "is empty" if not text.strip() else "has a null character in it"
        raise ConfigError(f"journal={text!r} {why}: {_FORMS}")
    if text.startswith("s3://"):
        bucket, _, prefix = text[5:].partition("/")
        prefix = prefix.strip("/")
        if not bucket or not prefix:
            missing = "prefix" if bucket else "bucket"
            raise ConfigError(f"journal={text!r} names no {missing}: {_FORMS}")
        from cloudexec._journal.bucket import BucketStore

        return BucketStore.open(bucket, f"{prefix}/", portal)
    from cloudexec._journal.sqlite import SqliteStore

    scheme = _SCHEME.match(text)
    if scheme is not None:
        raise ConfigError(f"journal={text!r} begins with {scheme[0]!r}: {_FORMS}")
    try:
        path = Path(text).expanduser()
    except RuntimeError as exc:
        raise ConfigError(f"journal={text!r} names a home that is not known: {_FORMS}") from exc
    return SqliteStore(path)
