"""Objects to and from a bucket: on an S3 that works, and on one that does not."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import gc
import hashlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from asyncio.base_subprocess import BaseSubprocessTransport
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import boto3
import pytest
from botocore.config import Config
from relay import Relay
from s3_helpers import MIB, NAME, PART, PREFIX, Scene, content, download_into, file_of, play, until

from cloudexec import AwsError, CloudexecError, ConfigError
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.policy import unknown_calls
from cloudexec._aws.template import DATA_PREFIX, template
from cloudexec._objects import s3_transfer as worker
from cloudexec._objects.options import Limits
from cloudexec._objects.s3 import Bucket
from cloudexec._objects.store import BlobStore
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._transfer import File, SignedRequest, digests, part_length, parts_of
from cloudexec.testing import FakeAWS
from cloudexec.worker import bucket as worker_bucket

pytestmark = pytest.mark.timeout(60)

Step = Callable[[Scene], Awaitable[object]]


@pytest.fixture
def aws() -> Iterator[FakeAWS]:
    with FakeAWS() as aws:
        yield aws


@pytest.fixture
def relay(aws: FakeAWS, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """Between this process and the fake AWS."""
    port = urlsplit(aws.endpoint_url).port
    assert port is not None
    with Relay(port) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
        yield relay


async def _upload(scene: Scene) -> None:
    await scene.put("object", *content(3 * PART))


async def _download(scene: Scene) -> None:
    data, sha256 = content(3 * PART)
    assert await scene.get("object", len(data), sha256) == data


async def _fetch(scene: Scene) -> None:
    data, sha256 = content(3 * PART)
    assert await scene.fetch("object", len(data), sha256, range_bytes=PART) == data


async def _store(scene: Scene) -> None:
    await scene.store("result", content(3 * PART)[0])


TRANSFERS: dict[str, tuple[Step, str]] = {
    "upload": (_upload, "UploadPart"),
    "download": (_download, "GetObject"),
    "fetch": (_fetch, "GetObject"),
    "store": (_store, "UploadPart"),
}
each_transfer = pytest.mark.parametrize("transfer", sorted(TRANSFERS))


def _zeros(offset: int, length: int) -> bytes:
    return bytes(length)


async def _prepared(scene: Scene) -> None:
    await scene.put("object", *content(3 * PART))


# What works.


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART, 40 * MIB])
def test_objects_of_every_size_go_both_ways(aws: FakeAWS, size: int) -> None:
    """An argument from client to worker, a result from worker to client."""
    data, sha256 = content(size)

    async def scenario(scene: Scene) -> None:
        await scene.put("object", data, sha256)
        assert await scene.get("object", size, sha256) == data
        assert await scene.fetch("object", size, sha256) == data
        found = await scene.store("result", data)
        assert found.sha256 == sha256
        assert await scene.get("result", size, sha256) == data
        assert sorted(await scene.keys()) == [f"{PREFIX}object", f"{PREFIX}result"]

    play(aws, scenario)
    calls = {(each.service, each.operation) for each in aws.requests}
    assert unknown_calls(calls) == {("s3", "CreateBucket")}


def test_part_of_a_file_is_moved_where_it_belongs(aws: FakeAWS) -> None:
    """Objects may lie anywhere in a file, with others around them."""
    data, sha256 = content(PART + 7)

    async def scenario(scene: Scene) -> None:
        await scene.put("object", data, sha256)
        request = await scene.bucket.download_url("object")
        with file_of(b"x" * 100) as file:
            place = File(file.fileno(), 10)
            terms = worker.Settings()
            download = worker.Download(place.write, place.read, len(data), sha256, terms)
            download.run(lambda _: request)
            os.pwrite(file.fileno(), b"tail", 10 + len(data))
            file.seek(0)
            assert file.read() == b"x" * 10 + data + b"tail"
            found = digests(place.read, len(data), part_bytes=PART)
            assert found.sha256 == sha256
            assert len(found.parts) == 2
            signed = await scene.bucket.upload_urls("copy", len(data), sha256, found.parts)
            upload = worker.Upload(place.read, len(data), terms, part_bytes=PART)
            upload.run(signed.requests.__getitem__)
            await scene.bucket.complete_upload(
                "copy", signed.upload_id, upload.etags, len(data), found.parts
            )
        assert await scene.get("copy", len(data), sha256) == data

    play(aws, scenario)


def test_many_transfers_at_a_time(aws: FakeAWS) -> None:
    """More than there are connections; none waits for ever, none disturbs another."""

    async def scenario(scene: Scene) -> None:
        async def one(number: int) -> None:
            data, sha256 = content(MIB if number % 8 else PART + 1, number)
            await scene.put(f"argument-{number}", data, sha256)
            assert await scene.fetch(f"argument-{number}", len(data), sha256) == data
            await scene.store(f"result-{number}", data)
            assert await scene.get(f"result-{number}", len(data), sha256) == data

        async with asyncio.TaskGroup() as group:
            for number in range(40):
                group.create_task(one(number))
        await scene.bucket.delete([f"argument-{number}" for number in range(40)])
        keys = await scene.keys()
        assert sorted(keys) == sorted(f"{PREFIX}result-{number}" for number in range(40))

    play(aws, scenario)


def test_objects_are_encrypted(aws: FakeAWS) -> None:
    """Whoever sends them, in one request or in parts."""

    async def scenario(scene: Scene) -> None:
        for size in (1, PART + 1):
            data, sha256 = content(size)
            await scene.put("argument", data, sha256)
            await scene.store("result", data)
            for name in ("argument", "result"):
                head = await scene.clients.call("s3", "head_object", Bucket=NAME, Key=PREFIX + name)
                assert head["ServerSideEncryption"] == "aws:kms"

    play(aws, scenario, encryption="aws:kms")


def test_signing_makes_no_call(aws: FakeAWS) -> None:
    """But the one that begins an upload in parts."""

    async def scenario(scene: Scene) -> None:
        await scene.bucket.open()
        before = len(aws.requests)
        sha256 = bytes(32)
        await scene.bucket.download_url("object")
        await scene.bucket.upload_urls("result", 5, sha256)
        assert len(aws.requests) == before
        signed = await scene.bucket.upload_urls("result", 2 * PART, sha256, [sha256] * 2)
        assert [each.operation for each in aws.requests[before:]] == ["CreateMultipartUpload"]
        again = await scene.bucket.upload_urls(
            "result", 2 * PART, sha256, [sha256] * 2, upload_id=signed.upload_id, numbers=[2]
        )
        assert list(again.requests) == [2]
        assert again.upload_id == signed.upload_id
        assert len(aws.requests) == before + 1
        await scene.bucket.abort_upload("result", signed.upload_id)
        await scene.bucket.abort_upload("result", signed.upload_id)

    play(aws, scenario)


def test_url_says_when_it_ends(aws: FakeAWS, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own time, or the credentials', whichever is first; after a week at the latest."""

    async def scenario(scene: Scene) -> list[float]:
        return [
            (await scene.bucket.download_url("object", seconds)).expires_at - time.time()
            for seconds in (60.0, 3600.0, 1e9)
        ]

    assert play(aws, scenario) == pytest.approx([60, 3600, 7 * 24 * 3600], abs=10)
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=30)
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", end.isoformat())
    assert play(aws, scenario, create=False) == pytest.approx([60, 1800, 1800], abs=10)


