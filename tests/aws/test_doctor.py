"""The checks of ``cloudexec doctor``: each thing that can be wrong is named, with what to do."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudexec._aws import doctor
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.definitions import pin_image
from cloudexec._aws.doctor import Check, examine
from cloudexec._aws.profile import Profile
from cloudexec._aws.quotas import kind_of_quota
from cloudexec._aws.setup import SetupOptions, up
from cloudexec._errors import ConfigError
from cloudexec._launchers import watching
from cloudexec.cli._probe import _remedy, probe
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(60)

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PLATFORM = "linux/amd64"


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAWS]:
    """AWS, and no profiles."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path / "profiles"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")
    with FakeAWS(grace=0.5, calls_per_second=1000, stack_seconds=0.0) as fake:
        yield fake


@pytest.fixture
def profile(aws: FakeAWS) -> Profile:
    """A set-up that stands, with an image for this Python."""

    async def main() -> Profile:
        async with AwsClients() as clients:
            options = SetupOptions(max_vcpus=4)
            return await up(clients, options, lambda event: None, interval=0.01)

    profile = asyncio.run(main())
    profile = _with_image(profile, tag=f"1.2.3-py{PYTHON}-amd64-0123456789abcdef")
    aws.clear_requests()
    return profile


def _call(service: str, operation: str, **parameters: Any) -> Any:
    async def main() -> Any:
        async with AwsClients() as clients:
            return await clients.call(service, operation, **parameters)

    return asyncio.run(main())


def _with_image(profile: Profile, *, tag: str) -> Profile:
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"digest": f"sha256:{'a' * 64}", "size": 1, "mediaType": "x"},
        "layers": [],
        "annotations": {"tag": tag},
    }
    answer = _call(
        "ecr",
        "put_image",
        repositoryName=profile.repository.partition("/")[2],
        imageManifest=json.dumps(manifest),
        imageTag=tag,
    )
    digest = answer["image"]["imageId"]["imageDigest"]
    profile = profile.with_image(PYTHON, PLATFORM, f"{profile.repository}@{digest}")
    profile.save()
    return profile


def _examine(name: str = "default") -> dict[str, Check]:
    reported: list[Check] = []
    checks = asyncio.run(examine(name, reported.append))
    assert list(checks) == reported
    for check in checks:
        assert check.found, check
        assert check.remedy or check.outcome in ("ok", "skipped"), check
    return {each.name: each for each in checks}


def test_a_set_up_that_stands_has_nothing_wrong(aws: FakeAWS, profile: Profile) -> None:
    checks = _examine()
    wrong = {name: each for name, each in checks.items() if each.outcome in ("failed", "warning")}
    assert not wrong
    assert set(checks) == {
        "address",
        "compute environments",
        "credentials",
        "image",
        "key",
        "log group",
        "network",
        "profile",
        "queues",
        "region",
        "roles",
        "stack",
        "vCPU quota",
    }


def test_a_network_that_workers_cannot_start_in(aws: FakeAWS, profile: Profile) -> None:
    """The routes were changed since; or the profile says what they do not allow."""
    assert "public" in _examine()["network"].found
    dataclasses.replace(profile, assign_public_ip=False).save()
    check = _examine()["network"]
    assert check.outcome == "failed"
    assert "no use without a public address" in check.found
    assert "--public-ip" in check.remedy
    dataclasses.replace(profile, subnets=("subnet-0123456789abcdef0",)).save()
    check = _examine()["network"]
    assert check.outcome == "failed"
    assert "subnet-0123456789abcdef0" in check.found
    dataclasses.replace(profile, subnets=()).save()
    assert _examine()["network"].outcome == "skipped"


def test_instances_without_public_addresses_are_a_warning(aws: FakeAWS, profile: Profile) -> None:
    """On EC2, the subnet decides, not the job."""
    first = profile.subnets[0]
    off = {"Value": False}
    _call("ec2", "modify_subnet_attribute", SubnetId=first, MapPublicIpOnLaunch=off)
    assert _examine()["network"].outcome == "ok"
    queues = {**profile.queues, "ec2": profile.queues["fargate"]}
    dataclasses.replace(profile, queues=queues).save()
    check = _examine()["network"]
    assert check.outcome == "warning"
    assert first in check.found


def test_looking_changes_nothing(aws: FakeAWS, profile: Profile) -> None:
    """What ``doctor --dry`` calls only reads."""
    _examine()
    assert aws.requests
    for each in aws.requests:
        assert each.operation.startswith(("Describe", "Get", "List")), each.operation


def test_without_a_profile_the_remedy_is_up(aws: FakeAWS) -> None:
    checks = _examine("absent")
    assert set(checks) == {"profile"}
    assert checks["profile"].outcome == "failed"
    assert checks["profile"].remedy == "`cloudexec up --name absent`"


