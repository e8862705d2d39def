"""Functions of AWS Lambda: made once for each content, found again by name, and invoked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.function_requests import (
    EVENT_AGE,
    FunctionSpec,
    function_name,
    function_request,
)
from cloudexec._aws.names import DEFINITION_PREFIX, TAG_STACK
from cloudexec._errors import AwsError

__all__ = [
    "AccountLimits",
    "limits_of_account",
    "ensure_function",
    "functions_of_stack",
    "invoke",
    "is_gone",
    "is_not_ready",
    "reserved_concurrency",
]

_POLL = 1.0
"""Seconds between two looks at a function that is being prepared."""
_OLD = 90 * 24 * 3600.0
"""Seconds after which a function is removed when another one is made."""
_GONE = "ResourceNotFoundException"
_NOT_READY = ("ResourceNotReadyException", "ResourceConflictException", "CodeArtifactUserPending")
"""What Invoke says of a function that is being prepared, at first and after weeks without use. AWS
Lambda API Reference, "Invoke"; Developer Guide, "Lambda function states"."""
_SOON = ("cannot be assumed by Lambda",)
"""What CreateFunction says of a role that was made a moment ago."""
_IMAGES = ("image", "Image", "ECR", "manifest")


@dataclass(frozen=True, slots=True)
class AccountLimits:
    """How many invocations there may be at once, and how much code."""

    account: int
    """Of all functions of the region together."""
    unreserved: int
    """Of those for which none are reserved."""
    stored: int = 0
    """Bytes of all archives of functions in the region."""
    storage: int = 0
    """How many bytes these may have; 0: AWS does not say."""


def is_gone(exc: AwsError) -> bool:
    """Whether there is no such function."""
    return exc.code == _GONE


def is_not_ready(exc: AwsError) -> bool:
    """Whether a function is being prepared, and can be invoked soon."""
    return exc.code.startswith(_NOT_READY)


async def ensure_function(
    clients: AwsClients, spec: FunctionSpec, code: Callable[[], Awaitable[Mapping[str, Any]]]
) -> str:
    """Return the name of the function with this content, ready; make it if there is none.

    Args:
        clients: Calls to AWS.
        spec: The function.
        code: Returns the archive for a function that is made, as ``archive_code`` does; nothing for
            an image.

    Raises:
        AwsError: If AWS refuses, or cannot prepare the function.
    """
    name = function_name(spec)
    found = await _look(clients, name)
    if found is not None and found.get("State") == "Failed":
        # What has failed stays so: it is made anew, and AWS says why if it fails again.
        await clients.call("lambda", "delete_function", FunctionName=name)
        found = None
    if found is None:
        await _remove_old(clients, spec, name)
        request = function_request(spec, await code())
        try:
            await clients.call("lambda", "create_function", **request)
        except AwsError as exc:
            if exc.code != "ResourceConflictException":  # another program makes it now
                raise _explained(exc) from exc
    found = await _look(clients, name)
    while found is not None and found.get("State") == "Pending":
        await asyncio.sleep(_POLL)
        found = await _look(clients, name)
    if found is None or found.get("State") == "Failed":
        raise _failed(name, found or {})
    # An event is delivered once, and not when nobody waits for it any more.
    await clients.call(
        "lambda",
        "put_function_event_invoke_config",
        FunctionName=name,
        MaximumRetryAttempts=0,
        MaximumEventAgeInSeconds=EVENT_AGE,
    )
    await _reserve(clients, name, spec.reserved)
    return name


async def _remove_old(clients: AwsClients, spec: FunctionSpec, name: str) -> None:
    """Remove functions of the same stack that were made long ago, so that they do not pile up.

    An executor that still uses one makes it again. Whoever may not do that leaves them.
    """
    prefix = name[: -len(name.rpartition("-")[2])]
    try:
        names = [
            each["FunctionName"]
            async for each in clients.pages("lambda", "list_functions", "Functions")
            if each["FunctionName"].startswith(prefix)
            and "-" not in each["FunctionName"][len(prefix) :]
            and _age(each.get("LastModified", "")) > _OLD
            and each.get("Role") == spec.role
        ]
        for each in names:
            await clients.call("lambda", "delete_function", FunctionName=each)
    except AwsError as exc:
        if exc.expired:
            raise


def _age(made: str) -> float:
    """Return the age of a function in seconds; 0: it does not say."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(made)).total_seconds()
    except (TypeError, ValueError):
        return 0.0


async def _look(clients: AwsClients, name: str) -> Mapping[str, Any] | None:
    try:
        found: Mapping[str, Any] = await clients.call(
            "lambda", "get_function_configuration", FunctionName=name
        )
    except AwsError as exc:
        if not is_gone(exc):
            raise
        return None
    return found