def test_virtual_hosts_are_served_too(aws: FakeAWS) -> None:
    """As a signed URL of the real S3 names the bucket: before the host."""
    client = boto3.Session().client(
        "s3",
        endpoint_url="https://s3.us-east-1.amazonaws.com",
        config=Config(s3={"addressing_style": "virtual"}, signature_version="s3v4"),
    )
    boto3.Session().client("s3").create_bucket(Bucket=NAME)
    boto3.Session().client("s3").put_object(Bucket=NAME, Key="a b/c", Body=b"content")
    url = client.generate_presigned_url("get_object", Params={"Bucket": NAME, "Key": "a b/c"})
    split = urlsplit(url)
    assert split.netloc == f"{NAME}.s3.us-east-1.amazonaws.com"
    connection = http.client.HTTPConnection(urlsplit(aws.endpoint_url).netloc)
    for query, status in ((split.query, 200), (split.query[:-1] + "0", 403)):
        # The last digit of the signature may be that one.
        if status == 403 and split.query.endswith("0"):
            query = split.query[:-1] + "1"
        connection.request("GET", f"{split.path}?{query}", headers={"Host": split.netloc})
        response = connection.getresponse()
        body = response.read()
        assert response.status == status, body
        assert (body == b"content") == (status == 200)
    connection.close()


def test_parts_are_as_s3_allows() -> None:
    assert [part.length for part in parts_of(2 * PART + 1, PART)] == [PART, PART, 1]
    assert [part.length for part in parts_of(0, PART)] == [0]
    huge = 5 * 1024**4
    length = part_length(huge)
    assert length % MIB == 0
    assert len(parts_of(huge)) <= 10_000
    with pytest.raises(ValueError, match="at least 5242880 bytes, not 1"):
        part_length(1, 1)


