"""Journals in a bucket, against an emulated S3."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from journal_tasks import calls, large, square, total

from cloudexec import (
    BatchExecutor,
    ConfigError,
    JournalError,
    JournalLockedError,
    JournalVersionError,
)
from cloudexec._aws.clients import AwsClients
from cloudexec._journal import bucket
from cloudexec.testing import FakeAWS

Program = Callable[..., "subprocess.Popen[str]"]

WHERE = "s3://results/a/run"


def s3(operation: str, **parameters: Any) -> Any:
    """Make one call to S3."""

    async def call() -> Any:
        async with AwsClients() as clients:
            return await clients.call("s3", operation, Bucket="results", **parameters)

    return asyncio.run(call())


def names() -> list[str]:
    """Return what is in the bucket, without what differs from run to run."""
    found = s3("list_objects_v2").get("Contents", ())
    return [each["Key"].removeprefix("a/run/").partition("/")[0] for each in found]


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAWS]:
    """An account with a bucket, and leases that do not take a test's patience."""
    monkeypatch.setattr(bucket, "_RENEWAL", 0.2)
    monkeypatch.setattr(bucket, "_LEASE", 1.0)
    monkeypatch.setattr(bucket.BucketStore, "interval", 0.05)
    with FakeAWS(calls_per_second=1000.0) as aws:
        s3("create_bucket")
        yield aws


def executor() -> BatchExecutor:
    return BatchExecutor(1, journal=WHERE, output="off")


@pytest.mark.timeout(60)
def test_results_are_found_again_in_a_bucket(aws: FakeAWS, ran: str) -> None:
    """Small and large ones, and as arguments; the lease is given back."""
    made = []
    for resumed in (0, 7):
        with executor() as each:
            assert list(each.map(square, [ran] * 3, range(3))) == [0, 1, 4]
            sizes = (100_000, 2_000_000)
            futures = [each.submit(large, ran, size) for size in sizes]
            counts = [each.submit(total, ran, future) for future in futures]
            again = [each.submit(len, future) for future in futures]
            assert [future.result() for future in (*counts, *again)] == [*sizes, *sizes]
            made.append([future.result() for future in futures])
            assert each.stats().tasks.resumed in (resumed, resumed + 2)
        assert "lease" not in names()
        assert names().count("results") == 1
    assert made[0] == made[1]
    assert calls(ran) == {"0": 1, "1": 1, "2": 1, "100000": 1, "2000000": 1, "total": 2}
    s3("delete_object", Key=next(key for key in keys() if "/results/" in key))
    with executor() as each:
        assert len(each.submit(large, ran, 2_000_000).result()) == 2_000_000
    assert calls(ran)["2000000"] == 2


def keys() -> list[str]:
    return [each["Key"] for each in s3("list_objects_v2")["Contents"]]


