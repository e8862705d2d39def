"""Files that a program writes: how they get into the bucket, and back from it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import boto3
import pytest
from run_helpers import account

from cloudexec import ConfigError
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.profile import Profile
from cloudexec._errors import AwsError
from cloudexec._runs.bucket import OutputFile, RunBucket
from cloudexec._runs.outputs import Outputs
from cloudexec._runs.plan import RunPlan, check_output_folders
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAWS]:
    """An account that was set up."""
    with (
        pytest.MonkeyPatch.context() as patch,
        account(tmp_path_factory.mktemp("profiles"), patch) as fake,
    ):
        yield fake


@pytest.fixture(autouse=True)
def _faults_end(aws: FakeAWS) -> Iterator[None]:
    yield
    aws.faults.clear()


def in_bucket(name: str, work: Callable[[RunBucket], Awaitable[None]]) -> None:
    """Do something with what the bucket has of a run."""

    async def do() -> None:
        async with AwsClients() as clients:
            await work(RunBucket(clients, Profile.load("default").bucket, name))

    asyncio.run(do())


def write(folder: Path, texts: dict[str, str]) -> None:
    """Write files."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def objects(name: str) -> list[str]:
    """Return what the bucket has of a run."""
    prefix = f"cloudexec/runs/{name}/"
    listed = boto3.client("s3").list_objects_v2(
        Bucket=Profile.load("default").bucket, Prefix=prefix
    )
    return [each["Key"].removeprefix(prefix) for each in listed.get("Contents", ())]


def silent(text: str) -> None:
    """Show nothing."""


def test_a_machine_that_is_lost_before_it_lists_a_changed_file_leaves_the_last_state(
    aws: FakeAWS, tmp_path: Path
) -> None:
    """The list names content that is there, whatever was sent since."""

    async def work(bucket: RunBucket) -> None:
        write(tmp_path, {"out/state": "first"})
        outputs = Outputs(bucket, tmp_path, ["out"], ["out"])
        assert await outputs.keep(is_last=True) == []
        write(tmp_path, {"out/state": "second state"})
        await bucket.send_output(
            OutputFile(path="out/state", size=12, sha256=_digest(b"second state")),
            tmp_path / "out" / "state",
        )
        # The machine is lost here, and another attempt begins.
        again = Outputs(bucket, tmp_path / "again", ["out"], ["out"])
        await again.prepare(silent)
        assert (tmp_path / "again" / "out" / "state").read_text() == "first"

    in_bucket("lost-between", work)


def _digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def test_content_that_was_replaced_or_removed_does_not_stay_in_the_bucket(
    aws: FakeAWS, tmp_path: Path
) -> None:
    async def work(bucket: RunBucket) -> None:
        outputs = Outputs(bucket, tmp_path, ["out"], ["out"])
        for texts in ({"out/a": "1", "out/b": "b"}, {"out/a": "22"}, {"out/a": "1"}):
            write(tmp_path, texts)
            await outputs.keep(is_last=True)
        (tmp_path / "out" / "b").unlink()
        await outputs.keep(is_last=True)
        there = [each for each in objects("replaced") if each.startswith("outputs/")]
        assert there == [f"outputs/{_digest(b'1')[:16]}/out/a"]
        await outputs.keep(is_last=True)
        (listed,) = await bucket.outputs()
        assert listed.path == "out/a"

    in_bucket("replaced", work)


def test_a_file_that_is_gone_from_the_bucket_is_named_and_the_others_are_fetched(
    aws: FakeAWS, tmp_path: Path
) -> None:
    async def work(bucket: RunBucket) -> None:
        write(tmp_path, {"out/a": "a", "out/gone": "gone", "out/z": "z"})
        await Outputs(bucket, tmp_path, ["out"]).keep(is_last=True)
        (gone,) = (each for each in await bucket.outputs() if each.path == "out/gone")
        await bucket.forget_outputs([gone])
        with pytest.raises(AwsError, match=r"does not have 'out/gone' of the run expired as it"):
            await bucket.fetch(tmp_path / "back", ["out"])
        back = tmp_path / "back" / "out"
        assert sorted(each.name for each in back.iterdir()) == ["a", "z"]
        said: list[str] = []
        outputs = Outputs(bucket, tmp_path / "again", ["out"])
        await outputs.prepare(said.append)
        assert len(said) == 1
        assert "'out/gone'" in said[0]
        # And the list names only what there is from now on.
        await outputs.keep()
        assert [each.path for each in await bucket.outputs()] == ["out/a", "out/z"]

    in_bucket("expired", work)