def test_worker_side_loads_no_aws_sdk() -> None:
    """And what it does load comes with the first transfer."""

    def loaded_by(module: str) -> set[str]:
        code = f"import sys, {module}; print(' '.join(sys.modules))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
        )
        return set(done.stdout.split())

    heavy = {"aiobotocore", "botocore", "boto3", "aiohttp", "grpc", "cryptography"}
    assert not heavy & loaded_by("cloudexec._objects.s3_transfer")
    assert not {"urllib3", "tenacity"} & loaded_by("cloudexec.worker.bucket")


# Where S3 fails for a while.


@each_transfer
def test_s3_asks_to_slow_down_and_then_works(aws: FakeAWS, transfer: str) -> None:
    step, operation = TRANSFERS[transfer]

    async def scenario(scene: Scene) -> None:
        await _prepared(scene)
        aws.faults.throttle(operation, count=4)
        await step(scene)
        assert sum(each.error == "SlowDown" for each in aws.requests) == 4

    play(aws, scenario, patience=20.0)


@each_transfer
def test_connections_break_in_the_middle(aws: FakeAWS, relay: Relay, transfer: str) -> None:
    """What has come by then is not fetched again."""
    step, _ = TRANSFERS[transfer]
    down = transfer in ("download", "fetch")

    async def scenario(scene: Scene) -> None:
        await _prepared(scene)
        cuts = [2 * MIB, 3 * MIB, 2 * MIB]
        (relay.cut_down if down else relay.cut_up)(*cuts)
        await step(scene)
        assert relay.cuts_left == 0

    play(aws, scenario, patience=20.0)


@pytest.mark.parametrize("transfer", ["download", "fetch"])
def test_answers_end_early(aws: FakeAWS, transfer: str) -> None:
    step, operation = TRANSFERS[transfer]

    async def scenario(scene: Scene) -> None:
        await _prepared(scene)
        aws.faults.cut_response(operation, count=3)
        await step(scene)
        ranges = [each.parameters["Range"] for each in aws.requests if each.operation == operation]
        # The three that were cut go on where they were, and not from their beginnings.
        assert len(set(ranges)) == len(ranges)

    play(aws, scenario)


@each_transfer
def test_answers_that_do_not_come_are_asked_for_again(aws: FakeAWS, transfer: str) -> None:
    """A connection that stands still costs its time limit, not the transfer."""
    step, operation = TRANSFERS[transfer]

    async def scenario(scene: Scene) -> None:
        await _prepared(scene)
        aws.faults.slow_response(operation, 50.0, count=2)
        if transfer == "fetch":
            assert await scene.fetch("object", *_known(), timeout=0.5, patience=20.0)
        elif transfer == "store":
            await scene.store("result", content(3 * PART)[0], timeout=0.5, patience=20.0)
        else:
            await step(scene)

    play(aws, scenario, stall=1.0, patience=20.0)


def _known() -> tuple[int, bytes]:
    data, sha256 = content(3 * PART)
    return len(data), sha256


@each_transfer
def test_s3_is_away_for_a_moment(aws: FakeAWS, transfer: str) -> None:
    step, _ = TRANSFERS[transfer]

    async def scenario(scene: Scene) -> None:
        await _prepared(scene)
        aws.faults.unreachable(0.5)
        await step(scene)

    play(aws, scenario, patience=20.0)


def test_answer_to_the_last_call_of_an_upload_is_lost(aws: FakeAWS) -> None:
    """The object is there, and the second try finds no upload: that is success."""

    async def scenario(scene: Scene) -> None:
        aws.faults.lose_response("CompleteMultipartUpload")
        await _prepared(scene)
        await _download(scene)

    play(aws, scenario, patience=20.0)


# Where it goes on failing.


@each_transfer
def test_s3_that_never_recovers_is_given_up_in_time(aws: FakeAWS, transfer: str) -> None:
    step, operation = TRANSFERS[transfer]

    async def scenario(scene: Scene) -> CloudexecError:
        await _prepared(scene)
        aws.faults.throttle(operation, count=1_000_000)
        began = time.monotonic()
        with pytest.raises((AwsError, worker.S3TransferError)) as caught:
            await step(scene)
        assert time.monotonic() - began < 20
        assert not isinstance(caught.value, worker.UrlRefusedError)
        if transfer == "upload":
            aws.faults.clear()
            uploads = await scene.clients.call("s3", "list_multipart_uploads", Bucket=NAME)
            assert not uploads.get("Uploads")
        return caught.value

    error = play(aws, scenario)
    assert isinstance(error, AwsError | worker.S3TransferError)
    assert error.code == "SlowDown"
    assert error.transient
    assert f"{NAME}/{PREFIX}" in str(error)
    assert "fewer" in str(error)


