"""EC2 instances of the emulated AWS: they run their user data, and keep AWS's limits."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import botocore.exceptions
import pytest

from cloudexec.testing import FakeAWS

IMAGE = "resolve:ssm:/aws/service/ecs/optimized-ami/amazon-linux-2023/recommended/image_id"


def eventually(condition: Callable[[], Any], timeout: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAWS]:
    """An AWS in which twenty minutes last two seconds, and images of which one hangs."""
    stuck = tmp_path_factory.mktemp("stuck") / "python"
    stuck.write_text("#!/bin/sh\ntrap '' TERM\nsleep 600 & wait\nwait\n")
    stuck.chmod(0o755)
    asks = stuck.with_name("asks")
    asks.write_text(
        "#!/bin/sh\n"
        "url=$AWS_EC2_METADATA_SERVICE_ENDPOINT/latest\n"
        'token=$(curl -sf -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" $url/api/token)\n'
        'curl -sf -H "X-aws-ec2-metadata-token: $token" $url/meta-data/instance-id > $ANSWER\n'
    )
    asks.chmod(0o755)
    images = {"stuck:*": str(stuck), "asks:*": str(asks)}
    with FakeAWS(grace=1.0, speed=600.0, images=images) as fake:
        yield fake


@pytest.fixture
def aws(shared: FakeAWS) -> Iterator[FakeAWS]:
    yield shared
    shared.faults.clear()
    alive = [each.instance_id for each in shared.instances() if each.state != "terminated"]
    if alive:
        client().terminate_instances(InstanceIds=alive)


def client(tries: int = 10) -> Any:
    config = botocore.config.Config(retries={"total_max_attempts": tries, "mode": "standard"})
    return boto3.client("ec2", config=config)


def fleet(
    script: str, count: int = 1, tries: int = 10, hops: int = 0, **settings: Any
) -> dict[str, Any]:
    """Start instances; return the answer."""
    ec2 = client(tries)
    data = {"MetadataOptions": {"HttpPutResponseHopLimit": hops}} if hops else {}
    template = f"plain-{hops}"
    with contextlib.suppress(botocore.exceptions.ClientError):  # there is one already
        ec2.create_launch_template(
            LaunchTemplateName=template, LaunchTemplateData={"ImageId": IMAGE, **data}
        )
    subnet = ec2.describe_subnets()["Subnets"][0]["SubnetId"]
    specification = {
        "LaunchTemplateName": template,
        "Version": "1",
        "LaunchTemplateSpecificationUserData": base64.b64encode(script.encode()).decode(),
    }
    overrides = [{"InstanceType": settings.pop("type", "c7i.large"), "SubnetId": subnet}]
    given = {
        "Type": "instant",
        "LaunchTemplateConfigs": [
            {"LaunchTemplateSpecification": specification, "Overrides": overrides}
        ],
        "TargetCapacitySpecification": {
            "TotalTargetCapacity": count,
            "DefaultTargetCapacityType": "on-demand",
        },
        **settings,
    }
    answer: dict[str, Any] = ec2.create_fleet(**given)
    return answer


def ended(aws: FakeAWS, answer: dict[str, Any]) -> Any:
    """Return the record of an instance when it has ended."""
    (name,) = answer["Instances"][0]["InstanceIds"]
    return eventually(
        lambda: next(
            (
                each
                for each in aws.instances()
                if each.instance_id == name and each.state == "terminated"
            ),
            None,
        )
    )


def test_an_instance_runs_its_script_and_ends_when_that_shuts_it_down(aws: FakeAWS) -> None:
    script = (
        "token=$(curl -sf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "
        '"$AWS_EC2_METADATA_SERVICE_ENDPOINT/latest/api/token")\n'
        'ask() { curl -s -w "%{http_code}" -H "X-aws-ec2-metadata-token: $1" '
        '"$AWS_EC2_METADATA_SERVICE_ENDPOINT/latest/meta-data/$2"; }\n'
        'ask "$token" instance-id; echo; ask "" instance-id; echo; ask "$token" nothing; echo\n'
        'ask "$token" spot/instance-action; echo; shutdown -h now\n'
    )
    found = ended(aws, fleet(script))
    assert found.console.split() == [f"{found.instance_id}200", "401", "404", "404"]
    assert found.state_reason == "Client.InstanceInitiatedShutdown"
    assert found.type == "c7i.large"


@pytest.mark.parametrize("first", [False, True])
def test_the_engine_starts_when_the_script_has_ended(aws: FakeAWS, first: bool) -> None:
    """A script that waits for it within cloud-init would wait for ever."""
    aws.faults.ec2.engine_starts_first = first
    script = (
        '[ -n "$again" ] || { docker pull early:1; exec systemd-run --no-block --setenv=again=1 '
        '/bin/bash "$0"; }\n'
        "systemctl start docker; docker pull late:1; shutdown -h now\n"
    )
    found = ended(aws, fleet(script))
    early = (
        "early:1"
        if first
        else "Cannot connect to the Docker daemon at unix:///var/run/docker.sock."
    )
    assert list(filter(None, found.console.split("\n"))) == [early, "late:1"]


def test_docker_runs_containers_and_tells_how_they_ended(aws: FakeAWS) -> None:
    aws.faults.ec2.engine_starts_first = True
    script = (
        "docker run -d plain:1 2>&1; docker pull plain:1; "
        "SECRET=hush docker run -d -e SECRET -e 'A=it is' plain:1 "
        'python3 -c \'import os; exit(7 if os.environ["SECRET"] == "hush" else 1)\' >/dev/null; '
        "docker wait worker; docker inspect --format x worker; shutdown -h now"
    )
    found = ended(aws, fleet(script))
    assert "no such image: plain:1" in found.console
    assert found.console.split()[-3:] == ["plain:1", "7", "false"]
    assert found.environment["A"] == "it is"
    assert found.exit_code == 7


@pytest.mark.parametrize(
    ("hops", "options", "answers"),
    [(0, "", False), (1, "--network host", True), (2, "", True)],
)
def test_a_container_reaches_the_metadata_as_far_as_the_hop_limit_lets_it(
    aws: FakeAWS, tmp_path: Path, hops: int, options: str, answers: bool
) -> None:
    """A network of its own is one hop more."""
    answer = tmp_path / "answer"
    run = f"docker run -d {options} -e ANSWER={answer} asks:1"
    script = (
        '[ -n "$again" ] || exec systemd-run --no-block --setenv=again=1 /bin/bash "$0"\n'
        f"systemctl start docker; docker pull asks:1; {run}; docker wait asks; shutdown -h now\n"
    )
    found = ended(aws, fleet(script, hops=hops))
    assert answer.read_text() == (found.instance_id if answers else "")


def test_a_timer_of_the_script_ends_an_instance_that_hangs(aws: FakeAWS) -> None:
    """Also if its container ignores what it is told."""
    aws.faults.ec2.engine_starts_first = True
    script = "shutdown -P +20\ndocker pull stuck:1\ndocker run -d stuck:1\ndocker wait worker"
    began = time.monotonic()
    found = ended(aws, fleet(script))
    assert found.state_reason == "Client.InstanceInitiatedShutdown"
    assert 2.0 < time.monotonic() - began < 20.0


@pytest.mark.parametrize("at_once", [False, True])
def test_an_instance_that_is_terminated_tells_its_container_unless_in_a_hurry(
    aws: FakeAWS, shared: FakeAWS, at_once: bool
) -> None:
    aws.faults.ec2.engine_starts_first = True
    script = (
        "docker pull plain:1; docker run -d plain:1 python3 -c 'import signal, time;"
        'signal.signal(signal.SIGTERM, lambda *_: exit(5)); open("ready", "w").close();'
        "time.sleep(60)'; docker wait worker"
    )
    answer = fleet(script)
    (name,) = answer["Instances"][0]["InstanceIds"]
    eventually(Path(str(shared._directory), f"{name}-worker", "ready").exists)
    client().terminate_instances(InstanceIds=[name], SkipOsShutdown=at_once)
    found = ended(aws, answer)
    assert found.state_reason == "Client.UserInitiatedShutdown"
    assert (found.exit_code == 5) is not at_once


def test_the_same_token_starts_nothing_twice(aws: FakeAWS) -> None:
    first = fleet("", 2, ClientToken="one")
    again = fleet("", 2, ClientToken="one")
    assert first["Instances"] == again["Instances"]
    with pytest.raises(botocore.exceptions.ClientError, match="IdempotentParameterMismatch"):
        fleet("", 3, ClientToken="one")


@pytest.mark.parametrize(
    ("script", "settings", "code"),
    [
        ("x" * 16385, {}, "limited to 16384 bytes"),
        ("", {"Type": "maintain"}, "type instant"),
        ("", {"type": "c5.large"}, "Invalid value 'c5.large'"),
    ],
)
def test_what_aws_refuses_is_refused(aws: FakeAWS, script: str, settings: Any, code: str) -> None:
    with pytest.raises(botocore.exceptions.ClientError, match=code):
        fleet(script, **settings)


def test_one_unknown_instance_fails_a_whole_call(aws: FakeAWS) -> None:
    (name,) = fleet("")["Instances"][0]["InstanceIds"]
    with pytest.raises(botocore.exceptions.ClientError, match=r"NotFound.*'i-00000000'"):
        client().terminate_instances(InstanceIds=[name, "i-00000000"])
    with pytest.raises(botocore.exceptions.ClientError, match="NotFound"):
        client().describe_instances(InstanceIds=[name, "i-00000000"])


def test_fleets_are_limited_to_the_published_rate(aws: FakeAWS) -> None:
    """Five at once, and two a second."""
    errors = []
    for _ in range(12):
        try:
            fleet("", tries=1, type="c6i.large")
        except botocore.exceptions.ClientError as exc:
            errors.append(exc.response["Error"]["Code"])
    assert len(errors) > 2
    assert set(errors) == {"RequestLimitExceeded"}


def test_a_folder_of_an_instance_goes_with_it(aws: FakeAWS, shared: FakeAWS) -> None:
    found = ended(aws, fleet("shutdown -h now"))
    directory = shared._directory
    assert directory is not None
    eventually(lambda: not Path(directory, found.instance_id).exists())
