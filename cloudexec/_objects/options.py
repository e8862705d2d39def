"""Settings for large objects."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cloudexec._config import check_count, parse_bytes
from cloudexec._errors import ConfigError
from cloudexec._record_class import record

__all__ = ["Limits", "ObjectOptions", "in_mib", "memory_of_machine"]


@record
class Limits:
    """How many bytes a store of blobs may hold.

    Attributes:
        memory: Bytes in memory; blobs beyond that go to disk.
        cache: Bytes of unused blobs that are kept, because the same content may be sent again.
        directory: Directory on disk. An empty string means the directory for temporary files,
            ``None`` that nothing goes to disk.
        disk: Bytes on disk; ``None`` for no other limit than the disk's room.
    """

    memory: int
    cache: int
    directory: str | None = ""
    disk: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectOptions:
    """How large arguments and results are kept and moved; for ``BatchExecutor(objects=...)``.

    Pieces of arguments, closures and results that are larger than 64 KiB are blobs. Each worker
    receives each blob once. Sizes are given in bytes, or as a string such as ``"2GiB"``.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    memory: int | str | None = None
    """Bytes of blobs in the client's memory; blobs beyond that go to disk. ``None`` means half of
    the memory of the machine or the container."""
    spill_directory: str | os.PathLike[str] | bool = True
    """Directory for blobs that do not fit in memory. ``True`` means the directory for temporary
    files. With ``False``, a call whose blobs do not fit fails with ``PayloadTooLargeError``."""
    disk: int | str | None = None
    """Bytes of blobs on disk; ``None`` for no other limit than the disk's room."""
    cache: int | str | None = None
    """Bytes of blobs that no task needs any more. They are kept because the same content may be
    sent again. ``None`` means a tenth of ``memory``, at most 1 GiB."""
    worker_memory: int | str | None = None
    """Bytes of blobs in each worker's memory; blobs beyond that go to the worker's disk. ``None``
    means a quarter of the worker's memory."""
    bucket: str | bool | None = None
    """S3 bucket that carries large blobs between this machine and workers elsewhere. An argument is
    uploaded once, however many workers download it. Results come back the same way, and results
    that are kept (``keep=True``) stay in the bucket when their worker ends. If there is only one
    worker, or S3 fails, blobs are sent directly. ``None`` means the bucket of the profile, if it
    has one; ``False`` means no bucket. Workers need no AWS permissions for this. The executor
    deletes its objects when it shuts down."""
    bucket_threshold: int | str = "8MiB"
    """Bytes from which on a blob goes through the bucket."""
    compression: bool = True
    """Whether blobs that are sent directly to and from workers elsewhere may be compressed. They
    are compressed if the connection is slow (below 50 MB/s) and a sample of the data shrinks."""

    def __post_init__(self) -> None:
        for name in ("memory", "disk", "cache", "worker_memory", "bucket_threshold"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    value = parse_bytes(value)
                except ConfigError as exc:
                    raise ConfigError(f"{name}: {exc}".replace(": memory", "", 1)) from None
                object.__setattr__(self, name, value)
            if value is not None:
                check_count(name, value, least=0 if name in ("cache", "disk") else 1)
        if not isinstance(self.spill_directory, bool):
            try:
                directory = os.fsdecode(self.spill_directory)
            except TypeError:
                raise ConfigError(
                    f"spill_directory must be a directory, True or False, not "
                    f"{self.spill_directory!r}"
                ) from None
            if not os.path.isdir(directory):
                raise ConfigError(f"spill_directory must be a directory that exists: {directory!r}")
            object.__setattr__(self, "spill_directory", directory)
        if not isinstance(self.compression, bool):
            raise ConfigError(f"compression must be True or False, not {self.compression!r}")
        named = isinstance(self.bucket, str) and self.bucket
        if not named and self.bucket is not None and self.bucket is not False:
            raise ConfigError(f"bucket must be a bucket's name, None or False, not {self.bucket!r}")

    def limits(self) -> Limits:
        """Return the limits of the client's store."""
        memory = _bytes(self.memory) or memory_of_machine() // 2
        cache = _bytes(self.cache)
        where = self.spill_directory
        return Limits(
            memory=memory,
            cache=min(memory // 10, 2**30) if cache is None else cache,
            directory=None if where is False else "" if where is True else str(where),
            disk=_bytes(self.disk),
        )


def _bytes(value: int | str | None) -> int | None:
    assert not isinstance(value, str)  # __post_init__ has replaced strings by numbers
    return value


def memory_of_machine() -> int:
    """Return the bytes of memory that this process may use: the machine's, or its container's."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        total = 4 * 2**30
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                total = min(total, int(file.read()))
        except (OSError, ValueError):
            continue  # there is no such limit
    return total


ObjectOptions.__module__ = "cloudexec"


def in_mib(size: int) -> str:
    """Write a number of bytes in MiB, as messages do that compare it with a limit."""
    return f"{size / 2**20:.4g} MiB"