@each_transfer
def test_s3_that_nobody_reaches_is_given_up_in_time(
    aws: FakeAWS, relay: Relay, transfer: str
) -> None:
    step, _ = TRANSFERS[transfer]

    async def scenario(scene: Scene) -> CloudexecError:
        await _prepared(scene)
        relay.refuse()
        with pytest.raises((AwsError, worker.S3TransferError)) as caught:
            await step(scene)
        return caught.value

    error = play(aws, scenario, close=False)
    assert isinstance(error, AwsError | worker.S3TransferError)
    assert error.code == "Unreachable"
    assert error.transient
    assert "prox" in str(error)


def test_bucket_is_missing(aws: FakeAWS) -> None:
    async def scenario(scene: Scene) -> None:
        for step in (scene.bucket.open(), _upload(scene), scene.bucket.download_url("x")):
            with pytest.raises(AwsError, match=f"s3://{NAME}/.*`cloudexec up` makes one") as caught:
                await step
            assert caught.value.code == "NoSuchBucket"
            assert not caught.value.transient

    play(aws, scenario, create=False, close=False)


def test_bucket_has_vanished(aws: FakeAWS) -> None:
    async def scenario(scene: Scene) -> None:
        request = await scene.bucket.download_url("object")
        await scene.clients.call("s3", "delete_bucket", Bucket=NAME)
        with pytest.raises(AwsError, match=f"s3://{NAME}/{PREFIX}object.*NoSuchBucket"):
            await _upload(scene)
        with file_of(b"") as file:
            with pytest.raises(worker.S3TransferError, match="the bucket does not exist"):
                download_into(file, 1, bytes(32)).run(lambda _: request)

    play(aws, scenario, close=False)


def test_object_is_missing(aws: FakeAWS) -> None:
    async def scenario(scene: Scene) -> None:
        with pytest.raises(AwsError, match=f"{PREFIX}nothing.*it has been deleted") as caught:
            await scene.get("nothing", *_known())
        assert caught.value.code == "NoSuchKey"
        with pytest.raises(worker.S3TransferError, match=r"nothing.*it has been deleted") as other:
            await scene.fetch("nothing", *_known())
        assert other.value.code == "NoSuchKey"

    play(aws, scenario)


@pytest.mark.parametrize("operation", ["HeadBucket", "PutObject", "CreateMultipartUpload"])
def test_access_is_denied(aws: FakeAWS, operation: str) -> None:
    """The message says which rights are needed, and on what."""

    async def scenario(scene: Scene) -> None:
        aws.faults.deny(operation)
        size = 1 if operation == "PutObject" else PART + 1
        with pytest.raises(AwsError, match=f"s3:{operation}.*AccessDenied") as caught:
            await scene.put("object", *content(size))
        assert caught.value.code == "AccessDenied"
        assert f"s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload on {NAME}/" in str(
            caught.value
        )
        assert scene.count(operation) == 1

    play(aws, scenario)


def test_worker_is_denied(aws: FakeAWS) -> None:
    """It asks for a fresh URL a few times, and gives up then; no message holds a signature."""

    async def scenario(scene: Scene) -> None:
        await _prepared(scene)
        aws.faults.deny("GetObject")
        aws.faults.deny("PutObject")
        with pytest.raises(worker.UrlRefusedError, match="AccessDenied") as caught:
            await scene.fetch("object", *_known())
        assert caught.value.status == 403
        with pytest.raises(worker.UrlRefusedError, match="AccessDenied") as other:
            await scene.store("result", b"x")
        for error in (caught, other):
            assert f"{NAME}/{PREFIX}" in str(error.value)
            assert "X-Amz" not in str(error.value)

    play(aws, scenario)


