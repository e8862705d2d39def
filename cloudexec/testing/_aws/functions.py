"""Answers the calls of AWS Lambda: functions that run, of images and archives, and their events."""

from __future__ import annotations

import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from cloudexec.testing._aws.backends import ACCOUNT
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.function_archives import Archives, Unpacked
from cloudexec.testing._aws.function_environments import Environment, Event, Host
from cloudexec.testing._aws.limits import ClientError
from cloudexec.testing._aws.logs import LogWriter
from cloudexec.testing._aws.timers import Timers
from cloudexec.testing._aws.token_bucket import TokenBucket
from cloudexec.testing._aws.wire import Call, Response, json_response

__all__ = ["Functions"]

_CONTROL_PER_SECOND = 15.0
_STARTS = 1000
_STARTS_PER_SECOND = 100.0
_CONCURRENCY = 1000
_NEW_CONCURRENCY = 10
_LEAST_UNRESERVED = 100
_MEMORY = (128, 10240)
_LONGEST = 900
""""Lambda quotas" and "Lambda scaling behavior", AWS Lambda Developer Guide."""
_AGE = 6 * 3600
_IMAGE = re.compile(
    r"\d{12}\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?/[a-z0-9._/-]+(?:@sha256:[0-9a-f]{64}"
    r"|:[\w.-]+)"
)
_LOOK = 0.05
"""Seconds between two looks at events that wait."""
Handler = Callable[[str, Mapping[str, Any]], Response | Mapping[str, Any]]


@dataclass(slots=True, eq=False)
class _Function:
    name: str
    arn: str
    request: Mapping[str, Any]
    made_at: float
    active_at: float
    tags: dict[str, str]
    archive: Unpacked | None = None
    failure: tuple[str, str] = ("", "")
    is_inactive: bool = False
    reserved: int | None = None
    attempts: int = 2
    age: int = _AGE
    starts: TokenBucket = field(default_factory=lambda: TokenBucket(_STARTS_PER_SECOND, _STARTS))
    events: deque[Event] = field(default_factory=deque)
    environments: list[Environment] = field(default_factory=list)

    @property
    def state(self) -> str:
        if self.is_inactive:
            return "Inactive"
        if time.time() < self.active_at:
            return "Pending"
        return "Failed" if self.failure[0] else "Active"

    @property
    def busy(self) -> int:
        return sum(each.event is not None for each in self.environments)

    @property
    def log_group(self) -> str:
        given = (self.request.get("LoggingConfig") or {}).get("LogGroup")
        return given or f"/aws/lambda/{self.name}"

    def detail(self) -> dict[str, Any]:
        """Return the function as GetFunctionConfiguration shows it."""
        given = self.request
        made = datetime.fromtimestamp(self.made_at, UTC)
        found = {
            "FunctionName": self.name,
            "FunctionArn": self.arn,
            "Role": given["Role"],
            "PackageType": given.get("PackageType", "Zip"),
            "Runtime": given.get("Runtime"),
            "Handler": given.get("Handler"),
            "CodeSize": self.archive.size if self.archive else 0,
            "CodeSha256": self.archive.sha256 if self.archive else "",
            "MemorySize": given.get("MemorySize", 128),
            "Timeout": given.get("Timeout", 3),
            "Architectures": given.get("Architectures", ["x86_64"]),
            "EphemeralStorage": given.get("EphemeralStorage", {"Size": 512}),
            "Environment": given.get("Environment"),
            "VpcConfig": given.get("VpcConfig"),
            "LoggingConfig": {"LogFormat": "Text", "LogGroup": self.log_group},
            "LastModified": f"{made:%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "+0000",
            "State": self.state,
            "LastUpdateStatus": "Successful",
        }
        if self.state == "Failed":
            found["StateReason"], found["StateReasonCode"] = self.failure
        return {key: value for key, value in found.items() if value is not None}


