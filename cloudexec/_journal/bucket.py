"""A journal in an S3 bucket, made of objects that are never changed.

    <prefix>/journal                    the format's name and version
    <prefix>/lease                      the program that uses the journal, which renews this object
    <prefix>/segments/<time>-<size>-<SHA-256>   the results of about a second, one after the other
    <prefix>/results/<key>-<SHA-256>    the blobs (large pieces) of one large result
    <prefix>/programs/<SHA-256>         the modules and versions of a program that recorded results

A program receives its results before they are written to S3. Waiting for S3 would delay each result
by a round trip; a crash loses at most the results of the last second or two. The journal keeps no
executor state, because that state includes secrets, which do not belong into a bucket.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from cloudexec._aws.clients import AwsClients
from cloudexec._errors import AwsError, CloudexecError, JournalError, JournalVersionError
from cloudexec._journal.lock import locked_error, owner, whoami
from cloudexec._journal.packing import check_of, pack, unpack
from cloudexec._journal.store import Found, Record
from cloudexec._log import Log
from cloudexec._objects.s3 import Bucket
from cloudexec._transfer import File

if TYPE_CHECKING:
    from cloudexec._server.portal import Portal

__all__ = ["BucketStore"]

T = TypeVar("T")

_logger = Log()
VERSION = 1
_MARK = "cloudexec-journal"
# Key, version, seconds, kind, bytes of the value, bytes of the object, length of the name, check.
_ENTRY = struct.Struct("<20s32sdBQQH8s")
_PICKLE, _COMPOSED, _OBJECT = range(3)
_INLINE = 1024 * 1024
"""Bytes: if a result's blobs are larger than this together, they become an object of their own."""
_PROGRAM = re.compile(r"programs/([0-9a-f]{64})")
_SEGMENT = re.compile(r"segments/\d{20}-(\d+)-([0-9a-f]{64})")
_PATIENCE = 30.0
_RENEWAL = 5.0
"""Seconds between two renewals of a lease."""
_LEASE = 20.0
"""Seconds after which a lease that is not renewed can be taken by another program."""
_LONG_AGO = 600.0
"""Seconds: a lease that S3 says is older than this is taken at once. The value is far above the
difference that the clocks of two machines have."""
_MANY_SEGMENTS = 64
_PROGRAMS_READ = 16
"""Number of the latest programs that are read. The message about changes compares with these."""
_MOST_MERGED = 256 * 1024 * 1024
_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict")