@pytest.mark.parametrize("why", ["unreachable", "gone", "missing"])
def test_worker_stays_away_only_from_an_s3_that_it_cannot_use(
    aws: FakeAWS, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not from one in which an object is missing, or which the client does not use now."""
    monkeypatch.setattr(worker_bucket, "_PATIENCE", 0.0)
    said: list[str] = []

    async def scenario(scene: Scene) -> bool:
        signed = await scene.bucket.download_url("missing")
        if why == "gone":
            aws.faults.expire_credentials()
        elif why == "unreachable":
            aws.faults.unreachable(1000.0)

        async def locate(request: pb.LocateRequest) -> pb.Location:
            said.append(request.failed)
            if len(said) > 1:
                return pb.Location()
            request_ = pb.Signed(url=signed.url, expires_at=signed.expires_at)
            return pb.Location(request=request_, sha256=bytes(32))

        async def store(_: pb.StoreRequest) -> pb.StoreReply:
            raise AssertionError

        path = worker_bucket.BucketPath(locate, store, 1, PART)
        blob = BlobStore(Limits(MIB, 0), shared=True).new(1000)
        assert not await path.load(1, blob)
        return path.takes(1)

    assert play(aws, scenario, close=False) == (why != "unreachable")
    assert bool(said[1]) == (why != "gone")  # the client has no need to be told of the latter


# URLs that end.


@pytest.mark.parametrize("transfer", ["fetch", "store"])
def test_urls_end_with_the_credentials_that_signed_them(aws: FakeAWS, transfer: str) -> None:
    """The worker asks again; the client reads its credentials anew, and signs with those."""
    step, _ = TRANSFERS[transfer]

    async def scenario(scene: Scene) -> None:
        await _prepared(scene)
        aws.faults.expire_credentials()
        aws.faults.renew_credentials()
        await step(scene)
        assert any(each.error == "ExpiredToken" for each in aws.requests)

    play(aws, scenario)


@each_transfer
def test_client_reads_credentials_anew(aws: FakeAWS, transfer: str) -> None:
    """On its own calls it learns of it itself; also on the first of all."""
    step, _ = TRANSFERS[transfer]

    async def scenario(scene: Scene) -> None:
        if transfer not in ("fetch", "store"):
            aws.faults.expire_credentials()
            aws.faults.renew_credentials()
        await _prepared(scene)
        await step(scene)

    play(aws, scenario)


def test_a_url_is_known_to_have_expired_as_soon_as_it_has(aws: FakeAWS) -> None:
    """Its signature counts from a whole second: a refusal in the last one is no refusal."""

    async def scenario(scene: Scene) -> None:
        for _ in range(5):
            request = await scene.bucket.download_url("object", 60.0)
            signed = dict(parse_qsl(urlsplit(request.url).query))
            begins = datetime.datetime.strptime(signed["X-Amz-Date"] + "+0000", "%Y%m%dT%H%M%SZ%z")
            assert request.expires_at <= begins.timestamp() + int(signed["X-Amz-Expires"])

    play(aws, scenario)


def test_download_goes_on_with_a_fresh_url(aws: FakeAWS) -> None:
    """What came by the first URL is not fetched by the second."""
    data, sha256 = content(4 * PART)

    async def scenario(scene: Scene) -> None:
        await scene.put("object", data, sha256)
        with file_of(b"") as file:
            download = download_into(file, len(data), sha256, parallel=1, range_bytes=PART)
            request = await scene.bucket.download_url("object", 1.0)
            aws.clear_requests()
            aws.faults.cut_response("GetObject", count=1)
            # So that the rest is asked for when the URL has expired.
            aws.faults.slow_response("GetObject", 0.0, count=2)
            aws.faults.slow_response("GetObject", 2.5, count=1)
            with pytest.raises(worker.UrlRefusedError, match="has expired"):
                await asyncio.to_thread(download.run, lambda _: request)
            assert time.time() > request.expires_at
            assert PART / 2 <= len(data) - download.left < len(data)
            before = scene.count("GetObject")
            fresh = await scene.bucket.download_url("object")
            await asyncio.to_thread(download.run, lambda _: fresh)
            assert scene.count("GetObject") > before
            file.seek(0)
            assert file.read() == data
        starts = [
            int(each.parameters["Range"][6:].split("-")[0])
            for each in aws.requests
            if each.operation == "GetObject" and each.status == 206
        ]
        assert len(set(starts)) == len(starts)

    play(aws, scenario)


# Content that is not what it should be.


def test_wrong_content_is_found(aws: FakeAWS) -> None:
    async def scenario(scene: Scene) -> None:
        await _prepared(scene)
        aws.faults.corrupt_response("GetObject")
        with pytest.raises(AwsError, match=f"{PREFIX}object.*not what was sent") as caught:
            await _download(scene)
        assert caught.value.code == "BadDigest"
        aws.faults.corrupt_response("GetObject")
        with pytest.raises(worker.S3DigestError, match="not what was sent"):
            await _fetch(scene)
        size, sha256 = _known()
        for wrong in (size - 1, size + 1, 1):
            with pytest.raises(worker.S3DigestError, match=f"{size} bytes, not {wrong}"):
                await scene.fetch("object", wrong, sha256)
            with pytest.raises(AwsError, match=f"{size} bytes, not {wrong}"):
                await scene.get("object", wrong, sha256)

    play(aws, scenario)


def test_what_changes_while_it_is_sent_is_refused(aws: FakeAWS) -> None:
    """A URL takes the content that it was signed for, and no other."""

    async def scenario(scene: Scene) -> None:
        with pytest.raises(AwsError, match="while it was sent") as caught:
            await scene.put("object", b"content", hashlib.sha256(b"other").digest())
        assert caught.value.code == "BadDigest"
        signed = await scene.bucket.upload_urls("result", 5, hashlib.sha256(b"right").digest())
        with file_of(b"wrong") as file:
            upload = worker.Upload(File(file.fileno()).read, 5, worker.Settings())
            with pytest.raises(worker.S3DigestError, match="not what was announced"):
                upload.run(signed.requests.__getitem__)
        assert await scene.keys() == []

    play(aws, scenario)


def test_source_that_fails_fails_the_upload_as_itself(aws: FakeAWS) -> None:
    """At once: asking again would not help."""

    def source(offset: int, length: int) -> bytes:
        if offset > PART:
            raise OSError(errno.EIO, "the disk is broken")
        return bytes(length)

    def source_once(offset: int, length: int) -> bytes:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.EIO, "the disk is broken")
        return bytes(length)

    async def scenario(scene: Scene) -> None:
        with pytest.raises(OSError, match="the disk is broken"):
            await scene.bucket.upload("object", source, 3 * PART, bytes(32))
        digest = hashlib.sha256(bytes(1000)).digest()
        with pytest.raises(OSError, match="the disk is broken"):
            await scene.bucket.upload("object", source_once, 1000, digest)

    play(aws, scenario)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a Linux device")
def test_full_disk_fails_a_download_as_itself(aws: FakeAWS) -> None:
    async def scenario(scene: Scene) -> None:
        await _prepared(scene)
        size, sha256 = _known()
        request = await scene.bucket.download_url("object")
        with open("/dev/full", "r+b", buffering=0) as file:  # noqa: ASYNC230 a device
            download = download_into(file, size, sha256)
            with pytest.raises(OSError, match="No space left") as caught:
                await asyncio.to_thread(download.run, lambda _: request)
            assert caught.value.errno == errno.ENOSPC

        def sink(offset: int, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            await scene.bucket.download("object", sink, _zeros, size, sha256)

    play(aws, scenario)


# Ends.


def test_cancelled_upload_leaves_nothing(aws: FakeAWS) -> None:
    async def scenario(scene: Scene) -> None:
        aws.faults.slow_response("UploadPart", 50.0)
        task = asyncio.create_task(_upload(scene))
        await until(scene.keys)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert scene.count("AbortMultipartUpload") == 1
        assert await scene.keys() == []

    play(aws, scenario)


def test_cancelled_download_writes_nothing_afterwards(aws: FakeAWS) -> None:
    """The sink's memory may be somebody else's then."""
    size, sha256 = _known()
    begun, go_on = threading.Event(), threading.Event()
    ended = []

    def sink(offset: int, data: bytes) -> None:
        begun.set()
        go_on.wait(20)
        ended.append(offset)

    async def scenario(scene: Scene) -> None:
        await _prepared(scene)
        task = asyncio.create_task(scene.bucket.download("object", sink, _zeros, size, sha256))
        await asyncio.to_thread(begun.wait, 20)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        count = len(ended)
        assert count > 0
        await scene.keys()
        assert len(ended) == count

    play(aws, scenario)


@pytest.mark.parametrize("transfer", ["fetch", "store"])
@pytest.mark.alone
def test_cancelled_worker_stops_at_once(aws: FakeAWS, transfer: str) -> None:
    """Though its requests stand still; nothing is written afterwards."""
    step, operation = TRANSFERS[transfer]

    async def scenario(scene: Scene) -> None:
        await _prepared(scene)
        aws.clear_requests()
        aws.faults.slow_response(operation, 50.0, count=2)
        threads = set(threading.enumerate())
        task = asyncio.ensure_future(step(scene))
        # One that is not slow has been answered.

        async def answered() -> bool:
            return scene.count(operation) > 0

        await until(answered)
        task.cancel()
        began = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - began < 5

        async def ended() -> bool:
            new = set(threading.enumerate()) - threads
            return not any("cloudexec-s3" in each.name for each in new)

        await until(ended)

    play(aws, scenario)


@pytest.mark.parametrize("transfer", ["upload", "download"])
def test_cancelled_client_does_not_wait_for_a_signature(
    aws: FakeAWS, transfer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Credentials may take long to come: here from a program that is still thinking."""
    pid, config = tmp_path / "pid", tmp_path / "config"
    data, sha256 = content(2 * MIB)

    async def scenario(scene: Scene) -> None:
        await scene.put("object", data, sha256)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        config.write_text(
            f"[default]\ncredential_process = sh -c 'echo $$ > {pid}; exec sleep 20'\n"
        )
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        scene.clients.renew()
        steps = {
            "upload": lambda: scene.put("other", data, sha256),
            "download": lambda: scene.get("object", len(data), sha256),
        }
        task: asyncio.Task[Any] = asyncio.create_task(steps[transfer]())

        async def thinks() -> bool:
            return pid.exists() and pid.read_text().endswith("\n")

        await until(thinks)
        task.cancel()
        since = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - since < 5
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)
        # The AWS SDK leaves the program's pipes open when it is cancelled.
        for each in gc.get_objects():
            if isinstance(each, BaseSubprocessTransport):
                each.close()

    play(aws, scenario, close=False)