@pytest.mark.parametrize("name", ["Team", "../x", "local"])
def test_no_set_up_can_be_called_that(aws: FakeAWS, name: str) -> None:
    """So `cloudexec up` is not what helps."""
    assert _examine(name)["profile"].remedy == "choose another --profile"


def test_region_that_does_not_exist(aws: FakeAWS, profile: Profile) -> None:
    """It is told from a network that is down, before anything is called."""
    dataclasses.replace(profile, region="mars-1").save()
    checks = _examine()
    assert checks["region"].outcome == "failed"
    assert "'mars-1'" in checks["region"].found
    assert "default.json" in checks["region"].remedy
    assert "credentials" not in checks
    assert probe("default", tuple(checks.values()), timeout=30).outcome == "skipped"


def test_region_that_the_sdk_does_not_know_is_a_warning(aws: FakeAWS, profile: Profile) -> None:
    """It may be misspelt, or newer than the SDK."""
    dataclasses.replace(profile, region="us-mars-1").save()
    checks = _examine()
    assert checks["region"].outcome == "warning"
    assert "does not know it" in checks["region"].found
    assert checks["credentials"].outcome == "failed"


def test_expired_credentials_fail_and_the_rest_is_skipped(aws: FakeAWS, profile: Profile) -> None:
    aws.faults.expire_credentials()
    checks = _examine()
    assert checks["credentials"].outcome == "failed"
    assert "aws sso login" in checks["credentials"].remedy
    assert checks["queues"].outcome == "skipped"


def test_profile_of_another_account_is_found_out(aws: FakeAWS, profile: Profile) -> None:
    queues = {"fargate": "arn:aws:batch:us-east-1:999999999999:job-queue/q"}
    dataclasses.replace(profile, queues=queues).save()
    check = _examine()["credentials"]
    assert check.outcome == "failed"
    assert "999999999999" in check.found


def test_stack_that_is_gone(aws: FakeAWS, profile: Profile) -> None:
    dataclasses.replace(profile, stack="cloudexec-gone").save()
    check = _examine()["stack"]
    assert (check.outcome, check.found) == ("failed", "cloudexec-gone does not exist")


def test_stack_with_an_older_template(
    aws: FakeAWS, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "TEMPLATE_VERSION", "99")
    check = _examine()["stack"]
    assert check.outcome == "warning"
    assert check.remedy == "`cloudexec up --name default`"


def test_profile_that_does_not_fit_its_stack(aws: FakeAWS, profile: Profile) -> None:
    dataclasses.replace(profile, repository="elsewhere/x").save()
    assert _examine()["stack"].outcome == "warning"


def test_disabled_queue(aws: FakeAWS, profile: Profile) -> None:
    _call("batch", "update_job_queue", jobQueue=profile.queues["fargate"], state="DISABLED")
    check = _examine()["queues"]
    assert check.outcome == "failed"
    assert check.found == "fargate: VALID and DISABLED"


def test_queue_that_does_not_exist(aws: FakeAWS, profile: Profile) -> None:
    queues = {**profile.queues, "ec2": "cloudexec-default-ec2"}
    dataclasses.replace(profile, queues=queues).save()
    checks = _examine()
    assert "cloudexec-default-ec2 does not exist" in checks["queues"].found
    assert "ec2: its queue has none" in checks["compute environments"].found


def test_invalid_environment_is_shown_with_its_reason(aws: FakeAWS, profile: Profile) -> None:
    answer = _call("batch", "describe_compute_environments")
    name = next(
        each["computeEnvironmentName"]
        for each in answer["computeEnvironments"]
        if each["computeResources"]["type"] == "FARGATE"
    )
    aws.faults.service_role_broken(name)
    check = _examine()["compute environments"]
    assert check.outcome == "failed"
    assert "INVALID" in check.found
    assert "create-service-linked-role" in check.remedy
    assert "sts:AssumeRole" in check.found


def test_quota_below_what_the_stack_may_start_is_a_warning(aws: FakeAWS, profile: Profile) -> None:
    aws.faults.vcpu_quota(2)
    check = _examine()["vCPU quota"]
    assert check.outcome == "warning"
    assert "fargate 2 of 4" in check.found


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Fargate On-Demand vCPU resource count", "fargate"),
        ("Fargate Spot vCPU resource count", "fargate_spot"),
        ("Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances", "ec2"),
        ("All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests", "ec2_spot"),
        ("Running On-Demand P instances", ""),
    ],
)
def test_quotas_are_told_by_name(name: str, kind: str) -> None:
    assert kind_of_quota(name) == kind


