"""On the machine: files that the program writes go into the bucket while it runs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cloudexec._errors import AwsError
from cloudexec._runs.bucket import OutputFile, RunBucket, file_digest

__all__ = ["Outputs"]

_Stamp = tuple[int, int]
"""Size and time of the last change, in nanoseconds."""


class Outputs:
    """Keeps what a program writes into some folders.

    Args:
        bucket: Where it goes.
        folder: The run's folder.
        wanted: Folders below it.
    """

    def __init__(self, bucket: RunBucket, folder: Path, wanted: Sequence[str]) -> None:
        self._bucket = bucket
        self._folder = folder
        self._wanted = wanted
        self._kept: dict[str, OutputFile] = {}
        self._stamps: dict[str, _Stamp] = {}
        """Of files as the bucket has them, or as they were sent here."""
        self._seen: dict[str, _Stamp] = {}
        """Of files at the last look: one that changes is left until it rests."""

    async def prepare(self) -> None:
        """Make the folders, and put back what an earlier attempt has written.

        Files that are there already do not come back unless the program changes them.

        Raises:
            AwsError: If the bucket cannot be read.
        """
        for each in self._wanted:
            (self._folder / each).mkdir(parents=True, exist_ok=True)
        if not self._wanted:
            return
        self._stamps = dict(self._found())
        for output in await self._bucket.fetch(self._folder):
            self._kept[output.path] = output
            self._stamps[output.path] = _stamp(self._folder / output.path)

    async def keep(self, *, is_last: bool = False) -> None:
        """Send files that have changed since they were sent.

        Args:
            is_last: Whether the program has ended: files are sent although they have just changed.

        Raises:
            AwsError: If the bucket takes nothing.
        """
        found = dict(self._found())
        changed = False
        for path, stamp in found.items():
            rests = is_last or self._seen.get(path) == stamp
            if stamp != self._stamps.get(path) and rests:
                changed |= await self._send(path, stamp, is_last=is_last)
        self._seen = found
        for path in self._kept.keys() - found.keys():
            # The program has removed it, such as a checkpoint that is out of date.
            del self._kept[path]
            changed = True
        if changed:
            await self._bucket.put_outputs(sorted(self._kept.values(), key=lambda each: each.path))

    async def _send(self, path: str, stamp: _Stamp, *, is_last: bool) -> bool:
        file = self._folder / path
        try:
            digest = await asyncio.to_thread(file_digest, file)
            await self._bucket.upload(f"outputs/{path}", file, stamp[0], digest)
            if _stamp(file) != stamp and not is_last:
                return False  # it has changed meanwhile, and is sent again
        except OSError:
            return False  # the program has removed it
        except AwsError as exc:
            if is_last or exc.code not in ("BadDigest", "XAmzContentChecksumMismatch"):
                raise
            return False
        self._stamps[path] = stamp
        self._kept[path] = OutputFile(
            path=path, size=stamp[0], sha256=digest.hex(), mtime_ns=stamp[1]
        )
        return True

    def _found(self) -> Iterator[tuple[str, _Stamp]]:
        for each in self._wanted:
            for directory, _, names in os.walk(self._folder / each):
                for name in names:
                    file = Path(directory) / name
                    try:
                        if file.is_file():
                            yield file.relative_to(self._folder).as_posix(), _stamp(file)
                    except OSError:
                        continue  # the program has removed it


def _stamp(file: Path) -> _Stamp:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