def test_closing_deletes_what_is_ours_and_nothing_else(aws: FakeAWS) -> None:
    """Objects by the thousand, and uploads that nobody ends."""

    async def scenario(scene: Scene) -> None:
        for key in ("cloudexec/another/object", "data/object", PREFIX.rstrip("/") + "x/object"):
            await scene.clients.call("s3", "put_object", Bucket=NAME, Key=key, Body=b"x")
        await scene.put("object", *content(1))
        for number in range(1005):
            await scene.clients.call(
                "s3", "put_object", Bucket=NAME, Key=f"{PREFIX}{number}", Body=b""
            )
        await scene.bucket.upload_urls("result", 2 * PART, bytes(32), [bytes(32)] * 2)
        await scene.bucket.close()
        await scene.bucket.close()
        assert sorted(await scene.keys()) == sorted(
            ("cloudexec/another/object", "data/object", PREFIX.rstrip("/") + "x/object")
        )
        assert scene.count("DeleteObjects") == 2
        with pytest.raises(AwsError, match="is closed"):
            await scene.put("object", *content(1))

    play(aws, scenario, close=False)


def test_closing_what_was_not_used_makes_no_call(aws: FakeAWS) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.bucket.download_url("object")
        before = len(aws.requests)
        await scene.bucket.close()
        assert len(aws.requests) == before

    play(aws, scenario, close=False)


