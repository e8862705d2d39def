"""Explains errors of AWS and of its SDK, and says what to do about each."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import botocore.exceptions

__all__ = [
    "EXPIRED",
    "NO_CREDENTIALS",
    "THROTTLES",
    "make_service_role",
    "remedy_of_credentials",
    "remedy_of_refusal",
]

THROTTLES = (
    "TooManyRequestsException",
    "ThrottlingException",
    "Throttling",
    "RequestLimitExceeded",
    "SlowDown",
)
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
NO_CREDENTIALS: tuple[type[Exception], ...] = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.ProfileNotFound,
    botocore.exceptions.TokenRetrievalError,
    botocore.exceptions.SSOError,
    # Raised for `aws login`, which older SDKs do not know.
    getattr(botocore.exceptions, "LoginError", botocore.exceptions.SSOError),
)
"""Errors of the SDK if it finds no credentials, or cannot renew them."""

_DENIED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation")
_UNKNOWN = (
    "AuthFailure",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
)
_UNSIGNED = ("SignatureDoesNotMatch", "InvalidSignatureException")
_SKEWED = re.compile(r"signature (expired|not yet current)", re.I)
_SKEW_ALLOWED = 300.0
"""Seconds by which a clock may differ. IAM User Guide, "Signature Version 4"."""
_ORGANIZATION = re.compile(r"(service|resource) control policy|declarative policy", re.I)
_EXPLICIT = re.compile(r"explicit deny in (an? [a-z -]*?policy|a permissions boundary)", re.I)
_BOUNDARY = re.compile(r"no permissions boundary allows", re.I)
_ENCODED = re.compile(r"encoded authorization failure message: (\S+)", re.I)
_ALWAYS_ENABLED = frozenset(
    [
        "ap-northeast-1",
        "ap-northeast-2",
        "ap-northeast-3",
        "ap-south-1",
        "ap-southeast-1",
        "ap-southeast-2",
        "ca-central-1",
        "eu-central-1",
        "eu-north-1",
        "eu-west-1",
        "eu-west-2",
        "eu-west-3",
        "sa-east-1",
        "us-east-1",
        "us-east-2",
        "us-west-1",
        "us-west-2",
    ]
)
"""Regions that are enabled in every account. AWS Account Management Reference Guide, "Enable or
disable AWS Regions in your account"."""
_SERVICE_ROLE = re.compile(r"service[- ]?linked[- ]?role|AWSServiceRoleFor", re.I)


def make_service_role(said: str, *, otherwise: str = "") -> str:
    """Return the command that creates the service-linked role that AWS misses; empty if none.

    Args:
        said: AWS's words.
        otherwise: The service to assume if the words are about a role, but name no service.

    References:
        IAM User Guide, "Create a service-linked role"; Amazon EC2 User Guide, "Service-linked role
        for Spot Instance requests".
    """
    service = otherwise
    if _SERVICE_ROLE.search(said):
        service = otherwise or "batch"
        for word, name in (("spot", "spot"), ("ecs", "ecs"), ("batch", "batch")):
            if re.search(rf"\b{word}|for{word}", said, re.I):
                service = name
                break
    if not service:
        return ""
    return f"`aws iam create-service-linked-role --aws-service-name {service}.amazonaws.com`"


