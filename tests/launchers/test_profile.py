"""Launching from a profile: queues, key and image of a set-up."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from launcher_helpers import eventually
from launcher_tasks import wait_on_spot

from cloudexec import Batch, BatchExecutor, ConfigError, LaunchError, Local
from cloudexec._enrolment import python_version
from cloudexec.aws import Profile
from cloudexec.testing import FakeAWS

KEY = "5a" * 32


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own, empty directory for profiles."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config"


@pytest.fixture
def aws(tmp_path: Path) -> Iterator[Any]:
    """An emulated AWS, where one image has another Python."""
    program = (
        "import runpy, cloudexec._enrolment as enrolment; "
        "enrolment.python_version = lambda: '3.99'; "
        "runpy.run_module('cloudexec.worker', run_name='__main__')"
    )
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{program}"\n')
    other.chmod(0o755)
    images = {"example.com/old:1": str(other)}
    with FakeAWS(grace=2.0, calls_per_second=1000, images=images) as fake:
        yield fake


@pytest.fixture
def profile(aws: Any, configured: Path) -> Profile:
    """A profile with a queue of each kind on Fargate, and the stack's key."""
    on_demand = aws.set_up("ondemand", max_vcpus=8)
    spot = aws.set_up("spot", spot=True, max_vcpus=8)
    secret = boto3.client("secretsmanager").create_secret(Name="key", SecretString=KEY)
    profile = Profile(
        name="team",
        region=aws.region,
        stack="cloudexec-team",
        queues={"fargate": on_demand.queue, "fargate_spot": spot.queue},
        job_role=on_demand.job_role,
        execution_role=on_demand.execution_role,
        key_secret=secret["ARN"],
        images={f"{python_version()}-linux/amd64": "example.com/worker:1"},
        project="sweep",
    )
    profile.save()
    return profile


def submits(aws: Any) -> list[dict[str, Any]]:
    return [r.parameters for r in aws.requests if r.operation == "SubmitJob" and r.status == 200]


def test_the_same_script_runs_here_and_there(aws: Any, profile: Profile, tmp_path: Path) -> None:
    """``CLOUDEXEC_PROFILE`` alone sends it to the cloud."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os
            from cloudexec import BatchExecutor

            def where(_):
                return os.environ.get("AWS_BATCH_JQ_NAME", "here")

            if __name__ == "__main__":
                with BatchExecutor(2) as executor:
                    print(*set(executor.map(where, range(20))))
            """
        )
    )

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    here, there = run(), run(CLOUDEXEC_PROFILE="team")
    assert here.stdout == "here\n", here.stderr
    assert there.stdout.startswith("ondemand"), there.stderr
    spent = r"cloudexec: 20 tasks on (1 of )?2 workers in 0:\d\d, about \$0\.00.*\n"
    assert re.fullmatch(spent, there.stderr), there.stderr
    assert here.stderr == ""


def test_the_key_of_the_stack_never_stands_in_a_request(aws: Any, profile: Profile) -> None:
    """It reaches workers through the definition's secrets alone."""
    with BatchExecutor(1, launcher=Batch(profile="team")) as executor:
        assert executor.submit(len, "abc").result() == 3
    requests = [r.parameters for r in aws.requests if r.operation != "CreateSecret"]
    assert KEY not in repr(requests)
    (request,) = submits(aws)
    names = [each["name"] for each in request["containerOverrides"]["environment"]]
    assert "CLOUDEXEC_KEY" not in names
    assert request["tags"]["cloudexec:project"] == "sweep"
    assert request["tags"]["cloudexec:stack"] == "cloudexec-team"


def test_spot_prefer_goes_on_demand_after_repeated_reclaims(aws: Any, profile: Profile) -> None:
    """The executor itself replaces what was reclaimed, and in the end elsewhere."""
    batch = Batch(profile="team", spot="prefer", environment={"CLOUDEXEC_DRAIN_GRACE": "0.2"})
    with BatchExecutor(1, launcher=batch, retries=1) as executor:
        future = executor.submit(wait_on_spot)
        for reclaims in range(3):
            (job,) = eventually(lambda: [j for j in aws.jobs() if j.status == "RUNNING"])
            eventually(lambda: executor.stats().tasks.running == 1)
            aws.faults.reclaim(job.job_id)
            eventually(lambda n=reclaims: executor.stats().workers.reclaimed == n + 1)
        assert future.result(timeout=60).startswith("ondemand")
        assert executor.stats().lost_attempts == 0
    queues = [request["jobQueue"] for request in submits(aws)]
    assert queues == [profile.queues["fargate_spot"]] * 3 + [profile.queues["fargate"]]