def test_closing_says_what_it_cannot_delete(aws: FakeAWS) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.put("object", *content(1))
        aws.faults.deny("DeleteObjects")
        with pytest.raises(AwsError, match=f"left at s3://{NAME}/{PREFIX}.*lifecycle") as caught:
            await scene.bucket.close()
        assert caught.value.code == "AccessDenied"

    play(aws, scenario, close=False)


@pytest.mark.alone
def test_closing_takes_no_longer_than_it_may(aws: FakeAWS) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.put("object", *content(1))
        aws.faults.slow_response("ListMultipartUploads", 50.0)
        began = time.monotonic()
        with pytest.raises(AwsError, match=r"could be deleted in 0\.5 s.*lifecycle"):
            await scene.bucket.close(0.5)
        assert time.monotonic() - began < 5
        aws.faults.clear()

    play(aws, scenario, close=False)


# Set-up.


def test_prefix_is_apart_from_that_of_tasks_and_under_the_lifecycle_rule() -> None:
    """A task's own rights must not reach what executors send to each other."""
    assert not PREFIX.startswith(DATA_PREFIX)
    rules = template()["Resources"]["Bucket"]["Properties"]["LifecycleConfiguration"]["Rules"]
    assert any(PREFIX.startswith(rule.get("Prefix", "")) for rule in rules)


def test_settings_are_checked() -> None:
    async def scenario() -> None:
        async with AwsClients("us-east-1") as clients:
            for prefix in ("", "cloudexec", "/cloudexec/"):
                with pytest.raises(ConfigError, match="prefix"):
                    Bucket(clients, NAME, prefix)
            with pytest.raises(ConfigError, match="part_bytes"):
                Bucket(clients, NAME, PREFIX, part_bytes=1)
            with pytest.raises(ConfigError, match="parallel"):
                Bucket(clients, NAME, PREFIX, parallel=0)

    asyncio.run(scenario())


# TLS and proxies.