async def _reserve(clients: AwsClients, name: str, wanted: int | None) -> None:
    """Reserve concurrency, or end a stop: whoever starts an executor wants workers again."""
    if wanted is not None:
        try:
            await clients.call(
                "lambda",
                "put_function_concurrency",
                FunctionName=name,
                ReservedConcurrentExecutions=wanted,
            )
        except AwsError as exc:
            if exc.code != "InvalidParameterValueException":
                raise
            raise AwsError(
                f"AWS Lambda cannot reserve {wanted} invocations: {exc.message}; give a smaller "
                f"reserved_concurrency=, or leave it out",
                code=exc.code,
                operation=exc.operation,
            ) from exc
    elif await reserved_concurrency(clients, name) == 0:
        await clients.call("lambda", "delete_function_concurrency", FunctionName=name)


async def reserved_concurrency(clients: AwsClients, name: str) -> int | None:
    """Return how many invocations of a function there may be; ``None``: nothing says so."""
    answer = await clients.call("lambda", "get_function_concurrency", FunctionName=name)
    found = answer.get("ReservedConcurrentExecutions")
    return None if found is None else int(found)


async def limits_of_account(clients: AwsClients) -> AccountLimits:
    """Return the limits of the account in this region.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    answer = await clients.call("lambda", "get_account_settings")
    limit = answer["AccountLimit"]
    return AccountLimits(
        account=int(limit["ConcurrentExecutions"]),
        unreserved=int(limit["UnreservedConcurrentExecutions"]),
        stored=int(answer.get("AccountUsage", {}).get("TotalCodeSize", 0)),
        storage=int(limit.get("TotalCodeSize", 0)),
    )


async def invoke(clients: AwsClients, name: str, event: bytes) -> str:
    """Have an event delivered, later and once; return the id of the invocation.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    client = await clients.client("lambda")
    with clients.observed("lambda", "Invoke", {"FunctionName": name}, client):
        answer = await client.invoke(FunctionName=name, InvocationType="Event", Payload=event)
        # Nothing is in there. But a connection is kept for it until it was read.
        async with answer["Payload"] as nothing:
            await nothing.read()
    return str(answer["ResponseMetadata"]["RequestId"])


async def functions_of_stack(
    clients: AwsClients, stack: str, roles: tuple[str, ...] = ()
) -> AsyncIterator[str]:
    """Yield the names of our functions of a stack, known by their tag or by the stack's roles.

    Args:
        clients: Where.
        stack: Its name.
        roles: Names of its roles.

    Raises:
        AwsError: If AWS refuses.
    """
    async for each in clients.pages("lambda", "list_functions", "Functions"):
        if not each["FunctionName"].startswith(DEFINITION_PREFIX):
            continue
        if each.get("Role", "").rpartition("/")[2] in roles:
            yield each["FunctionName"]
            continue
        try:
            answer = await clients.call("lambda", "list_tags", Resource=each["FunctionArn"])
        except AwsError as exc:
            if not is_gone(exc):
                raise
            continue
        if answer.get("Tags", {}).get(TAG_STACK) == stack:
            yield each["FunctionName"]


def _explained(exc: AwsError) -> AwsError:
    """Return the error of CreateFunction with what to do about it."""
    said = exc.message
    if "access the ECR image" in said:
        # Which is about Lambda's own rights, and not about those of these credentials.
        said = said.partition("; these credentials")[0]
    if any(each in said for each in _SOON):
        # It is told that a role exists sooner than everybody knows of it.
        return AwsError(said, code=exc.code, operation=exc.operation, transient=True)
    remedy = ""
    if "less than or equal to 3008" in said or ("3008" in said and "MemorySize" in said):
        remedy = (
            "this account has functions of 3008 MiB at most: give memory='3008MiB' or less, or "
            "ask AWS Support for more"
        )
    elif exc.code == "CodeStorageExceededException":
        remedy = (
            "delete functions and versions that nobody uses, ask for more (Service Quotas, AWS "
            "Lambda, Function and layer storage), or give package='image'"
        )
    elif "ipped size" in said:
        remedy = "leave packages out (exclude=), or give package='image'"
    elif "runtime parameter" in said:
        remedy = "package='image' needs no runtime of AWS Lambda"
    elif "ECR" in said or ("permission" in said and "image" in said):
        remedy = (
            "the image's repository must let AWS Lambda read it: `cloudexec up --with lambda` sees "
            "to that for the stack's own"
        )
    elif any(each in said for each in _IMAGES):
        remedy = (
            "Lambda needs an image of one architecture in Amazon ECR of the same region: "
            "packages='here' and `cloudexec image push` make such a one"
        )
    if not remedy:
        return exc
    return AwsError(
        f"{said}; {remedy}", code=exc.code, operation=exc.operation, transient=exc.transient
    )


def _failed(name: str, found: Mapping[str, Any]) -> AwsError:
    reason = found.get("StateReason") or "it is gone"
    code = found.get("StateReasonCode", "")
    remedy = "`cloudexec doctor` looks at the image and the network"
    if "Image" in code:
        remedy = "push the image again (`cloudexec image push`), or give packages='here'"
    elif "Subnet" in code or "Eni" in code or "SecurityGroup" in code or "VPC" in code:
        remedy = "use other subnets, or vpc=False"
    return AwsError(
        f"AWS Lambda could not prepare the function {name}: {reason}"
        + (f" ({code})" if code else "")
        + f"; {remedy}",
        code=code or "Failed",
        operation="lambda:CreateFunction",
    )