def test_no_image_for_this_python(aws: FakeAWS, profile: Profile) -> None:
    """With a repository, executors make one."""
    images = {"2.7-linux/amd64": "x@sha256:1"}
    dataclasses.replace(profile, images=images).save()
    check = _examine()["image"]
    assert check.outcome == "ok"
    assert "2.7-linux/amd64" in check.found
    dataclasses.replace(profile, images=images, repository="").save()
    check = _examine()["image"]
    assert check.outcome == "failed"
    assert check.remedy == "`cloudexec image push --profile default`"


def test_image_that_is_not_in_the_repository(aws: FakeAWS, profile: Profile) -> None:
    profile.with_image(PYTHON, PLATFORM, f"{profile.repository}@sha256:{'0' * 64}").save()
    check = _examine()["image"]
    assert check.outcome == "failed"
    assert "not in the repository" in check.found


def test_image_by_another_host_name_of_the_registry(aws: FakeAWS, profile: Profile) -> None:
    """It is looked for as well, and its tag can be pinned."""
    repository = profile.repository.partition("/")[2]
    host = "123456789012.dkr-ecr.us-east-1.on.aws"
    profile.with_image(PYTHON, PLATFORM, f"{host}/{repository}@sha256:{'0' * 64}").save()
    assert "not in the repository" in _examine()["image"].found

    async def main() -> str:
        async with AwsClients() as clients:
            tag = f"1.2.3-py{PYTHON}-amd64-0123456789abcdef"
            return await pin_image(clients, f"{host}/{repository}:{tag}")

    assert asyncio.run(main()).startswith(f"{host}/{repository}@sha256:")


def test_image_that_was_made_for_another_python(aws: FakeAWS, profile: Profile) -> None:
    repository = profile.repository.partition("/")[2]
    tag = {"imageTag": f"1.2.3-py{PYTHON}-amd64-0123456789abcdef"}
    _call("ecr", "batch_delete_image", repositoryName=repository, imageIds=[tag])
    _with_image(profile, tag="1.2.3-py2.7-amd64-0123456789abcdef")
    check = _examine()["image"]
    assert check.outcome == "failed"
    assert "another Python" in check.found


