"""Requests to AWS as data: the shapes that the SDK's own model and AWS's limits allow."""

from __future__ import annotations

import json
from typing import Any

import botocore.loaders
import botocore.model
import botocore.validate
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudexec import ConfigError
from cloudexec._aws.limits import (
    ARRAY_LARGEST,
    WorkerSize,
    default_memory,
    fargate_memories,
    fargate_size,
    instance_size,
    parse_memory,
)
from cloudexec._aws.requests import (
    DefinitionSpec,
    check_tags,
    definition_request,
    submit_request,
    tag_value,
)
from cloudexec._launchers.fleet import job_sizes
from cloudexec.testing._aws.jobs import Attempt, RetryRule

LARGE = {f"VARIABLE_{n}": "x" * 100 for n in range(100)}


def assert_fits_the_model(operation: str, request: dict[str, Any]) -> None:
    """Check a request with the SDK's model of the API, which knows every member and bound."""
    loaded = botocore.loaders.Loader().load_service_model("batch", "service-2")
    model = botocore.model.ServiceModel(loaded).operation_model(operation)
    assert model.input_shape is not None
    report = botocore.validate.ParamValidator().validate(request, model.input_shape)
    assert not report.has_errors(), report.generate_report()


def submission(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "name": "cloudexec-0123456789abcdef-1",
        "queue": "queue",
        "definition": "arn:aws:batch:us-east-1:123456789012:job-definition/cloudexec-a:1",
        "workers": 10,
        "size": WorkerSize(memory_mib=2048, vcpus=1),
        "environment": {"CLOUDEXEC_TARGET": "10.0.0.1:8765"},
        "tags": {"cloudexec:executor": "0123456789abcdef"},
        "attempt_seconds": 86400,
        "compute": "fargate",
        "retry_reclaimed": True,
        **changes,
    }
    return submit_request(**settings)