class BucketStore:
    """Implements ``store.Store`` with S3; ``open`` makes one.

    Args:
        bucket: The bucket's name.
        prefix: The prefix of all keys, with a slash at its end.
        portal: Runs coroutines on the executor's event loop.
    """

    holds_back = False
    keeps_state = False
    interval = 1.0

    def __init__(self, bucket: str, prefix: str, portal: Portal) -> None:
        self.name = f"s3://{bucket}/{prefix.rstrip('/')}"
        self.earlier = 0
        self.versions: dict[str, dict[bytes, int]] = {}
        self.programs: dict[bytes, bytes] = {}
        self._portal = portal
        self._clients = AwsClients()
        self._bucket_name, self._prefix = bucket, prefix
        self._bucket = Bucket(self._clients, bucket, prefix, patience=_PATIENCE)
        self._id = secrets.token_hex(8)
        self._etag = ""
        self._is_lost = False
        self._has_written = False
        self._renewing: asyncio.Task[None] | None = None
        # By key: the offset of the value in the local file, and the packed entry.
        self._index: dict[bytes, tuple[int, bytes]] = {}
        self._objects: dict[str, int] = {}  # bytes of each object under results/
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 close() closes it

    @classmethod
    def open(cls, bucket: str, prefix: str, portal: Portal) -> BucketStore:
        """Open a journal, or make an empty one.

        Raises:
            JournalLockedError: If another program uses it.
            JournalVersionError: If a newer version of cloudexec wrote it.
            JournalError: If the prefix holds other objects, and no journal.
            AwsError: If the bucket cannot be used.
        """
        store = cls(bucket, prefix, portal)
        try:
            portal.run(store._open()).result()
        except BaseException:
            portal.run(store._let_go()).result()
            raise
        return store

    async def _call(self, operation: str, name: str = "", **parameters: Any) -> Any:
        if name:
            parameters["Key"] = self._prefix + name
        return await self._clients.call("s3", operation, Bucket=self._bucket_name, **parameters)

    async def _read(self, name: str) -> tuple[bytes, Any] | None:
        try:
            answer = await self._call("get_object", name)
        except AwsError as exc:
            if exc.code == "NoSuchKey":
                return None
            raise
        async with answer["Body"] as body:
            return await body.read(), answer

    async def _open(self) -> None:
        await self._bucket.open()
        was_there = await self._check_mark()
        await self._take_lease()
        if was_there:
            await self._put_mark()
        self._renewing = asyncio.get_running_loop().create_task(self._renew())
        segments: list[tuple[str, int, str]] = []
        programs: list[tuple[Any, str]] = []
        async for each in self._clients.pages(
            "s3", "list_objects_v2", "Contents", Bucket=self._bucket_name, Prefix=self._prefix
        ):
            name = each["Key"].removeprefix(self._prefix)
            found = _SEGMENT.fullmatch(name)
            if found is not None:
                segments.append((name, int(found[1]), found[2]))
            elif name.startswith("results/"):
                self._objects[name.removeprefix("results/")] = each["Size"]
            elif _PROGRAM.fullmatch(name):
                programs.append((each["LastModified"], name))
        for _, name in sorted(programs)[-_PROGRAMS_READ:]:
            if (read := await self._read(name)) is not None:
                self.programs[bytes.fromhex(name.removeprefix("programs/"))] = read[0]
        await self._load(sorted(segments))
        self.earlier = len(self._index)

    async def _check_mark(self) -> bool:
        """Check that this is a journal, and say whether it was one before.

        Raises:
            JournalVersionError: If a newer version of cloudexec wrote it.
            JournalError: If there are other objects.
        """
        found = await self._read("journal")
        if found is None:
            # A rule of the bucket may have deleted the mark, and not yet what was written after it.
            found = await self._read("lease")
        if found is None:
            listed = await self._call("list_objects_v2", Prefix=self._prefix, MaxKeys=1)
            if listed.get("KeyCount"):
                raise JournalError(
                    f"{self.name} has other objects in it and is not a journal of cloudexec: give "
                    f"another prefix"
                )
            await self._put_mark()
            return False
        try:
            mark = json.loads(found[0])
            is_ours, version = mark["format"] == _MARK, int(mark["version"])
        except (ValueError, KeyError, TypeError):
            is_ours, version = False, 0
        if not is_ours:
            raise JournalError(f"{self.name} is not a journal of cloudexec: give another prefix")
        if version > VERSION:
            raise JournalVersionError(
                f"the journal {self.name} has version {version}, and this cloudexec knows versions "
                f"up to {VERSION}: use the newer cloudexec that wrote it, or begin another journal",
                version=version,
            )
        return True

    async def _put_mark(self) -> None:
        """Write what says that this is a journal; anew, it outlives all that was written before."""
        mark = json.dumps({"format": _MARK, "version": VERSION}).encode()
        await self._call("put_object", "journal", Body=mark)

    # The lease.

    async def _put_lease(self, **condition: str) -> bool:
        """Write the lease under a condition on its current content; say whether we hold it now."""
        whose = {**json.loads(whoami()), "id": self._id, "at": time.time()}
        body = json.dumps({**whose, "format": _MARK, "version": VERSION}).encode()
        try:
            answer = await self._call("put_object", "lease", Body=body, **condition)
        except AwsError as exc:
            if exc.code not in _TAKEN:
                raise
            found = await self._read("lease")
            # S3 may have carried out our request, and its answer was lost: the repeated request
            # then fails although the lease is ours.
            if found is None or self._id.encode() not in found[0]:
                return False
            answer = found[1]
        self._etag = answer["ETag"]
        return True

    async def _take_lease(self) -> None:
        """Take the lease; if another program holds it, wait whether that program still renews it.

        A program that is alive renews its lease, which changes the object's ETag. Watching the ETag
        needs no comparison of two machines' clocks.

        Raises:
            JournalLockedError: If the other program renews the lease.
        """
        if await self._put_lease(IfNoneMatch="*"):
            return
        seen, since = "", time.monotonic()
        while True:
            found = await self._read("lease")
            if found is None:
                if await self._put_lease(IfNoneMatch="*"):
                    return
                continue
            data, answer = found
            etag = str(answer["ETag"])
            pid, host = owner(data)
            if seen and etag != seen:
                raise locked_error(self.name, pid, host)
            age = time.time() - answer["LastModified"].timestamp()
            waited = time.monotonic() - since
            if _is_dead(pid, host) or waited > _LEASE or age > _LONG_AGO:
                if await self._put_lease(IfMatch=etag):
                    return
                raise locked_error(self.name, pid, host)
            if not seen:
                seen = etag
                _logger.info(
                    "journal %s: process %s on %s had it and may have died: waiting up to %.0f s",
                    self.name,
                    pid,
                    host,
                    _LEASE,
                )
            await asyncio.sleep(_RENEWAL / 5)

    async def _renew(self) -> None:
        while not self._is_lost:
            await asyncio.sleep(_RENEWAL)
            try:
                self._is_lost = not await self._put_lease(IfMatch=self._etag)
            except CloudexecError as exc:
                _logger.debug("the lease of journal %s: %s", self.name, exc)

    # Results of earlier runs.

    async def _load(self, segments: list[tuple[str, int, str]]) -> None:
        limit = asyncio.Semaphore(8)
        start = self._file.seek(0, os.SEEK_END)
        places: list[tuple[int, int]] = []
        at = start
        for _, size, _ in segments:
            places.append((at, size))
            at += size
        whole = [True] * len(segments)

        async def load(number: int) -> None:
            name, size, digest = segments[number]
            place = File(self._file.fileno(), places[number][0])
            async with limit:
                try:
                    await self._bucket.download(
                        name, place.write, place.read, size, bytes.fromhex(digest)
                    )
                except AwsError as exc:
                    whole[number] = False
                    _logger.warning(
                        "a part of the journal %s cannot be read, its results are run again: %s",
                        self.name,
                        exc,
                    )

        await asyncio.gather(*map(load, range(len(segments))))
        for (place, size), is_whole in zip(places, whole, strict=True):
            if is_whole:
                self._add_entries(place, size)
        if len(segments) > _MANY_SEGMENTS and all(whole) and at - start <= _MOST_MERGED:
            await self._put_segment(os.pread(self._file.fileno(), at - start, start))
            await self._bucket.delete([name for name, _, _ in segments])

    def _add_entries(self, at: int, size: int) -> None:
        fd, end = self._file.fileno(), at + size
        while at + _ENTRY.size <= end:
            entry = os.pread(fd, _ENTRY.size, at)
            key, version, _, _, length, _, name_length, _ = _ENTRY.unpack(entry)
            at += _ENTRY.size
            name = os.pread(fd, name_length, at).decode()
            at += name_length
            if key not in self._index:
                counts = self.versions.setdefault(name, {})
                counts[version] = counts.get(version, 0) + 1
            self._index[key] = (at, entry)
            at += length

    def find(self, key: bytes) -> Found | None:
        known = self._index.get(key)
        if known is None:
            return None
        at, entry = known
        _, _, seconds, kind, length, object_size, _, check = _ENTRY.unpack(entry)
        value = os.pread(self._file.fileno(), length, at)
        if check_of(key, (value,)) != check:
            return None
        if kind == _PICKLE:
            return Found(seconds, value)
        if kind == _COMPOSED:
            return Found(seconds, unpack(length, _reader_of(value)))
        sha256, table = value[:32], value[32:]
        name = _object_name(key, sha256)
        if self._objects.get(name) != object_size:
            _logger.warning("journal %s: results/%s is gone: it is run again", self.name, name)
            return None
        reader = self._reader_of_object(name, table, object_size, sha256)
        return Found(seconds, unpack(len(table) + object_size, reader))

    def _reader_of_object(
        self, name: str, table: bytes, size: int, sha256: bytes
    ) -> Callable[[int, memoryview], None]:
        """Return a function that reads a large result; its blobs are downloaded when needed."""
        content: bytearray | None = None

        def read(offset: int, target: memoryview) -> None:
            nonlocal content
            if offset < len(table):
                target[:] = table[offset : offset + len(target)]
                return
            if content is None:
                content = self._download(name, size, sha256)
            offset -= len(table)
            target[:] = memoryview(content)[offset : offset + len(target)]
            if offset + len(target) == size:
                content = None

        return read

    def _download(self, name: str, size: int, sha256: bytes) -> bytearray:
        content = bytearray(size)

        def sink(offset: int, data: bytes) -> None:
            content[offset : offset + len(data)] = data

        def source(offset: int, length: int) -> memoryview:
            return memoryview(content)[offset : offset + length]

        async def download() -> None:
            # A client of its own, as the executor and this store may be closed by now.
            async with AwsClients() as clients:
                bucket = Bucket(clients, self._bucket_name, self._prefix, patience=_PATIENCE)
                await bucket.download(f"results/{name}", sink, source, size, sha256)

        # On a thread of its own, as the caller's thread may run an event loop of the user's.
        done: Future[None] = Future()
        thread = threading.Thread(target=_run_in, args=(done, download), daemon=True)
        thread.start()
        try:
            done.result()
        except CloudexecError as exc:
            raise JournalError(
                f"a result in the journal {self.name} cannot be read: {exc}"
            ) from exc
        return content

    # Results of this run.

    def write(self, records: Sequence[Record]) -> None:
        self._run(self._write(records))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._portal.run(work).result()
        except (CloudexecError, OSError) as exc:
            if isinstance(exc, JournalError):
                raise
            raise JournalError(f"the journal {self.name} cannot be written: {exc}") from exc

    async def _write(self, records: Sequence[Record]) -> None:
        if self._is_lost:
            raise JournalError(
                f"the journal {self.name} was taken over by another program, as this one had not "
                f"renewed its lease for {_LEASE:.0f} s"
            )
        segment: list[bytes] = []
        for record in records:
            pieces = pack(record.payload)
            kind, size = (_PICKLE if len(pieces) == 1 else _COMPOSED), 0
            value = pieces[0]
            blobs = [memoryview(piece).cast("B") for piece in pieces[1:]]
            if sum(map(len, blobs)) > _INLINE:
                kind, size = _OBJECT, sum(map(len, blobs))
                value = await self._put_object(record.key, blobs, size) + value
            elif blobs:
                value = b"".join((value, *blobs))
            name = record.name.encode("utf-8", "replace")[:1000]
            check = check_of(record.key, (value,))
            segment.append(
                _ENTRY.pack(
                    record.key,
                    record.function,
                    record.seconds,
                    kind,
                    len(value),
                    size,
                    len(name),
                    check,
                )
            )
            segment += (name, value)
        await self._put_segment(b"".join(segment))

    async def _put_segment(self, data: bytes) -> None:
        sha256 = await asyncio.to_thread(lambda: hashlib.sha256(data).digest())
        name = f"segments/{time.time_ns():020d}-{len(data)}-{sha256.hex()}"
        await self._bucket.upload(name, lambda at, n: data[at : at + n], len(data), sha256)
        self._has_written = True

    async def _put_object(self, key: bytes, blobs: list[memoryview], size: int) -> bytes:
        """Upload blobs as one object, and return the SHA-256 of its content."""

        def digest() -> bytes:
            found = hashlib.sha256()
            for blob in blobs:
                found.update(blob)
            return found.digest()

        def source(at: int, length: int) -> bytes:
            parts: list[memoryview] = []
            for blob in blobs:
                if at < len(blob) and length:
                    part = blob[at : at + length]
                    parts.append(part)
                    length -= len(part)
                at = max(0, at - len(blob))
            return b"".join(parts)

        sha256 = await asyncio.to_thread(digest)
        await self._bucket.upload(f"results/{_object_name(key, sha256)}", source, size, sha256)
        return sha256

    def sync(self) -> None:
        """Do nothing: S3 has stored durably whatever ``write`` has returned for."""

    def get_state(self, name: str) -> bytes | None:
        return None

    def put_state(self, name: str, value: bytes | None) -> None:
        raise JournalError(f"the journal {self.name} keeps no state: only one in a file does")

    def put_program(self, digest: bytes, value: bytes) -> None:
        self._run(self._call("put_object", f"programs/{digest.hex()}", Body=value))

    def close(self) -> None:
        try:
            self._run(self._let_go())
        finally:
            self._index.clear()

    async def _let_go(self) -> None:
        try:
            if self._renewing is not None:
                self._renewing.cancel()
                await asyncio.gather(self._renewing, return_exceptions=True)
            if self._etag and not self._is_lost:
                if self._has_written:
                    with contextlib.suppress(CloudexecError):  # there is one, of an earlier time
                        await self._put_mark()
                await self._call("delete_object", "lease")
        finally:
            self._file.close()
            await self._clients.close()


def _object_name(key: bytes, sha256: bytes) -> str:
    return f"{key.hex()}-{sha256.hex()[:32]}"


def _is_dead(pid: int | None, host: str) -> bool:
    """Say whether a process is known to have ended, which can be known on this machine only."""
    if pid is None or host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _run_in(done: Future[None], work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        done.set_result(asyncio.run(work()))
    except BaseException as exc:
        done.set_exception(exc)


def _reader_of(value: bytes) -> Callable[[int, memoryview], None]:
    def read(offset: int, target: memoryview) -> None:
        target[:] = value[offset : offset + len(target)]

    return read