def test_image_of_another_release_is_a_warning(
    aws: FakeAWS, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.3.0")
    check = _examine()["image"]
    assert check.outcome == "warning"
    assert "while this is cloudexec 1.3.0" in check.found


def test_image_for_arm_alone_is_a_warning(aws: FakeAWS, profile: Profile) -> None:
    """Workers are x86-64 unless they are asked to be something else."""
    image = profile.images[f"{PYTHON}-{PLATFORM}"]
    dataclasses.replace(profile, images={f"{PYTHON}-linux/arm64": image}).save()
    check = _examine()["image"]
    assert check.outcome == "warning"
    assert "need linux/amd64" in check.found


def test_image_that_is_not_pinned_is_a_warning(aws: FakeAWS, profile: Profile) -> None:
    profile.with_image(PYTHON, PLATFORM, "registry.example/worker:latest").save()
    assert "not pinned" in _examine()["image"].found


def test_role_that_does_not_exist(aws: FakeAWS, profile: Profile) -> None:
    dataclasses.replace(profile, execution_role="arn:aws:iam::123456789012:role/gone").save()
    check = _examine()["roles"]
    assert (check.outcome, check.found) == ("failed", "the execution role gone does not exist")


def test_role_that_ecs_cannot_take_on(aws: FakeAWS, profile: Profile) -> None:
    _call("iam", "create_role", RoleName="other", AssumeRolePolicyDocument="{}")
    dataclasses.replace(profile, job_role="arn:aws:iam::123456789012:role/other").save()
    assert "does not trust ecs-tasks" in _examine()["roles"].found


def test_what_may_not_be_looked_at_is_skipped(aws: FakeAWS, profile: Profile) -> None:
    """Whoever runs executors need not be allowed to read roles."""
    aws.faults.deny("GetRole")
    check = _examine()["roles"]
    assert check.outcome == "skipped"
    assert "iam:GetRole" in check.found


def test_key_that_is_gone(aws: FakeAWS, profile: Profile) -> None:
    _call(
        "secretsmanager",
        "delete_secret",
        SecretId=profile.key_secret,
        ForceDeleteWithoutRecovery=True,
    )
    assert _examine()["key"].outcome == "failed"


def test_key_that_is_none(aws: FakeAWS, profile: Profile) -> None:
    secret = {"SecretId": profile.key_secret, "SecretString": "not a key"}
    _call("secretsmanager", "put_secret_value", **secret)
    assert "not 64 hexadecimal digits" in _examine()["key"].found


def test_log_group_that_is_gone(aws: FakeAWS, profile: Profile) -> None:
    _call("logs", "delete_log_group", logGroupName=profile.log_group)
    assert _examine()["log group"].outcome == "failed"


def test_queues_without_a_stack_can_be_checked(aws: FakeAWS) -> None:
    theirs = aws.set_up("theirs")
    Profile(
        name="by-hand",
        region=aws.region,
        queues={"fargate": theirs.queue},
        execution_role=theirs.execution_role,
        images={f"{PYTHON}-{PLATFORM}": f"registry.example/worker@sha256:{'0' * 64}"},
    ).save()
    checks = _examine("by-hand")
    assert checks["stack"].outcome == "skipped"
    assert checks["key"].outcome == "skipped"
    assert checks["queues"].outcome == checks["compute environments"].outcome == "ok"


def test_probe_is_not_tried_where_it_cannot_succeed(aws: FakeAWS) -> None:
    failed = Check(name="image", outcome="failed", found="there is none", remedy="push one")
    check = probe("default", (failed,), timeout=30)
    assert (check.outcome, check.found) == (
        "skipped",
        "cannot succeed before this is repaired: image",
    )
    assert not aws.jobs()


def test_probe_worker_dials_back(aws: FakeAWS, profile: Profile) -> None:
    check = probe("default", (), timeout=30)
    assert check.outcome == "ok", check.found
    assert "ran a task" in check.found
    assert len(aws.jobs()) == 1


def _pass(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def _join(near: socket.socket, port: int) -> None:
    with near, socket.create_connection(("127.0.0.1", port)) as far:
        back = threading.Thread(target=_pass, args=(far, near))
        back.start()
        _pass(near, far)
        back.join()


def _forward(listener: socket.socket, port: int, joined: list[threading.Thread]) -> None:
    """Do what a router does: pass connections on to another port."""
    with contextlib.suppress(OSError):
        while True:
            joined.append(threading.Thread(target=_join, args=(listener.accept()[0], port)))
            joined[-1].start()


@pytest.mark.parametrize("by", ["variables", "options"])
def test_probe_worker_comes_through_a_forwarded_port(
    aws: FakeAWS, profile: Profile, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Workers dial one port, and another one is listened on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as router:
        joined: list[threading.Thread] = []
        forwarding = threading.Thread(target=_forward, args=(router, port, joined))
        forwarding.start()
        advertise = f"127.0.0.1:{router.getsockname()[1]}"
        listen = f"127.0.0.1:{port}"
        options = {"advertise": advertise, "listen": listen}
        if by == "variables":
            monkeypatch.setenv("CLOUDEXEC_ADVERTISE", advertise)
            monkeypatch.setenv("CLOUDEXEC_LISTEN", listen)
            options = {}
        checks = asyncio.run(examine("default", lambda check: None, **options))
        (found,) = [each.found for each in checks if each.name == "address"]
        assert found.startswith(f"workers are told to dial {advertise}: ")
        assert found.endswith(f"listens on {listen}")
        check = probe("default", checks, timeout=30, **options)
        router.shutdown(socket.SHUT_RDWR)
        forwarding.join()
        for each in joined:
            each.join()
    assert check.outcome == "ok", check.found


@pytest.mark.alone
def test_probe_asks_for_one_worker_and_waits_no_longer_than_told(
    aws: FakeAWS, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not come is not asked for again: each would cost."""
    monkeypatch.setattr(watching, "_DIAGNOSE_AFTER", 0.2)
    monkeypatch.setattr(watching, "_DIAGNOSE_EVERY", 0.2)
    aws.faults.no_capacity()
    for probes, timeout in enumerate((2, 6, 18), 1):
        began = time.monotonic()
        check = probe("default", (), timeout=timeout)
        took = time.monotonic() - began
        assert check.outcome == "failed"
        assert check.found.startswith(f"no worker dialed back within {timeout} s")
        assert len(aws.jobs()) == probes
        if "AWS has no capacity" in check.found:
            break  # on a busy machine it is not known yet that early
    assert took < 3 * timeout
    assert check.found.startswith(f"no worker dialed back within {timeout} s; AWS has no capacity")
    assert check.remedy.startswith("repair what the message names")


@pytest.mark.parametrize(
    ("reason", "is_network"),
    [
        ("no worker dialed back within 600 s", True),
        ("the worker started, but could not reach this process", True),
        ("no worker dialed back within 600 s: 1 worker runs, but did not dial back yet", True),
        ("no worker dialed back within 600 s: 1 worker waits for capacity", False),
        ("the worker's image cannot be pulled", False),
    ],
)
def test_what_a_failed_probe_advises_is_about_its_cause(
    profile: Profile, reason: str, is_network: bool
) -> None:
    """Only who cannot be reached is told how to be, with the group to join."""
    assert (profile.security_group in _remedy("default", reason)) is is_network


def test_an_aws_profile_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No traceback of the SDK's."""
    monkeypatch.setenv("AWS_PROFILE", "nothere")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"nothere.*AWS_PROFILE"):
        AwsClients("us-east-1")