@given(st.integers(0, 60_000))
def test_a_launch_is_split_into_as_few_jobs_as_hold_it(workers: int) -> None:
    """No job is empty or larger than AWS allows, and none is missing."""
    sizes = job_sizes(workers, ARRAY_LARGEST)
    assert sum(sizes) == workers
    assert all(1 <= size <= 10_000 for size in sizes)
    assert len(sizes) == -(-workers // 10_000)


@pytest.mark.parametrize(
    ("workers", "sizes"),
    [
        (0, []),
        (1, [1]),
        (2, [2]),
        (10_000, [10_000]),
        (10_001, [10_000, 1]),
        (20_000, [10_000, 10_000]),
    ],
)
def test_the_edges_of_an_array_job(workers: int, sizes: list[int]) -> None:
    """A multiple of the largest array leaves no empty job behind; a rest of one is a plain job."""
    assert job_sizes(workers, ARRAY_LARGEST) == sizes


@pytest.mark.parametrize("workers", [1, 2, 10_000])
def test_submissions_fit_the_model(workers: int) -> None:
    """Whatever the number of workers."""
    request = submission(workers=workers)
    assert_fits_the_model("SubmitJob", request)
    assert ("arrayProperties" in request) == (workers > 1)
    assert len(json.dumps(request)) < 4096


@pytest.mark.parametrize("compute", ["fargate", "ec2"])
@pytest.mark.parametrize("arch", ["x86_64", "arm64"])
def test_definitions_fit_the_model(compute: str, arch: str) -> None:
    """Also without any of what is optional; EC2 has none of what is Fargate's alone."""
    full = DefinitionSpec(
        image="example.com/worker@sha256:" + "0" * 64,
        compute=compute,
        arch=arch,
        execution_role="arn:aws:iam::123456789012:role/execution",
        job_role="arn:aws:iam::123456789012:role/job",
        key_secret="arn:aws:secretsmanager:us-east-1:123456789012:secret:key",
        log_group="/cloudexec/x",
        region="us-east-1",
        ephemeral_gib=50,
        stack="cloudexec-default",
    )
    request = definition_request(full)
    assert_fits_the_model("RegisterJobDefinition", request)
    container = request["containerProperties"]
    fargate = {"networkConfiguration", "fargatePlatformConfiguration", "ephemeralStorage"}
    assert (fargate <= container.keys()) == (compute == "fargate")
    assert container["secrets"] == [{"name": "CLOUDEXEC_KEY", "valueFrom": full.key_secret}]


def test_a_definition_is_named_by_its_content() -> None:
    """The same content has the same name, and another image another."""
    spec = DefinitionSpec(image="a", execution_role="r")
    other = DefinitionSpec(image="b", execution_role="r")
    names = {definition_request(each)["jobDefinitionName"] for each in (spec, spec, other)}
    assert len(names) == 2


PULL = "CannotPullContainerError: pull image manifest has been retried 1 time(s): 503"
SET_UP = "ResourceInitializationError: unable to pull secrets or registry auth"
EXITED = "Essential container in task exited"


def what_aws_does(compute: str, retry_reclaimed: bool, end: tuple[str, str, int | None]) -> str:
    """Apply the retry rules to an attempt: its status reason, its container's, its exit code."""
    request = submission(compute=compute, retry_reclaimed=retry_reclaimed)
    assert_fits_the_model("SubmitJob", request)
    status_reason, reason, exit_code = end
    attempt = Attempt(
        exit_code=exit_code,
        reason=reason or None,
        status_reason=status_reason or None,
        task_arn=None,
        log_stream=None,
        instance_arn=None,
        started_at=None,
        stopped_at=None,
    )
    rules = request["retryStrategy"]["evaluateOnExit"]
    assert len(rules) <= 5, "AWS takes no more"
    for rule in rules:
        found = RetryRule(
            action=rule["action"],
            on_status_reason=rule.get("onStatusReason"),
            on_reason=rule.get("onReason"),
            on_exit_code=rule.get("onExitCode"),
        )
        if found.fits(attempt):
            return found.action
    return "RETRY"


@pytest.mark.parametrize("compute", ["fargate", "ec2"])
@pytest.mark.parametrize("retry_reclaimed", [True, False])
@pytest.mark.parametrize(
    ("end", "action"),
    [
        ((PULL, "", None), "RETRY"),
        ((SET_UP, "", None), "RETRY"),
        (("Task failed to start", PULL, None), "RETRY"),
        (("Task failed to start", SET_UP, None), "RETRY"),
        ((EXITED, "", 0), "EXIT"),
        ((EXITED, "", 4), "EXIT"),
        ((EXITED, "OutOfMemoryError: Container killed due to memory usage", 137), "EXIT"),
        (("Container Overrides length must be at most 8192", "", None), "EXIT"),
    ],
)
def test_retry_rules_tell_what_aws_did_from_what_the_worker_did(
    compute: str, retry_reclaimed: bool, end: tuple[str, str, int | None], action: str
) -> None:
    """AWS starts again what it could not start, whichever field says so; the rest is ours."""
    assert what_aws_does(compute, retry_reclaimed, end) == action


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        ("fargate", "Your Spot Task was interrupted."),
        ("ec2", "Host EC2 (instance i-0123456789abcdef0) terminated."),
    ],
)
def test_aws_starts_what_it_took_back_again_unless_that_is_ours(compute: str, reason: str) -> None:
    """With ``spot="prefer"`` the executor says where it runs next."""
    assert what_aws_does(compute, True, (reason, "", 143)) == "RETRY"
    assert what_aws_does(compute, False, (reason, "", 143)) == "EXIT"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"environment": LARGE}, "environment of a worker"),
        ({"environment": {"AWS_BATCH_X": "1"}}, "AWS_BATCH"),
        ({"environment": {"a b": "1"}}, "a b"),
        ({"workers": 10_001}, "10000"),
        ({"workers": 0}, "10000"),
        ({"name": "-x"}, "-x"),
        ({"tags": {str(n): "" for n in range(51)}}, "50 tags"),
    ],
)
def test_what_aws_would_refuse_is_refused_here(changes: dict[str, Any], words: str) -> None:
    """Also what it would take and then let fail: more than 8192 characters of overrides."""
    with pytest.raises(ConfigError, match=words):
        submission(**changes)


def test_a_time_limit_is_never_below_what_aws_takes() -> None:
    """A minute is the least."""
    assert submission(attempt_seconds=5)["timeout"] == {"attemptDurationSeconds": 60}


def test_fargate_needs_an_execution_role() -> None:
    """The error says where to get one."""
    with pytest.raises(ConfigError, match=r"execution_role.*cloudexec up"):
        definition_request(DefinitionSpec(image="a"))


@pytest.mark.parametrize(
    ("text", "mib"),
    [
        *[("2GiB", 2048), ("512 MiB", 512), ("1.5g", 1536), ("1T", 2**20), (300, 300), ("1KiB", 1)],
        *[("2GB", 1908), ("512 MB", 489), ("1.5gb", 1431)],
    ],
)
def test_memory_as_people_write_it(text: str | int, mib: int) -> None:
    """Units with a B alone count in powers of 1000, others of 1024, and fractions round up."""
    assert parse_memory(text) == mib


