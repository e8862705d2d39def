"""A bucket on a fake AWS, and helpers to upload, download and list objects."""

from __future__ import annotations

import asyncio
import hashlib
import random
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.names import object_prefix
from cloudexec._objects import s3_transfer as worker
from cloudexec._objects.s3 import Bucket, SignedUpload
from cloudexec._transfer import Digests, File, digests
from cloudexec.testing import FakeAWS

T = TypeVar("T")

MIB = 1024 * 1024
PART = 5 * MIB
NAME = "some-bucket"
PREFIX = object_prefix("0f3a7c9912ab44de")


def content(size: int, seed: int = 1) -> tuple[bytes, bytes]:
    """Return bytes that compress badly, and their SHA-256."""
    data = random.Random(seed).randbytes(size)
    return data, hashlib.sha256(data).digest()


class Scene:
    """The bucket and helpers for a test that runs on an event loop."""

    def __init__(self, aws: FakeAWS, clients: AwsClients, bucket: Bucket) -> None:
        self.aws = aws
        self.clients = clients
        self.bucket = bucket

    async def put(self, name: str, data: bytes, sha256: bytes) -> None:
        """Upload from memory."""
        await self.bucket.upload(name, lambda at, n: data[at : at + n], len(data), sha256)

    async def get(self, name: str, size: int, sha256: bytes) -> bytes:
        """Download into memory."""
        found = bytearray(size)

        def sink(offset: int, data: bytes) -> None:
            found[offset : offset + len(data)] = data

        def source(offset: int, length: int) -> bytes:
            return bytes(found[offset : offset + length])

        await self.bucket.download(name, sink, source, size, sha256)
        return bytes(found)

    async def fetch(
        self, name: str, size: int, sha256: bytes, *, range_bytes: int = 8 * MIB, **settings: Any
    ) -> bytes:
        """Download as a worker does."""
        with tempfile.TemporaryFile() as file:
            download = download_into(file, size, sha256, range_bytes=range_bytes, **settings)

            async def ask(refusal: worker.UrlRefusedError | None) -> worker.Sign:
                renew = refusal is not None and refusal.early
                request = await self.bucket.download_url(name, renew=renew)
                return lambda _: request

            await worker.carry_out(download, ask)
            file.seek(0)
            return file.read()

    async def store(self, name: str, data: bytes, **settings: Any) -> Digests:
        """Upload as a worker does."""
        with file_of(data) as file:
            place, size = File(file.fileno()), len(data)
            found = digests(place.read, size, part_bytes=self.bucket.part_bytes)
            terms = worker.Settings(**{"patience": 2.0, "timeout": 5.0, **settings})
            upload = worker.Upload(place.read, size, terms, part_bytes=self.bucket.part_bytes)
            signed: SignedUpload | None = None

            async def ask(refusal: worker.UrlRefusedError | None) -> worker.Sign:
                nonlocal signed
                signed = await self.bucket.upload_urls(
                    name,
                    size,
                    found.sha256,
                    found.parts,
                    upload_id=signed.upload_id if signed else "",
                    numbers=upload.missing,
                    renew=refusal is not None and refusal.early,
                )
                return signed.requests.__getitem__

            await worker.carry_out(upload, ask)
            assert signed is not None
            await self.bucket.complete_upload(
                name, signed.upload_id, upload.etags, size, found.parts
            )
            return found

    async def keys(self) -> list[str]:
        """Return the keys of all objects in the bucket, including those of unfinished uploads."""
        objects = await self.clients.call("s3", "list_objects_v2", Bucket=NAME)
        uploads = await self.clients.call("s3", "list_multipart_uploads", Bucket=NAME)
        found = [*objects.get("Contents", ()), *uploads.get("Uploads", ())]
        return [each["Key"] for each in found]

    def count(self, operation: str) -> int:
        """Return how many calls of an operation were answered, with success or an error."""
        return sum(each.operation == operation for each in self.aws.requests)


def download_into(
    file: IO[bytes], size: int, sha256: bytes, *, range_bytes: int = 8 * MIB, **settings: Any
) -> worker.Download:
    """Return a download into a file, as a worker makes it."""
    place = File(file.fileno())
    terms = worker.Settings(**{"patience": 2.0, "timeout": 5.0, **settings})
    return worker.Download(place.write, place.read, size, sha256, terms, range_bytes=range_bytes)


async def until(probe: Callable[[], Awaitable[object]], seconds: float = 20.0) -> None:
    """Wait for something to happen in the fake AWS."""
    async with asyncio.timeout(seconds):
        while not await probe():  # noqa: ASYNC110 the change happens in threads of a server
            await asyncio.sleep(0.01)


@contextmanager
def file_of(data: bytes) -> Iterator[IO[bytes]]:
    """Yield an open file with this content."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        yield file


def play(
    aws: FakeAWS,
    scenario: Callable[[Scene], Awaitable[T]],
    *,
    create: bool = True,
    close: bool = True,
    **settings: Any,
) -> T:
    """Run a scenario with a bucket, and check that the bucket is empty afterwards."""

    async def run() -> T:
        async with AwsClients() as clients:
            if create:
                await clients.call("s3", "create_bucket", Bucket=NAME)
            settings.setdefault("part_bytes", PART)
            settings.setdefault("patience", 2.0)
            bucket = Bucket(clients, NAME, PREFIX, **settings)
            scene = Scene(aws, clients, bucket)
            result = await scenario(scene)
            if close:
                aws.faults.clear()
                await bucket.close()
                assert await scene.keys() == []
            return result

    return asyncio.run(run())
