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
    WorkerSize,
    array_sizes,
    default_memory,
    fargate_memories,
    fargate_size,
    parse_memory,
)
from cloudexec._aws.requests import DefinitionSpec, definition_request, submit_request, tag_value

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
        "retry_reclaimed": True,
        **changes,
    }
    return submit_request(**settings)


@given(st.integers(0, 60_000))
def test_a_launch_is_split_into_as_few_jobs_as_hold_it(workers: int) -> None:
    """No job is empty or larger than AWS allows, and none is missing."""
    sizes = array_sizes(workers)
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
    assert array_sizes(workers) == sizes


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


def test_retry_rules_tell_what_aws_did_from_what_the_worker_did() -> None:
    """AWS runs again what it took back or could not start; the rest is the executor's."""
    rules = submission()["retryStrategy"]["evaluateOnExit"]
    assert [rule["action"] for rule in rules] == ["RETRY"] * 4 + ["EXIT"]
    left_to_us = submission(retry_reclaimed=False)["retryStrategy"]["evaluateOnExit"]
    assert [rule["action"] for rule in left_to_us] == ["EXIT", "EXIT", "RETRY", "RETRY", "EXIT"]
    assert len(rules) <= 5


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
    [("2GiB", 2048), ("512 MiB", 512), ("1.5g", 1536), ("1T", 2**20), (300, 300), ("1KiB", 1)],
)
def test_memory_as_people_write_it(text: str | int, mib: int) -> None:
    """Units count in powers of 1024, and fractions round up."""
    assert parse_memory(text) == mib


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