def remedy_of_refusal(
    code: str,
    message: str,
    what: str,
    *,
    region: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Say what to do about an error of AWS; empty if that is not known.

    Args:
        code: AWS's code of the error.
        message: AWS's words.
        what: The call, as IAM names it.
        region: Region of the call.
        metadata: ``ResponseMetadata`` of the answer.
    """
    doubtful = (*_DENIED, *_UNKNOWN, *_UNSIGNED, *EXPIRED, "RequestTimeTooSkewed")
    # The clock is checked before the credentials, because a wrong clock makes good ones fail.
    if code in doubtful and (remedy := _clock(code, message, metadata or {})):
        return remedy
    if make := make_service_role(message):
        return f"a user who may call iam:CreateServiceLinkedRole must create it once: {make}"
    if code in EXPIRED:
        return f"the AWS credentials have expired: {_log_in()}"
    if code in THROTTLES:
        return "this account makes more calls than AWS allows: try again in a minute"
    if code in _DENIED:
        return _denied(message, what)
    if code in ("OptInRequired", "RegionDisabledException") or (
        code in _UNKNOWN and _may_be_disabled(region)
    ):
        where = region or "REGION"
        return (
            f"an account has {where} only once it is enabled: `aws account enable-region "
            f"--region-name {where}`, which takes minutes. If it is enabled, AWS does not know "
            f"these credentials: see `aws sts get-caller-identity --region us-east-1`"
        )
    if code in _UNKNOWN:
        return (
            "AWS does not know these credentials, or they were deleted: "
            "`aws sts get-caller-identity` tries them, `aws configure list` says where they "
            "come from"
        )
    if code in _UNSIGNED:
        return (
            "the secret access key is not the one of this access key: `aws configure list` says "
            "where both come from"
        )
    return ""


def _clock(code: str, message: str, metadata: Mapping[str, Any]) -> str:
    """Say that this machine's clock is wrong, if the time in AWS's answer shows that."""
    try:
        date = parsedate_to_datetime(metadata.get("HTTPHeaders", {}).get("date", ""))
        ahead = time.time() - date.timestamp()
    except (TypeError, ValueError):
        ahead = 0.0
    if abs(ahead) <= _SKEW_ALLOWED:
        if not (code == "RequestTimeTooSkewed" or _SKEWED.search(message)):
            return ""
        how = "is wrong"
    else:
        minutes = f"{abs(ahead) / 60:.0f} minutes"
        how = f"is {minutes} {'ahead of' if ahead > 0 else 'behind'} that of AWS"
    return (
        f"the clock of this machine {how}, and AWS refuses requests that are signed with such "
        f"a time: set the clock (`timedatectl set-ntp true`, or restart the virtual machine)"
    )


def _may_be_disabled(region: str) -> bool:
    other = region.startswith(("us-gov-", "cn-", "us-iso", "eu-iso", "eusc-"))
    return bool(region) and not other and region not in _ALWAYS_ENABLED


def _denied(message: str, what: str) -> str:
    if _ORGANIZATION.search(message):
        return (
            f"a policy of your AWS organization forbids {what} in this account or region: no "
            f"policy of your own can allow it, so ask an administrator of the organization, or use "
            f"another region"
        )
    if _BOUNDARY.search(message):
        return f"the permissions boundary of these credentials does not allow {what}"
    if found := _EXPLICIT.search(message):
        return (
            f"a statement with the effect Deny in {found[1]} forbids {what}: no other statement "
            f"can allow it, so that statement must change"
        )
    remedy = (
        f"these credentials may not call {what}: `cloudexec policy` prints what is needed, "
        f"`aws sts get-caller-identity` says who you are"
    )
    if _ENCODED.search(message):
        remedy += (
            ", and `aws sts decode-authorization-message --encoded-message ...` says what "
            "forbids it"
        )
    return remedy


def remedy_of_credentials(error: Exception) -> str:
    """Say what to do if the SDK has no usable credentials."""
    name = type(error).__name__
    if isinstance(error, botocore.exceptions.ProfileNotFound):
        return "set AWS_PROFILE to a profile that `aws configure list-profiles` shows, or unset it"
    if name.startswith("Login"):
        return _log_in("aws login")
    if isinstance(error, botocore.exceptions.SSOError | botocore.exceptions.TokenRetrievalError):
        return _log_in("aws sso login")
    return "log in (`aws login`, `aws sso login`, `aws configure`) or set AWS_PROFILE"


def _log_in(command: str = "") -> str:
    """Say how to log in again, and whether a running program uses the new credentials."""
    profile = os.environ.get("AWS_PROFILE", "")
    option = f" --profile {profile}" if profile else ""
    if not command and os.environ.get("AWS_ACCESS_KEY_ID"):
        return (
            "they are in the environment of this program (AWS_ACCESS_KEY_ID), which cannot be "
            "changed from outside: end the program, set new ones, and start it again"
        )
    commands = [command] if command else ["aws sso login", "aws login"]
    shown = " or ".join(f"`{each}{option}`" for each in commands)
    return f"log in again with {shown}; a running program reads the new credentials by itself"