def test_only_what_is_below_the_outputs_is_written(aws: FakeAWS, tmp_path: Path) -> None:
    async def work(bucket: RunBucket) -> None:
        write(tmp_path, {"out/a": "a"})
        await Outputs(bucket, tmp_path, ["out"]).keep(is_last=True)
        (good,) = await bucket.outputs()
        bad = [
            OutputFile(path=path, size=good.size, sha256=good.sha256)
            for path in (".bashrc", "output/a", "out/../x", "/tmp/run-x", "../x")
        ]
        await bucket.put_outputs([*bad, good])
        with pytest.raises(
            ConfigError, match=r"lists '\.bashrc', .* not below its outputs \(out\)"
        ):
            await bucket.fetch(tmp_path / "back", ["out"])
        found = [each for each in (tmp_path / "back").rglob("*") if each.is_file()]
        assert found == [tmp_path / "back" / "out" / "a"]

    in_bucket("elsewhere", work)


def test_a_file_that_cannot_be_written_does_not_keep_back_the_others(
    aws: FakeAWS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And several are fetched at a time, but not all."""
    names = [f"{number:02}" for number in range(20)]
    answer, lock, now, most = aws.faults.wait_before, threading.Lock(), 0, 0

    def counted(operation: str) -> None:
        nonlocal now, most
        with lock:
            now += operation == "GetObject"
            most = max(most, now)
        answer(operation)
        with lock:
            now -= operation == "GetObject"

    async def work(bucket: RunBucket) -> None:
        write(tmp_path, {f"out/{each}": each for each in names})
        await Outputs(bucket, tmp_path, ["out"]).keep(is_last=True)
        back = tmp_path / "back" / "out"
        (back / "03").mkdir(parents=True)
        monkeypatch.setattr(aws.faults, "wait_before", counted)
        aws.faults.slow_response("GetObject", 0.1)
        with pytest.raises(ConfigError, match=r"^'out/03' cannot be written below .*: Is a dir"):
            await bucket.fetch(tmp_path / "back", ["out"])
        assert sorted(each.name for each in back.iterdir() if each.is_file()) == sorted(
            {*names} - {"03"}
        )
        assert 2 <= most <= 8
        assert not list(back.glob(".*"))

    in_bucket("unwritable", work)


def test_files_that_were_sent_are_listed_though_another_one_fails(
    aws: FakeAWS, tmp_path: Path
) -> None:
    async def work(bucket: RunBucket) -> None:
        write(tmp_path, {"out/a": "a", "out/z": "z"})
        outputs = Outputs(bucket, tmp_path, ["out"])
        aws.faults.deny("PutObject", count=1)
        (failure,) = await outputs.keep(is_last=True)
        assert failure.startswith("out/")
        assert "AccessDenied" in failure or "not authorized" in failure
        assert len(await bucket.outputs()) == 1
        # The one that failed is tried again although it has not changed.
        assert await outputs.keep() == []
        assert [each.path for each in await bucket.outputs()] == ["out/a", "out/z"]

    in_bucket("one-fails", work)


def test_a_list_that_could_not_be_written_is_written_next_time(
    aws: FakeAWS, tmp_path: Path
) -> None:
    async def work(bucket: RunBucket) -> None:
        write(tmp_path, {"out/a": "a", "out/b": "b"})
        outputs = Outputs(bucket, tmp_path, ["out"])
        await outputs.keep(is_last=True)
        (tmp_path / "out" / "b").unlink()
        aws.faults.deny("PutObject")
        with pytest.raises(AwsError):
            await outputs.keep()
        aws.faults.clear()
        assert len(await bucket.outputs()) == 2
        await outputs.keep()
        assert [each.path for each in await bucket.outputs()] == ["out/a"]

    in_bucket("not-listed", work)


def test_names_that_are_not_utf_8_are_named_and_the_other_files_come_back(
    aws: FakeAWS, tmp_path: Path
) -> None:
    write(tmp_path, {"out/a": "a", os.fsdecode(b"out/\xff.txt"): "x"})

    async def work(bucket: RunBucket) -> None:
        failures = await Outputs(bucket, tmp_path, ["out"]).keep(is_last=True)
        assert failures == [
            "b'out/\\xff.txt': its name is not UTF-8, and the bucket takes no other names"
        ]
        assert [each.path for each in await bucket.outputs()] == ["out/a"]

    in_bucket("odd-names", work)


def test_names_as_long_as_names_can_be_come_back(aws: FakeAWS, tmp_path: Path) -> None:
    async def work(bucket: RunBucket) -> None:
        write(tmp_path, {"out/" + "n" * 255: "x"})
        assert not await Outputs(bucket, tmp_path, ["out"]).keep(is_last=True)
        await bucket.fetch(tmp_path / "back", ["out"])
        assert (tmp_path / "back" / "out" / ("n" * 255)).read_text() == "x"

    in_bucket("long-names", work)


def test_permissions_come_back(aws: FakeAWS, tmp_path: Path) -> None:
    """Also those that the program has changed after the file was sent."""

    async def work(bucket: RunBucket) -> None:
        write(tmp_path, {"out/go.sh": "#!/bin/sh\n", "out/mine": "x"})
        (tmp_path / "out" / "mine").chmod(0o600)
        outputs = Outputs(bucket, tmp_path, ["out"])
        await outputs.keep(is_last=True)
        (tmp_path / "out" / "go.sh").chmod(0o755)
        await outputs.keep(is_last=True)
        await bucket.fetch(tmp_path / "back", ["out"])
        back = tmp_path / "back" / "out"
        assert (back / "go.sh").stat().st_mode & 0o777 == 0o755
        assert (back / "mine").stat().st_mode & 0o777 == 0o600

    in_bucket("modes", work)


def test_what_a_long_run_needs_is_written_anew(aws: FakeAWS, tmp_path: Path) -> None:
    """The bucket's rule would delete it otherwise, days after it was written."""

    async def work(bucket: RunBucket) -> None:
        plan = RunPlan(name="long", kind="command", target="", args=("true",), outputs=("out",))
        assert await bucket.create(plan)
        await bucket.put_variables("", {"A": "b"})
        write(tmp_path, {"out/a": "a", "out/b": "b"})
        outputs = Outputs(bucket, tmp_path, ["out"], renew_every=0.0)
        await outputs.keep(is_last=True)
        began = await bucket.first_start("")
        await bucket.forget_outputs(await bucket.outputs())
        before = {each.path: each.sent_at for each in await bucket.outputs()}
        await outputs.keep()
        after = {each.path: each.sent_at for each in await bucket.outputs()}
        assert all(after[path] > before[path] for path in ("out/a", "out/b"))
        assert len(await bucket.fetch(tmp_path / "back", ["out"])) == 2
        aws.clear_requests()
        for name in ("journal/journal", "journal/lease"):
            await bucket.upload(name, tmp_path / "out" / "a", 1, bytes.fromhex(_digest(b"a")))
        await bucket.renew(plan, None)
        assert not [each for each in aws.requests if each.operation == "CopyObject"]
        await bucket.renew(plan, None, older_than=-60.0)
        (copied,) = (each for each in aws.requests if each.operation == "CopyObject")
        assert copied.parameters["Key"].endswith("/long/journal/journal")
        assert copied.status == 200
        aws.clear_requests()
        await bucket.renew(plan, None)
        put = [each.parameters["Key"] for each in aws.requests if each.operation == "PutObject"]
        assert sorted(key.rpartition("/")[2] for key in put) == [
            "run.json",
            "started-.json",
            "variables-.json",
        ]
        assert await bucket.first_start("") == began

    in_bucket("long", work)


def test_an_object_that_is_too_large_for_one_copy_is_written_anew_in_parts(
    aws: FakeAWS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 copies 5 GiB in one request, and each part but the last has 5 MiB or more."""
    monkeypatch.setattr("cloudexec._runs.renewal._COPY_LARGEST", 1024)
    monkeypatch.setattr("cloudexec._runs.renewal._PART", 5 * 1024**2)
    content = bytes(range(256)) * 24 * 1024  # 6 MiB

    async def work(bucket: RunBucket) -> None:
        plan = RunPlan(name="parts", kind="command", target="", args=("true",))
        assert await bucket.create(plan)
        (tmp_path / "large").write_bytes(content)
        sha256 = bytes.fromhex(_digest(content))
        await bucket.upload("journal/results/a", tmp_path / "large", len(content), sha256)
        # One that fails leaves the object as it is, and no upload.
        aws.faults.deny("UploadPartCopy")
        with pytest.raises(AwsError, match="AccessDenied"):
            await bucket.renew(plan, None, older_than=-60.0)
        aws.faults.clear()
        s3 = boto3.client("s3")
        where = {"Bucket": bucket.where.split("/")[2], "Key": f"{bucket.prefix}journal/results/a"}
        assert not s3.list_multipart_uploads(Bucket=where["Bucket"]).get("Uploads")
        before = s3.head_object(**where)
        await bucket.renew(plan, None, older_than=-60.0)
        after = s3.get_object(**where)
        assert after["ETag"] != before["ETag"]  # it is made of other parts
        assert after["Body"].read() == content
        assert after["ServerSideEncryption"] == "AES256"

    in_bucket("parts", work)


@pytest.mark.parametrize("resumes", [False, True])
def test_a_reused_name_has_no_leftovers(aws: FakeAWS, tmp_path: Path, resumes: bool) -> None:
    """The bucket's rule deletes what is to be run before what was written later."""
    name = f"reused-{resumes}".lower()

    async def work(bucket: RunBucket) -> None:
        write(tmp_path, {"out/a": "a", "x": "x"})
        await bucket.first_start("")
        await bucket.put_variables("", {"A": "b"})
        await Outputs(bucket, tmp_path, ["out"]).keep(is_last=True)
        await bucket.upload("journal/x", tmp_path / "x", 1, bytes.fromhex(_digest(b"x")))
        plan = RunPlan(name=name, kind="command", target="", args=("true",))
        assert await bucket.create(plan, resumes=resumes)
        there = set(objects(name))
        kept = {"journal/x", "outputs.json", f"outputs/{_digest(b'a')[:16]}/out/a"}
        assert there == ({"run.json"} | kept if resumes else {"run.json"})
        assert not await bucket.create(RunPlan(name=name, kind="command", target="", args=("no",)))

    in_bucket(name, work)


def test_outputs_may_be_files(aws: FakeAWS, tmp_path: Path) -> None:
    async def work(bucket: RunBucket) -> None:
        wanted = ["results/all.csv", "logs"]
        outputs = Outputs(bucket, tmp_path, wanted, check_output_folders(wanted, (), tmp_path))
        await outputs.prepare(silent)
        assert (tmp_path / "logs").is_dir()
        write(tmp_path, {"results/all.csv": "1", "results/other": "2", "logs/a": "3"})
        await outputs.keep(is_last=True)
        assert [each.path for each in await bucket.outputs()] == ["logs/a", "results/all.csv"]

    in_bucket("output-files", work)


def test_outputs_that_are_files_here_are_not_made_as_folders(tmp_path: Path) -> None:
    write(tmp_path, {"Makefile": "", "all.csv": "", "runs.v1/a": ""})
    given = ["new", "all.csv", "new.csv", "runs.v1", "new.v1/", "."]
    assert check_output_folders(given, (), tmp_path) == ("new", "runs.v1", "new.v1", ".")
    with pytest.raises(ConfigError, match="'Makefile' has no suffix"):
        check_output_folders(["Makefile"], (), tmp_path)
    assert check_output_folders(["Makefile"], {"Makefile": None}, tmp_path) == ()
