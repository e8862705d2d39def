"""On the machine: files that the program writes go into the bucket while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cloudexec._errors import AwsError
from cloudexec._runs.bucket import RENEW_EVERY, OutputFile, RunBucket, file_digest

__all__ = ["Outputs"]

_Stamp = tuple[int, int, int]
"""Size, time of the last change in nanoseconds, and permissions."""
_LIST_EVERY = 5.0
"""Seconds after which what was sent is listed, also while more is being sent."""


class Outputs:
    """Keeps what a program writes into some folders.

    Args:
        bucket: Where it goes.
        folder: The run's folder.
        wanted: Folders below it, or files.
        folders: Those of them that are made before the program starts.
        renew_every: Seconds after which a file is sent again that has not changed.
    """

    def __init__(
        self,
        bucket: RunBucket,
        folder: Path,
        wanted: Sequence[str],
        folders: Sequence[str] = (),
        *,
        renew_every: float = RENEW_EVERY,
    ) -> None:
        self._bucket = bucket
        self._folder = folder
        self._wanted = wanted
        self._folders = folders
        self._renew_every = renew_every
        self._kept: dict[str, OutputFile] = {}
        self._stamps: dict[str, _Stamp] = {}
        """Of files as the bucket has them, or as they were sent here."""
        self._seen: dict[str, _Stamp] = {}
        """Of files at the last look: one that changes is left until it rests."""
        self._is_listed = True
        """Whether the bucket's list is that of the files that are kept."""
        self._listed_at = time.monotonic()
        self._replaced: list[OutputFile] = []
        """Files in the bucket that the next list does not name any more."""
        self._unsendable: set[str] = set()

    async def prepare(self, report: Callable[[str], None]) -> None:
        """Make the folders, and put back what an earlier attempt has written.

        Files that are there already do not come back unless the program changes them.

        Args:
            report: Told about files that cannot be put back.

        Raises:
            AwsError: If the bucket cannot be read.
        """
        for each in self._wanted:
            path = self._folder / each
            if not path.exists():
                (path if each in self._folders else path.parent).mkdir(parents=True, exist_ok=True)
        if not self._wanted:
            return
        self._stamps = dict(self._found())

        def note(text: str) -> None:
            self._is_listed = False  # the list names files that are not there
            report(text)

        for output in await self._bucket.fetch(self._folder, self._wanted, note):
            self._kept[output.path] = output
            self._stamps[output.path] = _stamp(self._folder / output.path)

    async def keep(self, *, is_last: bool = False) -> list[str]:
        """Send files that have changed since they were sent.

        A file that cannot be sent does not keep back the others, and is tried again next time.

        Args:
            is_last: Whether the program has ended: files are sent although they have just changed.

        Returns:
            For each file that could not be sent, why.

        Raises:
            AwsError: If the list of the files could not be written.
        """
        found = dict(self._found())
        failed = [
            f"{each}: its name is not UTF-8, and the bucket takes no other names"
            for each in sorted(self._unsendable)
        ]
        for path, stamp in found.items():
            rests = is_last or self._seen.get(path) == stamp
            if rests and (stamp != self._stamps.get(path) or self._is_old(path)):
                try:
                    await self._send(path, stamp, is_last=is_last)
                except (AwsError, OSError) as exc:
                    failed.append(f"{path}: {exc}")
            if not self._is_listed and time.monotonic() - self._listed_at > _LIST_EVERY:
                await self._list()
        self._seen = found
        for path in self._kept.keys() - found.keys():
            # The program has removed it, such as a checkpoint that is out of date.
            self._replaced.append(self._kept.pop(path))
            self._is_listed = False
        if not self._is_listed:
            await self._list()
        return failed

    def links(self) -> list[str]:
        """Return symbolic links that do not come back: those to folders, and to nothing."""
        found = []
        for each in self._wanted:
            for directory, folders, names in os.walk(self._folder / each):
                for path in (Path(directory) / name for name in folders + names):
                    if path.is_symlink() and not path.is_file():
                        found.append(path.relative_to(self._folder).as_posix())
        return sorted({*found})

    def _is_old(self, path: str) -> bool:
        kept = self._kept.get(path)
        return kept is not None and time.time() - kept.sent_at >= self._renew_every

    async def _list(self) -> None:
        """Write which files are kept, and then delete those that were."""
        self._listed_at = time.monotonic()
        await self._bucket.put_outputs(sorted(self._kept.values(), key=lambda each: each.path))
        self._is_listed = True
        names = {each.object_name for each in self._kept.values()}
        gone = [each for each in self._replaced if each.object_name not in names]
        self._replaced.clear()
        with contextlib.suppress(AwsError):  # the bucket's lifecycle rule deletes them later
            await self._bucket.forget_outputs(gone)

    async def _send(self, path: str, stamp: _Stamp, *, is_last: bool) -> None:
        """Send a file; one that changes meanwhile is sent again next time."""
        file = self._folder / path
        size, mtime_ns, mode = stamp
        try:
            digest = await asyncio.to_thread(file_digest, file)
            output = OutputFile(
                path=path,
                size=size,
                sha256=digest.hex(),
                mtime_ns=mtime_ns,
                mode=mode,
                sent_at=time.time(),
            )
            await self._bucket.send_output(output, file)
            if _stamp(file) != stamp and not is_last:
                self._replaced.append(output)
                return
        except FileNotFoundError:
            return  # the program has removed it
        except AwsError as exc:
            if is_last or exc.code not in ("BadDigest", "XAmzContentChecksumMismatch"):
                raise
            return
        if path in self._kept:
            self._replaced.append(self._kept[path])
        self._stamps[path] = stamp
        self._kept[path] = output
        self._is_listed = False

    def _found(self) -> Iterator[tuple[str, _Stamp]]:
        self._unsendable.clear()
        for each in self._wanted:
            for file in _files(self._folder / each):
                path = file.relative_to(self._folder).as_posix()
                try:
                    path.encode()
                except UnicodeEncodeError:
                    self._unsendable.add(repr(os.fsencode(path)))
                    continue
                try:
                    if file.is_file():
                        yield path, _stamp(file)
                except OSError:
                    continue  # the program has removed it


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for directory, _, names in os.walk(path):
        for name in names:
            yield Path(directory) / name


def _stamp(file: Path) -> _Stamp:
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_mode & 0o777
