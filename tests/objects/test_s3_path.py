"""Large arguments and results through a bucket, end to end: real workers, an emulated S3."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from s3_tasks import BIG, MIB, digest, make, make_once, random_bytes, seen

from cloudexec import Batch, BatchExecutor, Local, ObjectOptions, Ref
from cloudexec._aws.names import OBJECTS_PREFIX
from cloudexec._aws.profile import Profile
from cloudexec._server import bucket as transfers
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(120)

NAME = "some-bucket"
ONE = 9 * MIB  # in one request


@pytest.fixture
def aws() -> Iterator[FakeAWS]:
    with FakeAWS(calls_per_second=1000, grace=2.0) as aws:
        boto3.client("s3").create_bucket(Bucket=NAME)
        aws.clear_requests()
        yield aws


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gives S3 up sooner than it would elsewhere."""
    monkeypatch.setattr(transfers, "_PATIENCE", 2.0)


@contextmanager
def _executor(workers: int = 2, **settings: Any) -> Iterator[BatchExecutor]:
    """Workers on this machine that are connected as those elsewhere are."""
    settings.setdefault("bucket", NAME)
    with BatchExecutor(
        workers,
        launcher=Local(slots_per_worker=1),
        listen="127.0.0.1:0",
        min_workers=workers,
        objects=ObjectOptions(**settings),
    ) as executor:
        _await(lambda: len(_sessions(executor)) == workers)
        yield executor


def _sessions(executor: BatchExecutor) -> dict[str, Any]:
    assert executor._driver is not None
    return executor._driver.sessions


def _await(probe: Callable[[], object], seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not probe():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def _counts(aws: FakeAWS) -> Counter[str]:
    return Counter(each.operation for each in aws.requests if each.service == "s3")


def _keys() -> list[str]:
    client = boto3.Session().client("s3")  # with the credentials of now
    found = client.list_objects_v2(Bucket=NAME).get("Contents", [])
    uploads = client.list_multipart_uploads(Bucket=NAME).get("Uploads", [])
    return [each["Key"] for each in (*found, *uploads)]


def _kill(executor: BatchExecutor, *names: str) -> None:
    """Kill workers, all of them by default, and wait until they are missed."""
    sessions = _sessions(executor)
    gone = list(names or sessions)
    identities = [sessions[name].identity for name in gone]

    async def kill() -> None:  # where launchers are called
        executor._launcher.terminate(identities)

    assert executor._driver is not None
    executor._driver.portal.run(kill()).result()
    _await(lambda: not set(gone) & set(_sessions(executor)))


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        each.getMessage()
        for each in caplog.records
        if each.name.startswith("cloudexec") and each.levelno >= logging.WARNING
    ]


# What works.


def test_an_argument_is_uploaded_once_and_downloaded_once_by_each_worker(aws: FakeAWS) -> None:
    """Of a hundred tasks, on two workers; it is deleted when nobody refers to it."""
    data = random_bytes(1, ONE)
    with _executor(cache=0) as executor:
        futures = [executor.submit(seen, data, number) for number in range(100)]
        results = [each.result(timeout=60) for each in futures]
        assert {each[0] for each in results} == {digest(data)}
        assert len({each[1] for each in results}) == 2
        counts = _counts(aws)
        (put,) = [each for each in aws.requests if each.operation == "PutObject"]
        assert put.parameters["Key"].startswith(OBJECTS_PREFIX)
        assert counts["GetObject"] == 2 * 2  # 8 MiB at a time
        stats = executor.stats()
        assert stats.bytes_uploaded == len(data)
        assert stats.bytes_sent < MIB
        del futures, data
        _await(lambda: not _keys())


def test_a_large_argument_goes_in_parts(aws: FakeAWS) -> None:
    """And what is in the closure, or was put, as well."""
    data = random_bytes(2)
    with _executor() as executor:
        ref = executor.put(data)
        futures = [executor.submit(seen, ref, number) for number in range(20)]
        assert {each.result(timeout=60)[0] for each in futures} == {digest(data)}
        futures = [executor.submit(lambda: digest(data)) for _ in range(4)]
        assert {each.result(timeout=60) for each in futures} == {digest(data)}
        counts = _counts(aws)
        assert counts["CompleteMultipartUpload"] == 1
        assert counts["UploadPart"] == 2
        assert executor.stats().bytes_uploaded == pytest.approx(len(data), rel=1e-4)
    assert _keys() == []