def test_a_wrong_python_in_the_image_is_named(aws: Any, profile: Profile, tmp_path: Path) -> None:
    """No unpickling mystery: the error names both versions and the remedy."""
    batch = Batch(profile="team", image="example.com/old:1")
    with BatchExecutor(2, launcher=batch) as executor:
        future = executor.submit(len, "abc")
        with pytest.raises(LaunchError, match=rf"Python 3\.99.*Python {python_version()}"):
            future.result(timeout=60)


def test_a_profile_without_an_image_says_how_to_get_one(aws: Any, profile: Profile) -> None:
    """Before any job is submitted. It has no repository, so none can be made."""
    executor = BatchExecutor(1, launcher=Batch(profile="team", arch="arm64"))
    with pytest.raises(ConfigError, match=r"linux/arm64, and the profile 'team' has no repository"):
        executor.submit(len, "abc")
    executor.shutdown()
    assert not submits(aws)


def test_a_profile_that_is_not_there(configured: Path) -> None:
    """The error names the file, the profiles there are, and the command that makes one."""
    executor = BatchExecutor(1, launcher=Batch(profile="nowhere"))
    with pytest.raises(ConfigError, match=r"nowhere\.json.*cloudexec up --name nowhere"):
        executor.submit(len, "abc")
    executor.shutdown()


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("profile", "cloudexec.ConfigError: there is no profile 'nobody'"),
        ("image", "cloudexec.ConfigError: there is no worker image for Python"),
        ("queue", "cloudexec.ConfigError: the profile 'team' has no queue for fargate"),
    ],
)
@pytest.mark.parametrize("call", ["executor.submit(abs, -1)", "list(executor.map(abs, [-1]))"])
def test_a_mistake_in_the_set_up_is_one_error_of_a_few_lines(
    aws: Any, profile: Profile, tmp_path: Path, mistake: str, words: str, call: str
) -> None:
    """It is about the user's account, and what this package does inside does not explain it."""
    if mistake == "image":
        dataclasses.replace(profile, images={}).save()
    if mistake == "queue":
        dataclasses.replace(profile, queues={}).save()
    script = tmp_path / "script.py"
    script.write_text(
        f"from cloudexec import BatchExecutor\n"
        f"if __name__ == '__main__':\n"
        f"    with BatchExecutor(2) as executor:\n"
        f"        {call}\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "CLOUDEXEC_PROFILE": "nobody" if mistake == "profile" else "team"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[-1].startswith(words), done.stderr
    files = [line for line in lines if line.startswith("  File ")]
    assert len(files) <= 2, done.stderr  # the script's line, and the method that it calls
    assert f"{script}" in files[0]
    assert len(lines) <= 8
    assert not submits(aws)


def test_a_definition_of_the_stack_has_its_key(aws: Any, profile: Profile) -> None:
    """One that another executor registered can be named, and its workers enrol."""
    with BatchExecutor(1, launcher=Batch(profile="team")) as executor:
        executor.submit(len, "abc").result(timeout=30)
    definition = submits(aws)[0]["jobDefinition"]
    with BatchExecutor(1, launcher=Batch(profile="team", definition=definition)) as executor:
        assert executor.submit(len, "abcd").result(timeout=30) == 4
    other = Batch(queue=profile.queues["fargate"], definition=definition, region=aws.region)
    executor = BatchExecutor(1, launcher=other)
    with pytest.raises(ConfigError, match=r"another key.*without a profile.*give profile="):
        executor.submit(len, "abc")
    executor.shutdown()


def test_a_queue_that_the_profile_has_not(aws: Any, profile: Profile) -> None:
    """The error names those there are."""
    executor = BatchExecutor(1, launcher=Batch(profile="team", compute="ec2"))
    with pytest.raises(ConfigError, match=r"no queue for ec2 .*fargate, fargate_spot.*--ec2"):
        executor.submit(len, "abc")
    executor.shutdown()


@pytest.mark.parametrize("text", [" ", "5a5a", "not hexadecimal"])
def test_a_key_that_is_none_is_named(aws: Any, profile: Profile, text: str) -> None:
    """Blanks too, which are hexadecimal digits as far as Python goes: none of them."""
    boto3.client("secretsmanager").put_secret_value(SecretId=profile.key_secret, SecretString=text)
    executor = BatchExecutor(1, launcher=Batch(profile="team"))
    with pytest.raises(LaunchError, match=r"does not hold 64 hexadecimal digits"):
        executor.submit(len, "abc")
    executor.shutdown()


def test_arm_instances_that_the_stack_does_not_have(aws: Any, profile: Profile) -> None:
    """Jobs would wait for them for ever."""
    queues = {**profile.queues, "ec2": profile.queues["fargate"]}
    dataclasses.replace(profile, queues=queues).save()
    executor = BatchExecutor(1, launcher=Batch(profile="team", compute="ec2", arch="arm64"))
    with pytest.raises(ConfigError, match=r"x86-64 instances.*Fargate.*queue="):
        executor.submit(len, "abc")
    executor.shutdown()


def test_a_profile_survives_being_written_and_read(configured: Path) -> None:
    """It is its user's alone, and what a newer release adds is ignored."""
    profile = Profile(name="a", region="eu-central-1", subnets=("s1", "s2"))
    path = profile.save()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Profile.load("a") == profile
    text = path.read_text().replace('"name"', '"something_new": 1, "name"')
    path.write_text(text)
    assert Profile.load("a") == profile
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        Profile.load("a")
    path.write_text('{"name": "a", "region": "r", "images": null}')
    with pytest.raises(ConfigError, match="images=None"):
        Profile.load("a")
    assert Profile.names() == ["a"]
    profile.delete()
    assert Profile.names() == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-a", "x" * 65])
def test_a_name_that_cannot_be_a_file(name: str, configured: Path) -> None:
    """Nothing is read or written outside of the directory of profiles."""
    with pytest.raises(ConfigError, match="name of a profile"):
        Profile.path(name)


@pytest.mark.parametrize("value", ["", "local"])
def test_the_local_profile_is_this_machine(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a script can be brought home by the same variable."""
    monkeypatch.setenv("CLOUDEXEC_PROFILE", value)
    assert isinstance(BatchExecutor(1)._launcher, Local)


def test_spot_prefer_goes_on_demand_when_there_is_none(aws: Any, profile: Profile) -> None:
    """Long before the launch counts as failed."""
    aws.faults.no_capacity(profile.queues["fargate_spot"])
    batch = Batch(profile="team", spot="prefer")
    with BatchExecutor(3, launcher=batch, launch_timeout=9.0) as executor:
        where = executor.submit(lambda: os.environ["AWS_BATCH_JQ_NAME"])
        assert where.result(timeout=30).startswith("ondemand")
    eventually(lambda: all(job.status in ("SUCCEEDED", "FAILED") for job in aws.jobs()))


def test_an_estimate_before_anything_is_launched(configured: Path) -> None:
    """Fargate's list price, a minute at least, and about a third of it on Spot."""
    Profile(name="team", region="us-east-1", assign_public_ip=False).save()
    hour = Batch(profile="team", vcpus=1, memory="2GiB").estimate(10, 3600)
    assert hour.accrued_usd == pytest.approx(10 * (0.04048 + 2 * 0.004445))
    assert hour.per_hour_usd == hour.accrued_usd
    assert Batch(profile="team").estimate(10, 1).accrued_usd == pytest.approx(hour.accrued_usd / 60)
    spot = Batch(profile="team", spot=True).estimate(10, 3600)
    assert 0.2 < spot.accrued_usd / hour.accrued_usd < 0.5
    with pytest.raises(ConfigError, match="seconds"):
        Batch(profile="team").estimate(1, -1)


def test_what_is_pending_at_the_end_of_a_script_is_run(
    aws: Any, profile: Profile, tmp_path: Path
) -> None:
    """As with a process pool: although AWS has yet to be talked to, and names to be looked up."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import time
            from cloudexec import BatchExecutor

            def late(number):
                time.sleep(0.2)
                return number

            if __name__ == "__main__":
                executor = BatchExecutor(2)
                for number in range(4):
                    executor.submit(late, number).add_done_callback(
                        lambda future: print("result", future.result(), flush=True)
                    )
                print("main ends", flush=True)
            """
        )
    )
    endpoint = aws.endpoint_url.replace("127.0.0.1", "localhost")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "CLOUDEXEC_PROFILE": "team", "AWS_ENDPOINT_URL": endpoint},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "main ends", done.stderr
    assert sorted(lines[1:]) == [f"result {number}" for number in range(4)], done.stderr
    assert "4 tasks on" in done.stderr
    eventually(lambda: all(job.status in ("SUCCEEDED", "FAILED") for job in aws.jobs()))


def test_a_name_that_up_does_not_take_is_not_recommended(configured: Path) -> None:
    """Nobody is sent from one error to the next."""
    with pytest.raises(ConfigError) as caught:
        Profile.load("Team.1")
    assert "there is no profile 'Team.1'" in str(caught.value)
    assert "cloudexec up" not in str(caught.value)


def test_a_profile_that_cannot_be_written_says_where_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cloudexec up` does not end in a traceback once the stack stands."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", "/dev/null/profiles")
    with pytest.raises(ConfigError, match=r"a\.json cannot be written: .*CLOUDEXEC_CONFIG_DIR"):
        Profile(name="a", region="us-east-1").save()
    assert Profile.names() == []
