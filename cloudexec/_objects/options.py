"""Settings for large objects."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cloudexec._config import check_count, parse_bytes
from cloudexec._errors import ConfigError

__all__ = ["Limits", "ObjectOptions", "memory_of_machine"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a store may hold.

    Attributes:
        memory: Bytes in memory; what is more goes to disk.
        cache: Bytes of blobs that nobody uses any more, kept because they may come again.
        directory: Where on disk; empty: the directory for temporary files; ``None``: nowhere.
        disk: Bytes on disk; ``None``: as many as there is room for.
    """

    memory: int
    cache: int
    directory: str | None = ""
    disk: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectOptions:
    """How large arguments and results are kept and moved; for ``BatchExecutor(objects=...)``.

    Arguments, closures and results are blobs from 64 KiB on: each worker receives each of them
    once. Sizes are bytes, or ``"2GiB"``.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    memory: int | str | None = None
    """Bytes of blobs in the client's memory; what is more goes to disk. ``None``: half of what the
    machine, or the container, has."""
    spill_directory: str | os.PathLike[str] | bool = True
    """Where what does not fit in memory goes: ``True``, the directory for temporary files;
    ``False``, nowhere: what does not fit fails with ``PayloadTooLargeError``."""
    disk: int | str | None = None
    """Bytes on disk; ``None``: what there is room for."""
    cache: int | str | None = None
    """Bytes of blobs that no task needs any more and that are kept, as they may be sent again;
    ``None``: a tenth of the memory, 1 GiB at most."""
    worker_memory: int | str | None = None
    """Bytes of blobs in each worker's memory; what is more goes to its disk. ``None``: a quarter
    of what it has."""
    bucket: str | bool | None = None
    """S3 bucket for large blobs between this machine and workers elsewhere: an argument is uploaded
    once, however many workers download it; results come back the same way, and kept ones outlive
    their worker there. Where only one worker is there, or S3 fails, they go directly. ``None``: the
    profile's; ``False``: none. Workers need no rights of their own. All is deleted at the end."""
    bucket_threshold: int | str = "8MiB"
    """Bytes from which a blob goes through the bucket."""
    compression: bool = True
    """Whether what goes to and from workers elsewhere directly may be compressed: done where the
    link is measured to be slow (below 50 MB/s) and a sample shrinks."""

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
        """Return what the client's store may hold."""
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
    assert not isinstance(value, str)  # read when the options were made
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
