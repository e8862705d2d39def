"""What AWS answers on the first day in a real account, and what we say to do about it."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate
from pathlib import Path

import botocore.exceptions
import pytest

from cloudexec._aws.clients import AwsClients, translated
from cloudexec._errors import AwsError
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(60)

USER = "User: arn:aws:iam::123456789012:user/u is not authorized to perform: batch:SubmitJob"


@pytest.fixture(autouse=True)
def no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine's user has set up must not matter."""
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)


def refused(code: str, message: str, *, region: str = "us-east-1", ahead: float = 0.0) -> AwsError:
    """Return our error for an answer of AWS, on a machine whose clock is so far ahead."""
    answer = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {
            "HTTPStatusCode": 403,
            "HTTPHeaders": {"date": formatdate(time.time() - ahead, usegmt=True)},
        },
    }
    with pytest.raises(AwsError) as caught, translated("batch", "SubmitJob", region=region):
        raise botocore.exceptions.ClientError(answer, "SubmitJob")
    return caught.value


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("RequestTimeTooSkewed", "The difference between the request time and ... is too large."),
        ("SignatureDoesNotMatch", "Signature expired: 20261129T1000Z is now earlier than ..."),
        ("InvalidSignatureException", "Signature not yet current: 20261129T1000Z is still later"),
        ("AuthFailure", "AWS was not able to validate the provided access credentials"),
        ("RequestExpired", "Request has expired."),
    ],
)
def test_a_wrong_clock_is_told_from_wrong_credentials(code: str, message: str) -> None:
    """The answer has the right time: services name the cause in different ways, or not at all."""
    text = str(refused(code, message, ahead=720.0))
    assert "the clock of this machine is 12 minutes ahead of that of AWS" in text
    assert "may not call" not in text
    assert "log in" not in text


def test_a_clock_that_was_set_meanwhile_is_still_named() -> None:
    text = str(refused("RequestTimeTooSkewed", "The difference is too large."))
    assert "the clock of this machine is wrong" in text


@pytest.mark.parametrize(
    ("message", "words", "not_words"),
    [
        (
            f"{USER} on resource: x with an explicit deny in a service control policy",
            "a policy of your AWS organization forbids batch:SubmitJob",
            "cloudexec policy",
        ),
        (
            f"{USER} because no service control policy allows the batch:SubmitJob action",
            "a policy of your AWS organization forbids batch:SubmitJob",
            "cloudexec policy",
        ),
        (
            f"{USER} with an explicit deny in an identity-based policy",
            "a statement with the effect Deny in an identity-based policy forbids",
            "cloudexec policy",
        ),
        (
            f"{USER} because no permissions boundary allows the batch:SubmitJob action",
            "the permissions boundary of these credentials does not allow batch:SubmitJob",
            "cloudexec policy",
        ),
        (
            f"{USER} because no identity-based policy allows the batch:SubmitJob action",
            "`cloudexec policy` prints what is needed",
            "organization",
        ),
        (
            "You are not authorized. Encoded authorization failure message: abc",
            "aws sts decode-authorization-message",
            "organization",
        ),
    ],
)
def test_who_has_denied_it_is_named(message: str, words: str, not_words: str) -> None:
    """To allow more in one's own policy is of no use against a denial of somebody else's."""
    text = str(refused("AccessDeniedException", message))
    assert words in text
    assert not_words not in text


def test_a_region_that_the_account_has_not_enabled() -> None:
    """AWS answers as for credentials that it does not know."""
    said = "The security token included in the request is invalid."
    text = str(refused("UnrecognizedClientException", said, region="eu-south-2"))
    assert "aws account enable-region --region-name eu-south-2" in text
    text = str(refused("UnrecognizedClientException", said, region="eu-central-1"))
    assert "enable-region" not in text
    assert "AWS does not know these credentials" in text
    assert "enable-region" in str(refused("OptInRequired", "", region="me-south-1"))


@pytest.mark.parametrize(
    ("said", "service"),
    [
        (
            "The provided credentials do not have permission to create the service-linked role for "
            "EC2 Spot Instances.",
            "spot",
        ),
        (
            "Unable to assume the service linked role. Please verify that the ECS service linked "
            "role exists.",
            "ecs",
        ),
        (f"{USER} iam:CreateServiceLinkedRole on AWSServiceRoleForBatch", "batch"),
    ],
)
def test_a_missing_service_linked_role_comes_with_the_command(said: str, service: str) -> None:
    text = str(refused("AccessDeniedException", said))
    assert f"aws iam create-service-linked-role --aws-service-name {service}.amazonaws.com" in text


@pytest.mark.parametrize(
    ("error", "command"),
    [
        (botocore.exceptions.UnauthorizedSSOTokenError(), "`aws sso login --profile team`"),
        (
            botocore.exceptions.TokenRetrievalError(provider="sso", error_msg="expired"),
            "`aws sso login --profile team`",
        ),
        (botocore.exceptions.LoginRefreshRequired(), "`aws login --profile team`"),
        (botocore.exceptions.LoginTokenLoadError(error_msg="gone"), "`aws login --profile team`"),
    ],
)
def test_a_session_that_ends_in_mid_run_is_waited_for(
    error: Exception, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever logs in again lets the program go on: so it tries again, and says how."""
    monkeypatch.setenv("AWS_PROFILE", "team")
    with pytest.raises(AwsError) as caught, translated("batch", "SubmitJob"):
        raise error
    assert caught.value.may_pass
    assert command in str(caught.value)
    assert "reads the new credentials by itself" in str(caught.value)


def test_expired_credentials_of_the_environment_cannot_be_renewed_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    text = str(refused("ExpiredToken", "The security token included in the request is expired"))
    assert "start it again" in text
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    text = str(refused("ExpiredToken", "The security token included in the request is expired"))
    assert "`aws sso login` or `aws login`" in text


def test_aws_region_counts_as_with_other_sdks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    assert AwsClients().region == "eu-west-3"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    assert AwsClients().region == "eu-west-3"
    assert AwsClients("us-east-2").region == "us-east-2"
    monkeypatch.delenv("AWS_REGION")
    assert AwsClients().region == "us-west-2"


def test_an_endpoint_of_one_service_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs that are submitted on this machine have workers here, which dial loopback."""
    # Undone before the account ends, or its address would stand in the environment of later tests.
    with FakeAWS() as aws, monkeypatch.context() as patch:
        patch.delenv("AWS_ENDPOINT_URL")
        patch.setenv("AWS_ENDPOINT_URL_BATCH", aws.endpoint_url)

        async def main() -> None:
            async with AwsClients() as clients:
                assert clients.endpoint == aws.endpoint_url
                assert not clients.endpoint_of("sts")
                assert (await clients.call("batch", "describe_job_queues"))["jobQueues"] == []

        asyncio.run(main())
    (tmp_path / "config").write_text(
        "[default]\nregion = us-east-1\nservices = here\n"
        "[services here]\nbatch =\n  endpoint_url = http://127.0.0.1:9\n"
    )
    assert AwsClients().endpoint == "http://127.0.0.1:9"
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert not AwsClients().endpoint