class Functions:
    """Answers calls about functions, and delivers their events.

    Args:
        host: What environments need.
        archives: Takes the archives of functions without an image.
        logs: Where output goes.
        faults: What goes wrong.
        credentials: Returns the variables with which a role's credentials are found.
        is_new: Whether the account has the quotas of a new one.
        registry: A registry that stands for Amazon ECR, if there is one.
        speed: Seconds of AWS per real second, for the time limit of an event.
        keep: Seconds for which an environment is kept that has nothing to do.
    """

    def __init__(
        self,
        host: Host,
        archives: Archives,
        logs: LogWriter,
        faults: Faults,
        *,
        credentials: Callable[[str], Mapping[str, str]],
        is_new: bool,
        registry: str | None = None,
        speed: float = 1.0,
        keep: float = 60.0,
    ) -> None:
        self._host = host
        self._archives = archives
        self._registry = registry
        self._logs = logs
        self._faults = faults
        self._credentials = credentials
        self._usual = _NEW_CONCURRENCY if is_new else _CONCURRENCY
        self._speed = speed
        self._keep = keep
        self._control = TokenBucket(_CONTROL_PER_SECOND)
        self._functions: dict[tuple[str, str], _Function] = {}
        self._events: list[Event] = []
        self._dying: list[Environment] = []
        self._timers = Timers()
        self._is_looking = False
        faults.functions.attach(self._starve)
        self._handlers: dict[str, Handler] = {
            "CreateFunction": self._create,
            "DeleteFunction": self._delete,
            "DeleteFunctionConcurrency": self._delete_concurrency,
            "GetAccountSettings": self._account,
            "GetFunctionConcurrency": self._get_concurrency,
            "GetFunctionConfiguration": lambda *given: self._named(*given).detail(),
            "Invoke": self._invoke,
            "ListFunctions": self._list,
            "ListTags": self._list_tags,
            "PutFunctionConcurrency": self._put_concurrency,
            "PutFunctionEventInvokeConfig": self._put_event_config,
        }

    def answer(self, call: Call) -> Response | Mapping[str, Any] | None:
        """Answer a call; ``None`` leaves it to moto."""
        handler = self._handlers.get(call.operation)
        if handler is None:
            return None
        if call.operation != "Invoke" and not self._control.take():
            raise ClientError("Rate exceeded", "TooManyRequestsException", status=429)
        with self._timers.lock:
            return handler(call.region, call.parameters)

    def events(self) -> list[Event]:
        """Return all deliveries of events so far, in the order of sending."""
        with self._timers.lock:
            return list(self._events)

    def active(self) -> list[str]:
        """Return names of all functions."""
        with self._timers.lock:
            return [each.name for each in self._functions.values()]

    def close(self) -> None:
        """End all environments."""
        with self._timers.lock:
            self._timers.stop()
            there = [each for one in self._functions.values() for each in one.environments]
            there += self._dying
        for each in there:
            each.close()
        for each in there:
            each.join()
        self._timers.join()

    # Functions.

    def _create(self, region: str, given: Mapping[str, Any]) -> Response:
        name = given["FunctionName"]
        if (refusal := self._faults.functions.refusal()) is not None:
            raise ClientError(*refusal)
        if (region, name) in self._functions:
            raise ClientError(
                f"Function already exist: {name}", "ResourceConflictException", status=409
            )
        archive = _check(region, given, self._archives, self._registry)
        size = archive.size if archive is not None else 0
        if self._stored() + size > self._faults.functions.code_storage:
            raise ClientError("Code storage limit exceeded.", "CodeStorageExceededException")
        now = time.time()
        made = _Function(
            name=name,
            arn=f"arn:aws:lambda:{region}:{ACCOUNT}:function:{name}",
            request={key: value for key, value in given.items() if key != "Code" or not archive},
            made_at=now,
            active_at=now + self._faults.functions.pending,
            tags=dict(given.get("Tags") or {}),
            archive=archive,
            failure=self._faults.functions.failure,
        )
        self._functions[region, name] = made
        return json_response(made.detail(), 201)

    def _named(self, region: str, given: Mapping[str, Any]) -> _Function:
        name = str(given.get("FunctionName") or given.get("Resource")).rpartition(":")[2]
        found = self._functions.get((region, name))
        if found is None:
            arn = f"arn:aws:lambda:{region}:{ACCOUNT}:function:{name}"
            raise ClientError(f"Function not found: {arn}", "ResourceNotFoundException", status=404)
        return found

    def _delete(self, region: str, given: Mapping[str, Any]) -> Response:
        found = self._named(region, given)
        del self._functions[region, found.name]
        # What runs goes on, and nothing starts any more.
        for each in found.events:
            each.status = "dropped"
        for environment in found.environments:
            self._dying.append(environment)
            if environment.event is None:
                environment.close()
        return Response(status=204, body=b"")

    def _list(self, region: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        mine = [each for (where, _), each in self._functions.items() if where == region]
        start, size = int(given.get("Marker") or 0), min(int(given.get("MaxItems", 50)), 50)
        page: dict[str, Any] = {"Functions": [each.detail() for each in mine[start : start + size]]}
        if start + size < len(mine):
            page["NextMarker"] = str(start + size)
        return page

    def _list_tags(self, region: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"Tags": self._named(region, given).tags}

    # Concurrency.

    @property
    def _limit(self) -> int:
        given = self._faults.functions.concurrency
        return self._usual if given is None else given

    def _unreserved(self) -> int:
        return self._limit - sum(each.reserved or 0 for each in self._functions.values())

    def _stored(self) -> int:
        return sum(each.archive.size for each in self._functions.values() if each.archive)

    def _account(self, _: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        limit = {
            "TotalCodeSize": self._faults.functions.code_storage,
            "ConcurrentExecutions": self._limit,
            "UnreservedConcurrentExecutions": self._unreserved(),
        }
        usage = {"FunctionCount": len(self._functions), "TotalCodeSize": self._stored()}
        return {"AccountLimit": limit, "AccountUsage": usage}

    def _put_concurrency(self, region: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        found, wanted = self._named(region, given), given["ReservedConcurrentExecutions"]
        left = self._unreserved() + (found.reserved or 0) - wanted
        if wanted and left < _LEAST_UNRESERVED:
            raise ClientError(
                f"Specified ReservedConcurrentExecutions for function decreases account's "
                f"UnreservedConcurrentExecution below its minimum value of [{_LEAST_UNRESERVED}].",
                "InvalidParameterValueException",
            )
        found.reserved = wanted
        return {"ReservedConcurrentExecutions": wanted}

    def _get_concurrency(self, region: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        reserved = self._named(region, given).reserved
        return {} if reserved is None else {"ReservedConcurrentExecutions": reserved}

    def _delete_concurrency(self, region: str, given: Mapping[str, Any]) -> Response:
        self._named(region, given).reserved = None
        return Response(status=204, body=b"")

    def _put_event_config(self, region: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        found = self._named(region, given)
        found.attempts = given.get("MaximumRetryAttempts", 2)
        found.age = given.get("MaximumEventAgeInSeconds", _AGE)
        return {
            "FunctionArn": f"{found.arn}:$LATEST",
            "MaximumRetryAttempts": found.attempts,
            "MaximumEventAgeInSeconds": found.age,
        }

    # Events.

    def _invoke(self, region: str, given: Mapping[str, Any]) -> Response:
        found = self._named(region, given)
        if given.get("InvocationType") != "Event":
            raise ClientError("FakeAWS invokes functions with events only", "InvalidRequest")
        if self._faults.functions.inactive:
            self._faults.functions.inactive = False
            for each in self._functions.values():
                each.is_inactive = True
        if found.is_inactive:
            found.is_inactive = False
            found.active_at = time.time() + max(0.5, self._faults.functions.pending)
        if found.state != "Active":
            raise ClientError(
                f"The operation cannot be performed at this time. The function is currently in the "
                f"following state: {found.state}",
                "ResourceConflictException",
                status=409,
            )
        request_id = str(uuid.uuid4())
        deliveries = [self._faults.functions.delay()]
        if (again := self._faults.functions.second_delivery()) is not None:
            deliveries.append(deliveries[0] + again)
        for delay in deliveries:
            event = Event(request_id, found.name, given["Payload"], time.time())
            self._events.append(event)
            if delay:
                self._timers.later(delay, lambda event=event: self._deliver(region, event))  # type: ignore[misc]
            else:
                self._deliver(region, event)
        headers = {"x-amzn-RequestId": request_id}
        return Response(status=202, body=b"", headers=headers)

    def _deliver(self, region: str, event: Event) -> None:
        found = self._functions.get((region, event.function))
        if found is None:
            event.status = "dropped"
            return
        found.events.append(event)
        self._look()

    def _look(self) -> None:
        """Deliver the events that can be delivered; call again later if some are left."""
        self._is_looking = False
        for (region, _), function in list(self._functions.items()):
            while function.events:
                event = function.events[0]
                # "If you set reserved concurrency to zero, Lambda sends new events to the failure
                # destination, without any retries." "How Lambda handles errors and retries with
                # asynchronous invocation", AWS Lambda Developer Guide.
                if function.reserved == 0 or time.time() - event.sent_at > function.age + 3600:
                    event.status = "dropped"
                    function.events.popleft()
                elif self._place(region, function, event):
                    function.events.popleft()
                elif time.time() - event.sent_at > function.age:
                    event.status = "dropped"
                    function.events.popleft()
                else:
                    break
        if not self._is_looking and any(each.events for each in self._functions.values()):
            self._is_looking = True
            self._timers.later(_LOOK, self._look)

    def _place(self, region: str, function: _Function, event: Event) -> bool:
        """Give an event to an environment, if there is concurrency for it."""
        others = sum(
            each.busy
            for each in self._functions.values()
            if each is not function and each.reserved is None
        )
        most = function.reserved
        if most is None:
            most = self._unreserved() - others - self._faults.functions.used_by_others
        if function.busy >= most:
            return False
        idle = [each for each in function.environments if each.event is None and not each.is_closed]
        if idle:
            idle[0].take(event)
        elif function.starts.take():
            self._start(region, function, event)
        else:
            return False
        environment = next(each for each in function.environments if each.event is event)
        self._timers.later(environment.timeout, lambda: environment.expire(event))
        return True

    def _start(self, region: str, function: _Function, event: Event) -> None:
        name, group = uuid.uuid4().hex, function.log_group
        is_own = group == f"/aws/lambda/{function.name}"
        # "Configuring CloudWatch log groups", AWS Lambda Developer Guide.
        of = "" if is_own else function.name
        stream = f"{datetime.now(UTC):%Y/%m/%d}/{of}[$LATEST]{name}"
        given = function.request
        variables = {
            **((given.get("Environment") or {}).get("Variables") or {}),
            **self._credentials(given["Role"]),
            "AWS_REGION": region,
            "AWS_DEFAULT_REGION": region,
            "AWS_LAMBDA_FUNCTION_NAME": function.name,
            "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(given.get("MemorySize", 128)),
            "AWS_LAMBDA_LOG_GROUP_NAME": group,
            "AWS_LAMBDA_LOG_STREAM_NAME": stream,
            "AWS_LAMBDA_INITIALIZATION_TYPE": "on-demand",
            "TZ": ":UTC",
        }
        environment = Environment(
            name=name,
            image="" if function.archive else given["Code"]["ImageUri"],
            archive=function.archive,
            memory_mib=given.get("MemorySize", 128),
            timeout=given.get("Timeout", 3) / self._speed,
            variables=variables,
            write=self._logs.open(region, group, stream, create=is_own),
            idle=lambda each: self._idle(each),
            gone=lambda each: self._gone(function, each),
            broken=self._faults.functions.start_fails(),
        )
        function.environments.append(environment)
        environment.start(self._host, event)

    def _idle(self, environment: Environment) -> None:
        def retire() -> None:
            if environment.event is None and time.monotonic() - since >= self._keep:
                environment.close()

        since = time.monotonic()
        self._timers.later(0.0, self._look)
        self._timers.later(self._keep, retire)

    def _gone(self, function: _Function, environment: Environment) -> None:
        def forget() -> None:
            if environment in function.environments:
                function.environments.remove(environment)
                self._dying.append(environment)
            self._look()

        self._timers.later(0.0, forget)

    def _starve(self, request_id: str) -> None:
        with self._timers.lock:
            for function in self._functions.values():
                for each in function.environments:
                    if each.event is not None and each.event.request_id == request_id:
                        each.starve()


def _check(
    region: str, given: Mapping[str, Any], archives: Archives, registry: str | None
) -> Unpacked | None:
    """Refuse what AWS refuses beyond what its model says; return the archive, if it is one."""

    def refuse(text: str, code: str = "InvalidParameterValueException") -> None:
        raise ClientError(text, code)

    image = (given.get("Code") or {}).get("ImageUri", "")
    is_image = given.get("PackageType") == "Image"
    if is_image and (given.get("Runtime") or given.get("Handler")):
        refuse(
            "Please don't provide Handler or Runtime or Layer when the intended function "
            "PackageType is Image."
        )
    found = _IMAGE.fullmatch(image)
    is_in_registry = registry is not None and image.startswith(f"{registry}/")
    if is_image and found is None and not is_in_registry:
        refuse(f"Source image {image} is not valid. Provide a valid source image.")
    elif found is not None and found[1] != region:
        refuse(f"The source image {image} is in another region.")
    least, most = _MEMORY
    if not least <= given.get("MemorySize", 128) <= most:
        refuse(
            f"1 validation error detected: Value '{given['MemorySize']}' at 'memorySize' failed to "
            f"satisfy constraint: Member must have value less than or equal to {most}",
            "ValidationException",
        )
    if given.get("Timeout", 3) > _LONGEST:
        refuse(
            f"1 validation error detected: Value '{given['Timeout']}' at 'timeout' failed to "
            f"satisfy constraint: Member must have value less than or equal to {_LONGEST}",
            "ValidationException",
        )
    from moto.iam.models import iam_backends

    roles = iam_backends[ACCOUNT]["aws"].roles.values()
    role = next((each for each in roles if each.arn == given["Role"]), None)
    if role is None or "lambda.amazonaws.com" not in str(role.assume_role_policy_document):
        refuse("The role defined for the function cannot be assumed by Lambda.")
    if not is_image:
        return archives.unpack(region, given)
    _check_repository(region, image)
    return None


def _check_repository(region: str, image: str) -> None:
    """Refuse an image of a repository here that does not let Lambda in."""
    from moto.ecr.models import ecr_backends

    name = image.partition("/")[2].partition("@")[0].partition(":")[0]
    repository = ecr_backends[ACCOUNT][region].repositories.get(name)
    if repository is not None and "lambda.amazonaws.com" not in str(repository.policy):
        raise ClientError(
            "Lambda does not have permission to access the ECR image. Check the ECR permissions.",
            "AccessDeniedException",
            status=403,
        )