def test_a_gigabyte_is_no_size_of_fargate() -> None:
    """It is less than the GiB that was meant: the error names that."""
    with pytest.raises(ConfigError, match=r"1908 MiB; the nearest: 1 vCPU with 2 GiB"):
        fargate_size(1, "2GB")


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2 apples", 0, -5, None, True, 1.5])
def test_memory_that_cannot_be_read(text: Any) -> None:
    """The error shows what was given."""
    with pytest.raises(ConfigError, match="memory"):
        parse_memory(text)


@given(st.sampled_from([0.25, 0.5, 1, 2, 4, 8, 16, 32]))
def test_every_size_of_fargate_is_taken_as_it_is(vcpus: float) -> None:
    """And the default is one of them."""
    for memory in fargate_memories(vcpus):
        assert fargate_size(vcpus, memory) == WorkerSize(memory_mib=memory, vcpus=vcpus)
    assert default_memory(vcpus, "fargate") in fargate_memories(vcpus)


@given(st.floats(0.01, 64), st.integers(1, 400_000))
def test_any_other_size_names_ones_that_exist(vcpus: float, memory: int) -> None:
    """Whatever is asked for, the answer is a size or an error that names one."""
    try:
        size = fargate_size(vcpus, memory)
    except ConfigError as exc:
        words = str(exc)
        if "nearest" not in words:
            pytest.fail(words)
    else:
        assert memory in fargate_memories(vcpus)
        assert size.vcpus == vcpus


def test_a_tag_holds_no_character_that_aws_refuses() -> None:
    """Users have names of all kinds."""
    assert tag_value("Zoë <root>\n") == "Zoë _root__"
    assert len(tag_value("x" * 1000)) == 256


@pytest.mark.parametrize(
    ("vcpus", "memory", "words"),
    [
        (3, "6GiB", "nearest: 4 vCPU with 8 GiB, or 2 vCPU with 6 GiB"),
        (5, "200GiB", "nearest: 32 vCPU with 244 GiB, or 4 vCPU with 30 GiB"),
        (64, "500GiB", "nearest: 32 vCPU with 244 GiB"),
    ],
)
def test_vcpus_that_fargate_lacks_name_those_above_and_below(
    vcpus: float, memory: str, words: str
) -> None:
    """With the memory that was asked for, as far as it goes."""
    with pytest.raises(ConfigError, match=words):
        fargate_size(vcpus, memory)


@pytest.mark.parametrize(
    ("vcpus", "memory", "words"),
    [
        (0.5, "1GiB", "nearest: 1 vCPU with 1 GiB"),
        (1.5, "100MiB", "nearest: 1 vCPU with 256 MiB, or 2 vCPU with 256 MiB"),
        (4000, "8GiB", "nearest: 1920 vCPU with 8 GiB"),
        (float("inf"), "8GiB", "nearest: 1920 vCPU"),
    ],
)
def test_a_size_that_ec2_lacks_names_those_next_to_it(
    vcpus: float, memory: str, words: str
) -> None:
    """There, a worker has whole vCPUs, and any memory in which one can start."""
    with pytest.raises(ConfigError, match=words):
        instance_size(vcpus, memory)


def test_whole_vcpus_with_any_memory_are_a_size_on_ec2() -> None:
    """It need not be one of Fargate's."""
    assert instance_size(3, 5000) == WorkerSize(memory_mib=5000, vcpus=3)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"aws:x": "1"}, "are reserved"),
        ({"Cloudexec:user": "1"}, "are reserved"),
        ({"": "1"}, "1 to 128"),
        ({"k" * 129: "1"}, "has 129"),
        ({"k": "v" * 257}, "and 257"),
        ({"a#b": "1"}, "'#'"),
        ({"k": "a\nb"}, r"'\\n'"),
        ({str(n): "" for n in range(45)}, "45 are too many"),
    ],
)
def test_tags_that_aws_would_refuse(tags: dict[str, str], words: str) -> None:
    """Or that would take the place of ours."""
    with pytest.raises(ConfigError, match=words):
        check_tags(tags)


def test_tags_that_aws_takes() -> None:
    """Letters of any script, and as many as there is room for beside ours."""
    check_tags({"Größe +-=._:/@": "", **{str(n): "v" for n in range(43)}})


def test_a_share_of_a_queue_is_asked_for_where_there_is_one() -> None:
    """Queues without shares refuse both."""
    plain = submission()
    assert not {"shareIdentifier", "schedulingPriorityOverride"} & plain.keys()
    request = submission(share_identifier="team1", scheduling_priority=7)
    assert_fits_the_model("SubmitJob", request)
    assert request["shareIdentifier"] == "team1"
    assert request["schedulingPriorityOverride"] == 7