def test_large_results_come_through_the_bucket(aws: FakeAWS) -> None:
    """Small ones do not, and nothing is left once they are here."""
    with _executor() as executor:
        assert list(executor.map(make, range(4), timeout=60)) == [random_bytes(n) for n in range(4)]
        assert executor.submit(make, 5, MIB).result(timeout=60) == random_bytes(5, MIB)
        counts = _counts(aws)
        assert counts["CompleteMultipartUpload"] == 4
        assert executor.stats().bytes_downloaded == pytest.approx(4 * BIG, rel=1e-4)
        assert executor.stats().bytes_received >= 4 * BIG + MIB
        _await(lambda: not _keys())


def test_a_kept_result_outlives_its_worker_in_the_bucket(aws: FakeAWS, tmp_path: Path) -> None:
    """It is not made again, and the worker that needs it downloads it: not through the client."""
    made = tmp_path / "made"
    with _executor() as executor:
        keep = executor.with_options(keep=True)
        ref: Any = keep.submit(make_once, str(made), 3).result(timeout=60)
        assert isinstance(ref, Ref)
        _await(lambda: all(blob.stored for blob in ref._payload.blobs))  # type: ignore[union-attr]
        _kill(executor)
        before = executor.stats()
        assert executor.submit(digest, ref).result(timeout=60) == digest(random_bytes(3))
        after = executor.stats()
        assert after.bytes_downloaded == before.bytes_downloaded == 0
        assert after.bytes_sent - before.bytes_sent < MIB
        assert ref.get(timeout=60) == random_bytes(3)
        assert executor.stats().bytes_downloaded == pytest.approx(BIG, rel=1e-4)
        assert made.read_text() == "made\n"
    assert _keys() == []


def test_a_kept_result_goes_to_another_worker_directly(aws: FakeAWS, tmp_path: Path) -> None:
    """While the one that made it lives; the client is not visited."""
    with _executor() as executor:
        ref: Any = executor.with_options(keep=True).submit(make, 4).result(timeout=60)
        _await(lambda: all(blob.stored for blob in ref._payload.blobs))
        futures = [executor.submit(seen, ref, number) for number in range(60)]
        results = [each.result(timeout=60) for each in futures]
        assert {each[0] for each in results} == {digest(random_bytes(4))}
        assert executor.stats().bytes_downloaded == 0
        assert executor.stats().bytes_received < MIB


def test_one_worker_alone_has_no_use_for_the_detour(aws: FakeAWS) -> None:
    """What only it needs goes to it directly."""
    data = random_bytes(6)
    with _executor(1) as executor:
        assert executor.submit(digest, data).result(timeout=60) == digest(data)
        assert executor.submit(make, 6).result(timeout=60) == data
        assert _counts(aws) == {}


@pytest.mark.parametrize("bucket", [None, False])
def test_without_a_bucket_nobody_talks_to_s3(aws: FakeAWS, bucket: bool | None) -> None:
    """Neither with one, for what is small."""
    data = random_bytes(7)
    with _executor(bucket=bucket) as executor:
        futures = [executor.submit(seen, data, number) for number in range(10)]
        assert {each.result(timeout=60)[0] for each in futures} == {digest(data)}
        assert executor.submit(make, 7).result(timeout=60) == data
    with _executor(bucket_threshold="64MiB") as executor:
        futures = [executor.submit(seen, data, number) for number in range(10)]
        assert {each.result(timeout=60)[0] for each in futures} == {digest(data)}
    assert aws.requests == []


def test_workers_that_share_our_memory_need_no_bucket(aws: FakeAWS) -> None:
    """Though one is named."""
    options = ObjectOptions(bucket=NAME)
    with BatchExecutor(2, launcher=Local(slots_per_worker=1), objects=options) as executor:
        data = random_bytes(8)
        assert executor.submit(digest, data).result(timeout=60) == digest(data)
    assert aws.requests == []