@pytest.mark.timeout(60)
def test_bucket_that_fails_for_a_while_loses_nothing(
    aws: FakeAWS, ran: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests that S3 refuses are made again; results are there at once all the same."""
    with executor() as first:
        aws.faults.throttle("PutObject", count=6)
        assert list(first.map(square, [ran] * 5, range(5))) == [x * x for x in range(5)]
    assert caplog.messages == []
    with executor() as second:
        assert list(second.map(square, [ran] * 5, range(5))) == [x * x for x in range(5)]
        assert second.stats().tasks.resumed == 5


@pytest.mark.timeout(60)
def test_bucket_that_refuses_for_good_stops_no_program(
    aws: FakeAWS, ran: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, once, that nothing is recorded."""
    with executor() as each:
        aws.faults.deny("PutObject")
        assert list(each.map(square, [ran] * 5, range(5))) == [x * x for x in range(5)]
        assert each.submit(square, ran, 9).result() == 81
    said = [text for text in caplog.messages if "will be run again after a crash" in text]
    assert len(said) == 1
    assert "AccessDenied" in said[0]


SCRIPT = """
import sys, time
from cloudexec import BatchExecutor
from journal_tasks import square

if __name__ == "__main__":
    with BatchExecutor(1, journal=sys.argv[1]) as executor:
        print(executor.submit(square, sys.argv[2], 3).result(), flush=True)
        time.sleep(60 * (executor.stats().tasks.resumed == 0))
"""


@pytest.mark.timeout(60)
def test_lease_keeps_two_programs_apart_and_ends_with_its_holder(
    aws: FakeAWS, program: Program, ran: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who lives renews it; whom SIGKILL ended on this machine is not waited for."""
    (tmp_path / "script.py").write_text(SCRIPT)
    holder = program(tmp_path / "script.py", WHERE, ran)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "9\n"
    bucket_lease = json.loads(s3_text("a/run/lease"))
    assert bucket_lease["pid"] == holder.pid
    deadline = time.monotonic() + 50
    while "segments" not in names():  # it writes once a second
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)
    # It renews its lease every five seconds: that long it takes to know that it lives.
    monkeypatch.setattr(bucket, "_LEASE", 15.0)
    with pytest.raises(JournalLockedError) as caught:
        executor()
    assert (caught.value.pid, caught.value.host) == (holder.pid, os.uname().nodename)
    holder.kill()
    holder.wait()
    out, err = program(tmp_path / "script.py", WHERE, ran).communicate(timeout=40)
    assert (out, calls(ran)) == ("9\n", {"3": 1}), err


def s3_text(key: str) -> str:
    async def read() -> str:
        async with AwsClients() as clients:
            answer = await clients.call("s3", "get_object", Bucket="results", Key=key)
            async with answer["Body"] as body:
                data: bytes = await body.read()
                return data.decode()

    return asyncio.run(read())


@pytest.mark.timeout(60)
def test_lease_of_another_machine_ends_when_nobody_renews_it(
    aws: FakeAWS, ran: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever was away for so long records nothing any more, and goes on."""
    s3("put_object", Key="a/run/journal", Body=b'{"format": "cloudexec-journal", "version": 1}')
    s3("put_object", Key="a/run/lease", Body=b'{"pid": 1, "host": "elsewhere", "id": "x"}')
    with executor() as each:
        assert each.submit(square, ran, 2).result() == 4
        s3("put_object", Key="a/run/lease", Body=b'{"pid": 1, "host": "elsewhere", "id": "y"}')
        deadline = time.monotonic() + 50
        while not any("was taken over" in text for text in caplog.messages):
            assert time.monotonic() < deadline
            assert each.submit(square, ran, 3).result() == 9
    assert "lease" in names()


@pytest.mark.timeout(60)
def test_many_segments_become_one(aws: FakeAWS, ran: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal of many runs is opened with few requests."""
    monkeypatch.setattr(bucket, "_MANY_SEGMENTS", 1)
    for x in range(2):
        with executor() as each:
            each.submit(square, ran, x).result()
    assert names().count("segments") == 2
    for _ in range(2):
        with executor() as each:
            assert [each.submit(square, ran, x).done() for x in range(2)] == [True, True]
        assert names().count("segments") == 1


@pytest.mark.parametrize("way", ["closed", "killed"])
def test_a_journal_is_one_though_its_mark_has_expired_before_the_rest(
    aws: FakeAWS, ran: str, way: str
) -> None:
    """The bucket's lifecycle rule deletes one object after another, by when each was written.

    Who closes a journal writes the mark last. Of who was killed, the lease is there, which was
    written all the time.
    """
    with executor() as each:
        assert each.submit(square, ran, 3).result() == 9
        while "segments" not in names():
            threading.Event().wait(0.05)
        s3("delete_object", Key="a/run/journal")
        lease = boto3.client("s3").get_object(Bucket="results", Key="a/run/lease")["Body"].read()
    assert "journal" in names()
    if way == "killed":
        s3("delete_object", Key="a/run/journal")
        s3("put_object", Key="a/run/lease", Body=lease)
    with executor() as each:
        assert each.submit(square, ran, 3).result() == 9
        assert each.stats().tasks.resumed == 1
        assert "journal" in names()
    assert calls(ran) == {"3": 1}


def test_what_is_no_journal_is_refused(aws: FakeAWS) -> None:
    """Newer ones, prefixes that others use, and names that are none."""
    s3("put_object", Key="a/run/photo.jpg", Body=b"")
    with pytest.raises(JournalError, match="has other objects in it"):
        executor()
    s3("put_object", Key="a/run/journal", Body=b"{}")
    with pytest.raises(JournalError, match="is not a journal"):
        executor()
    s3("put_object", Key="a/run/journal", Body=b'{"format": "cloudexec-journal", "version": 9}')
    with pytest.raises(JournalVersionError):
        executor()
    with pytest.raises(ConfigError, match="s3://bucket/prefix"):
        BatchExecutor(1, journal="s3://results")