@pytest.fixture
def authority(tmp_path: Path) -> tuple[ssl.SSLContext, str]:
    """A server's certificate for ``s3.test``, and the file that makes it known."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "s3.test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("s3.test"), x509.DNSName("*.s3.test")]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    known = tmp_path / "known.pem"
    known.write_bytes(pem)
    both = tmp_path / "server.pem"
    both.write_bytes(
        pem
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    return context, str(known)


def test_worker_goes_through_a_proxy_and_checks_who_answers(
    aws: FakeAWS, authority: tuple[ssl.SSLContext, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tunnel of ``https_proxy`` leads to a server with a certificate of its own."""
    context, known = authority
    data, sha256 = content(3 * PART)

    async def signed(scene: Scene) -> SignedRequest:
        await scene.put("object", data, sha256)
        client = boto3.Session().client(
            "s3", endpoint_url="https://s3.test", config=Config(signature_version="s3v4")
        )
        url = client.generate_presigned_url(
            "get_object", Params={"Bucket": NAME, "Key": f"{PREFIX}object"}
        )
        return SignedRequest(url, (), time.time() + 3600)

    request = play(aws, signed, close=False)
    port = urlsplit(aws.endpoint_url).port
    assert port is not None
    with Relay(port, tls=context, tunnel=True) as relay:
        monkeypatch.setenv("https_proxy", f"http://user:secret@127.0.0.1:{relay.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        with file_of(b"") as file:
            download = download_into(file, len(data), sha256)
            with pytest.raises(worker.S3TransferError, match="AWS_CA_BUNDLE") as caught:
                download.run(lambda _: request)
            assert caught.value.code == "Untrusted"
            monkeypatch.setenv("AWS_CA_BUNDLE", known)
            download = download_into(file, len(data), sha256)
            download.run(lambda _: request)
            file.seek(0)
            assert file.read() == data
        assert {each.split()[1] for each in relay.connects} == {"s3.test:443"}


async def _identity() -> str:
    async with AwsClients("us-east-1") as clients:
        return str((await clients.call("sts", "get_caller_identity"))["Account"])


def test_calls_to_aws_go_through_an_http_proxy_and_know_a_certificate_of_its_own(
    aws: FakeAWS, authority: tuple[ssl.SSLContext, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, known = authority
    port = urlsplit(aws.endpoint_url).port
    assert port is not None
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.test")
    monkeypatch.setenv("AWS_CA_BUNDLE", known)
    with Relay(port, tls=context, tunnel=True) as relay:
        monkeypatch.setenv("https_proxy", f"http://user:secret@127.0.0.1:{relay.port}")
        assert asyncio.run(_identity()) == "123456789012"
        assert {each.split()[1] for each in relay.connects} == {"s3.test:443"}


def test_client_moves_objects_through_the_same_proxy_with_the_same_certificates(
    aws: FakeAWS,
    authority: tuple[ssl.SSLContext, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Those that the AWS SDK is configured to trust, wherever that is said."""
    context, known = authority
    config = tmp_path / "config"
    config.write_text(f"[default]\nca_bundle = {known}\n")
    data, sha256 = content(PART + 1)
    port = urlsplit(aws.endpoint_url).port
    assert port is not None
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.test")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)

    async def scenario(scene: Scene) -> None:
        await scene.put("object", data, sha256)
        assert await scene.get("object", len(data), sha256) == data

    with Relay(port, tls=context, tunnel=True) as relay:
        monkeypatch.setenv("https_proxy", f"http://user:secret@127.0.0.1:{relay.port}")
        play(aws, scenario)
        assert relay.passed["up"] > len(data)
        assert relay.passed["down"] > len(data)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"https_proxy": "socks5h://127.0.0.1:9"}, "the AWS SDK takes HTTP proxies only"),
        ({"all_proxy": "socks5h://127.0.0.1:9"}, "the AWS SDK does not use ALL_PROXY"),
        ({"https_proxy": "http://me:s3c@127.0.0.1:99999"}, "HTTPS_PROXY cannot be read: .* 65535"),
        (
            {"https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"},
            "connect to the endpoint URL: .*check the network, proxies and the region",
        ),
    ],
)
def test_where_aws_cannot_be_reached_proxies_that_its_sdk_does_not_use_are_named(
    aws: FakeAWS, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name in ("https_proxy", "all_proxy", "no_proxy", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{port}")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("cloudexec._aws.clients._ATTEMPTS", 1)
    with pytest.raises(AwsError, match=said) as caught:
        asyncio.run(_identity())
    assert "s3c" not in str(caught.value)