def test_batch_uses_the_bucket_of_its_profile(
    aws: FakeAWS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody names it, and the workers have no credentials."""
    with _batch_executor(aws, tmp_path, monkeypatch) as executor:
        data = random_bytes(9)
        futures = [executor.submit(seen, data, number) for number in range(20)]
        assert {each.result(timeout=60)[0] for each in futures} == {digest(data)}
        assert list(executor.map(make, range(2), timeout=60)) == [random_bytes(0), random_bytes(1)]
        assert executor.stats().bytes_uploaded == pytest.approx(BIG, rel=1e-4)
        assert executor.stats().bytes_downloaded == pytest.approx(2 * BIG, rel=1e-4)
    assert _counts(aws)["GetObject"] >= 2
    assert _keys() == []


@contextmanager
def _batch_executor(
    aws: FakeAWS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Iterator[BatchExecutor]:
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path))
    made = aws.set_up("queue", max_vcpus=4)
    Profile(
        name="team",
        region=aws.region,
        queues={"fargate": made.queue},
        job_role=made.job_role,
        execution_role=made.execution_role,
        images={f"{sys.version_info[0]}.{sys.version_info[1]}-linux/amd64": "worker:1"},
        bucket=NAME,
    ).save()
    launcher = Batch(profile="team", **settings)
    with BatchExecutor(2, launcher=launcher, min_workers=2) as executor:
        _await(lambda: len(_sessions(executor)) == 2)
        yield executor


# What does not.


def _throttled_for_a_while(aws: FakeAWS) -> None:
    for each in ("UploadPart", "GetObject", "HeadBucket"):
        aws.faults.throttle(each, 3)


FAULTS: dict[str, Callable[[FakeAWS], None]] = {
    "503 for a while": _throttled_for_a_while,
    "cut": lambda aws: aws.faults.cut_response("GetObject", 3),
    "slow": lambda aws: aws.faults.slow_response("GetObject", 0.5, 4),
    "lost answers": lambda aws: aws.faults.lose_response("UploadPart", 2),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_s3_that_recovers_is_a_matter_of_time(
    aws: FakeAWS, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is told, and everything goes through the bucket all the same."""
    data = random_bytes(10)
    with _executor() as executor:
        FAULTS[fault](aws)
        futures = [executor.submit(seen, data, number) for number in range(10)]
        assert {each.result(timeout=60)[0] for each in futures} == {digest(data)}
        FAULTS[fault](aws)
        assert executor.submit(make, 10).result(timeout=60) == data
        assert executor.stats().bytes_uploaded == pytest.approx(BIG, rel=1e-4)
        assert executor.stats().bytes_downloaded == pytest.approx(BIG, rel=1e-4)
        aws.faults.clear()
    assert _warnings(caplog) == []
    assert _keys() == []


def _throttled(aws: FakeAWS) -> None:
    for each in ("HeadBucket", "PutObject", "CreateMultipartUpload", "UploadPart", "GetObject"):
        aws.faults.throttle(each, 10_000)


def _denied(aws: FakeAWS) -> None:
    for each in ("HeadBucket", "PutObject", "CreateMultipartUpload", "UploadPart"):
        aws.faults.deny(each)


LASTING: dict[str, tuple[Callable[[FakeAWS], object], str]] = {
    "503": (_throttled, "SlowDown|503"),
    "refused": (lambda aws: aws.faults.unreachable(1000.0), "cannot be reached"),
    "denied": (_denied, "AccessDenied"),
    "no such bucket": (lambda aws: boto3.client("s3").delete_bucket(Bucket=NAME), "NoSuchBucket"),
}


@pytest.mark.parametrize("fault", sorted(LASTING))
def test_s3_that_is_down_costs_one_warning(
    aws: FakeAWS, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Arguments and results go directly, and S3 is left alone for a while."""
    data = random_bytes(11)
    fail, reason = LASTING[fault]
    with _executor() as executor:
        fail(aws)
        futures = [executor.submit(seen, data, number) for number in range(10)]
        assert {each.result(timeout=60)[0] for each in futures} == {digest(data)}
        made = len(aws.requests)
        assert executor.submit(make, 11).result(timeout=60) == data
        other = random_bytes(12)
        assert executor.submit(digest, other).result(timeout=60) == digest(other)
        assert len(aws.requests) == made
        warnings = _warnings(caplog)
        assert len(warnings) == 1, warnings
        assert NAME in warnings[0]
        assert "bucket=False" in warnings[0]
        assert any(each in warnings[0] for each in reason.split("|")), warnings
        aws.faults.clear()


def test_a_corrupted_object_is_not_taken(aws: FakeAWS, caplog: pytest.LogCaptureFixture) -> None:
    """Neither by a worker nor by the client: both have it directly then."""
    data = random_bytes(13)
    with _executor() as executor:
        aws.faults.corrupt_response("GetObject", 1)
        futures = [executor.submit(seen, data, number) for number in range(10)]
        assert {each.result(timeout=60)[0] for each in futures} == {digest(data)}
        assert executor.stats().bytes_sent >= len(data)
        aws.faults.corrupt_response("GetObject", 1)
        assert executor.submit(make, 13).result(timeout=60) == data
        # The bucket as such is as good as before.
        assert executor.submit(make, 14).result(timeout=60) == random_bytes(14)
        assert executor.stats().bytes_downloaded == pytest.approx(BIG, rel=1e-4)
    assert any("SHA-256" in each for each in _warnings(caplog))
    assert _keys() == []


def test_a_refused_url_is_asked_for_anew(aws: FakeAWS) -> None:
    """The credentials that sign have ended, unknown to the client; there are new ones."""
    data = random_bytes(15)
    with _executor() as executor:
        futures = [executor.submit(seen, data, number) for number in range(10)]
        assert {each.result(timeout=60)[0] for each in futures} == {digest(data)}
        aws.faults.expire_credentials()
        aws.faults.renew_credentials()
        _kill(executor)
        futures = [executor.submit(seen, data, number) for number in range(10)]
        assert {each.result(timeout=60)[0] for each in futures} == {digest(data)}
        assert executor.stats().bytes_sent < MIB
        assert executor.stats().bytes_uploaded == pytest.approx(len(data), rel=1e-4)
    assert _keys() == []


def test_a_worker_that_cannot_reach_s3_has_it_from_the_client(
    aws: FakeAWS,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both ways, with one warning, whichever workers it happens to."""
    nowhere = {"http_proxy": "http://127.0.0.1:9"}
    with _batch_executor(aws, tmp_path, monkeypatch, environment=nowhere) as executor:
        data = random_bytes(16)
        futures = [executor.submit(seen, data, number) for number in range(10)]
        assert {each.result(timeout=90)[0] for each in futures} == {digest(data)}
        assert list(executor.map(make, range(2), timeout=90)) == [random_bytes(0), random_bytes(1)]
        assert executor.stats().bytes_sent >= 2 * BIG
    warnings = [each for each in _warnings(caplog) if NAME in each]
    assert len(warnings) == 1, warnings
    assert "check the way to S3" in warnings[0]
    assert _keys() == []


def test_a_kept_result_is_made_again_where_s3_has_lost_it(aws: FakeAWS, tmp_path: Path) -> None:
    """Its worker is gone, and someone has emptied the bucket."""
    made = tmp_path / "made"
    with _executor() as executor:
        keep = executor.with_options(keep=True)
        ref: Any = keep.submit(make_once, str(made), 17).result(timeout=60)
        _await(lambda: all(blob.stored for blob in ref._payload.blobs))
        _kill(executor)
        for key in _keys():
            boto3.client("s3").delete_object(Bucket=NAME, Key=key)
        assert ref.get(timeout=60) == random_bytes(17)
        assert made.read_text() == "made\nmade\n"


def test_a_worker_that_dies_uploading_leaves_nothing(aws: FakeAWS) -> None:
    """What it has begun is given up; its task runs elsewhere."""
    with _executor() as executor:
        aws.faults.slow_response("UploadPart", 20.0)
        future = executor.submit(make, 18)
        _await(lambda: any(each.operation == "CreateMultipartUpload" for each in aws.requests))
        _await(lambda: any(session.uploads for session in _sessions(executor).values()))
        sessions = _sessions(executor).values()
        name = next(each.worker_id for each in sessions if each.uploads)
        _kill(executor, name)
        aws.faults.clear()
        assert future.result(timeout=60) == random_bytes(18)
        _await(lambda: not _keys())


def test_a_shutdown_in_the_middle_leaves_nothing(aws: FakeAWS) -> None:
    """Uploads and downloads under way end with the executor."""
    data = random_bytes(19)
    with _executor() as executor:
        aws.faults.slow_response("UploadPart", 1.0)
        futures = [executor.submit(seen, data, number) for number in range(10)]
        _await(lambda: any(each.operation == "CreateMultipartUpload" for each in aws.requests))
        threading.Timer(0.2, aws.faults.clear).start()
        executor.kill_workers()
        assert all(each.exception(timeout=30) is not None for each in futures)
    assert _keys() == []
