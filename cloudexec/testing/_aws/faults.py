"""Faults that a test can request: jobs that do not start, are lost, or calls that fail."""

from __future__ import annotations

import fnmatch
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from cloudexec.testing._aws.counted import take
from cloudexec.testing._aws.ec2_faults import Ec2Faults
from cloudexec.testing._aws.ecs_faults import EcsFaults
from cloudexec.testing._aws.function_faults import FunctionFaults

if TYPE_CHECKING:
    from cloudexec.testing._aws.permissions import Permissions
    from cloudexec.testing._aws.wire import Call

__all__ = ["Faults"]


_SERVICES = (
    "batch",
    "s3",
    "cloudformation",
    "logs",
    "secretsmanager",
    "sts",
    "ecr",
    "iam",
    "ssm",
    "pricing",
    "service-quotas",
    "resourcegroupstaggingapi",
    "ecs",
    "lambda",
    "ec2",
)
"""Names of botocore's models; the largest is searched last."""


class Jobs(Protocol):
    """The jobs that faults are about; see ``engine.Engine``."""

    def reclaim(self, job_id: str, *, notice: float, grace: float | None) -> None:
        """See ``Faults.reclaim``."""

    def reclaim_fraction(self, fraction: float, *, notice: float, grace: float | None) -> list[str]:
        """See ``Faults.reclaim_fraction``."""

    def out_of_memory(self, job_id: str) -> None:
        """See ``Faults.out_of_memory``."""

    def kill_instance(self, job_id: str) -> None:
        """See ``Faults.kill_instance``."""

    def forget_ended(self) -> list[str]:
        """See ``Faults.forget_ended``."""

    def poke(self) -> None:
        """Look again whether waiting jobs can be placed."""


class Faults:
    """The faults of a FakeAWS. Every method may be called from any thread, at any time.

    A fault lasts until :meth:`clear`, unless it takes a count or a number of seconds.
    """

    def __init__(
        self, renewed: Callable[[str], None], quota: Mapping[str, float] | None = None
    ) -> None:
        self._usual_quota = dict(quota or {})
        self._lock = threading.RLock()
        self._renewed = renewed
        self._jobs: Jobs | None = None
        self._expired: set[str] = set()
        self._token_number = 0
        self.token = "fake-session-token-0"
        self._ended = threading.Event()
        self.ecs = EcsFaults()
        """Faults of tasks that Amazon ECS runs without AWS Batch."""
        self.functions = FunctionFaults()
        """Faults of functions of AWS Lambda."""
        self.ec2 = Ec2Faults()
        """Faults of EC2 instances that are started without AWS Batch."""
        self._reset()

    def _reset(self) -> None:
        # Ends the waits of calls that an earlier fault has delayed.
        self._ended.set()
        self._ended = threading.Event()
        self._no_capacity: dict[str, bool] = {}
        """Queues and environments without capacity, and whether jobs there have no reason."""
        self._no_instance: set[str] = set()
        self._broken_roles: set[str] = set()
        self._slow_start = 0.0
        self._pulls: list[list[object]] = []
        self._start_errors: list[list[object]] = []
        self._throttles: list[list[object]] = []
        self._slow: list[list[object]] = []
        self._spoilt: list[list[object]] = []
        self._denied: list[list[object]] = []
        self._failing_resources: dict[str, str] = {}
        self._quota = dict(self._usual_quota)
        self._unreachable_until = 0.0
        self._ghosts = False
        self._permissions: Permissions | None = None
        self._list_lag = 0.0
        self.ecs.clear()
        self.functions.clear()
        self.ec2.clear()

    # Jobs that do not start.

    def no_capacity(self, target: str | None = None, *, silent: bool = False) -> None:
        """Let no job be placed: jobs stay RUNNABLE with a reason.

        Args:
            target: Name or ARN of a queue or compute environment, or a type of compute
                environment (``"FARGATE"``, ``"FARGATE_SPOT"``, ``"EC2"``, ``"SPOT"``); ``None``:
                everywhere.
            silent: Whether jobs have no reason. AWS documents that AWS Batch gives a reason, but
                not for scarce Spot capacity on Fargate.
        """
        with self._lock:
            self._no_capacity[target or "*"] = silent
        self._poke()

    def no_fitting_instance(self, target: str | None = None) -> None:
        """Let no instance be large enough: jobs stay RUNNABLE, and their status reason says so.

        Args:
            target: As in :meth:`no_capacity`.
        """
        with self._lock:
            self._no_instance.add(target or "*")
        self._poke()

    def capacity_returns(self, target: str | None = None) -> None:
        """Undo ``no_capacity`` and ``no_fitting_instance`` for a target; ``None`` for all."""
        with self._lock:
            if target is None:
                self._no_capacity.clear()
                self._no_instance.clear()
            else:
                self._no_capacity.pop(target, None)
                self._no_instance.discard(target)
        self._poke()

    def slow_start(self, seconds: float) -> None:
        """Keep every job in STARTING for some seconds, as a large image does. 0 undoes it."""
        with self._lock:
            self._slow_start = seconds

    def image_pull_fails(
        self, image: str = "*", count: int | None = None, *, why: str = "not found"
    ) -> None:
        """Let images that fit a shell pattern fail to be pulled.

        Args:
            image: Shell pattern of image names.
            count: Number of pulls that fail; ``None``: all.
            why: What the registry says, such as ``"429 Too Many Requests"``.
        """
        with self._lock:
            self._pulls.append([(image, why), count])

    def no_route(self, count: int | None = None) -> None:
        """Let tasks fail to reach the registry, as in a subnet without NAT or public address."""
        self.start_fails(
            "ResourceInitializationError: unable to pull secrets or registry auth: The task cannot "
            "pull registry auth from Amazon ECR: There is a connection issue between the task and "
            "Amazon ECR. Check your task network configuration. RequestError: send request failed "
            'caused by: Post "https://api.ecr.us-east-1.amazonaws.com/": dial tcp 10.0.0.1:443: '
            "i/o timeout",
            count,
        )

    def missing_execution_role(self, count: int | None = None) -> None:
        """Let ECS fail to assume the execution role."""
        self.start_fails(
            "ECS was unable to assume the role 'arn:aws:iam::123456789012:role/execution' that was "
            "provided for this task. Please verify that the role being passed has the proper trust "
            "relationship and permissions and that your IAM user has permissions to pass this "
            "role.",
            count,
        )

    def start_fails(self, reason: str, count: int | None = None) -> None:
        """Let tasks fail before they run.

        Args:
            reason: Amazon ECS's reason, such as ``"ResourceInitializationError: ..."``.
            count: Number of starts that fail; ``None``: all.
        """
        with self._lock:
            self._start_errors.append([reason, count])

    def service_role_broken(self, environment: str | None = None) -> None:
        """Make compute environments INVALID, as a wrong service role does.

        Args:
            environment: Name or ARN of a compute environment; ``None`` for all.
        """
        with self._lock:
            self._broken_roles.add(environment or "*")
        self._poke()

    def vcpu_quota(
        self, vcpus: float | None, *, spot: bool = False, compute: str = "fargate"
    ) -> None:
        """Set the account's quota of vCPUs that run at once.

        Args:
            vcpus: The quota; ``None`` for no limit.
            spot: Whether it is the quota of spot capacity.
            compute: ``"fargate"`` or ``"ec2"``.
        """
        if compute not in ("fargate", "ec2"):
            raise ValueError(f"compute must be 'fargate' or 'ec2', not {compute!r}")
        with self._lock:
            kind = compute + ("_spot" if spot else "")
            if vcpus is None:
                self._quota.pop(kind, None)
            else:
                self._quota[kind] = vcpus
        self._poke()

    def resource_fails(self, logical_id: str, reason: str = "Resource creation failed") -> None:
        """Let CloudFormation fail to create a resource: the stack rolls back.

        Args:
            logical_id: The resource's name in the template.
            reason: The reason in the stack's event.
        """
        with self._lock:
            self._failing_resources[logical_id] = reason

    # Jobs that are lost.

    def reclaim(self, job_id: str, *, notice: float = 0.0, grace: float | None = None) -> None:
        """Take a spot job's machine back: SIGTERM, then SIGKILL.

        Args:
            job_id: Job that is STARTING or RUNNING.
            notice: Seconds until SIGTERM is sent.
            grace: Seconds from SIGTERM to SIGKILL; ``None`` for those of the FakeAWS.

        Raises:
            ValueError: If the job does not run.
        """
        self._required_jobs().reclaim(job_id, notice=notice, grace=grace)

    def reclaim_fraction(
        self, fraction: float, *, notice: float = 0.0, grace: float | None = None
    ) -> list[str]:
        """Reclaim a part of the spot jobs that are RUNNING now, the oldest first.

        Args:
            fraction: A number above 0 and at most 1. At least one job is reclaimed, if any runs.
            notice: As in :meth:`reclaim`.
            grace: As in :meth:`reclaim`.

        Returns:
            The ids of the reclaimed jobs.
        """
        return self._required_jobs().reclaim_fraction(fraction, notice=notice, grace=grace)

    def out_of_memory(self, job_id: str) -> None:
        """Kill all processes of a running job, as the kernel does when memory runs out."""
        self._required_jobs().out_of_memory(job_id)

    def kill_instance(self, job_id: str) -> None:
        """Let the machine under a running job vanish without a notice."""
        self._required_jobs().kill_instance(job_id)

    def forget_ended(self) -> list[str]:
        """Forget all jobs that have ended, as AWS may after seven days.

        Tasks of Amazon ECS and EC2 instances, which it forgets after an hour, are forgotten, too.

        Returns:
            The ids of the forgotten jobs and instances; an array's id stands for its children.
        """
        return [*self._required_jobs().forget_ended(), *self.ec2.forget_ended()]

    # The API.

    def throttle(self, operation: str | None = None, count: int = 1) -> None:
        """Refuse the next calls as too many.

        Args:
            operation: An operation, such as ``"SubmitJob"``; ``None`` for any of Batch.
            count: Number of calls.

        Raises:
            ValueError: If AWS has no such operation.
        """
        if operation is not None:
            _check_operation(operation)
        with self._lock:
            self._throttles.append([operation or "batch", count])

    def lose_response(self, operation: str, count: int = 1) -> None:
        """Carry out the next calls, but close their connections without an answer.

        Raises:
            ValueError: If AWS has no such operation.
        """
        _check_operation(operation)
        with self._lock:
            self._spoilt.append([("lost", operation), count])

    def cut_response(self, operation: str, count: int = 1) -> None:
        """Send half of the next answers and close the connections, like a broken download.

        Args:
            operation: Such as ``"GetObject"``.
            count: Number of answers.

        Raises:
            ValueError: If AWS has no such operation.
        """
        _check_operation(operation)
        with self._lock:
            self._spoilt.append([("cut", operation), count])

    def corrupt_response(self, operation: str, count: int = 1) -> None:
        """Change a byte in the next answers.

        Args:
            operation: Such as ``"GetObject"``.
            count: Number of answers.

        Raises:
            ValueError: If AWS has no such operation.
        """
        _check_operation(operation)
        with self._lock:
            self._spoilt.append([("changed", operation), count])

    def slow_response(self, operation: str, seconds: float, count: int | None = None) -> None:
        """Wait for some seconds before answers, also before refusals.

        Args:
            operation: An operation, such as ``"GetObject"``.
            seconds: Seconds to wait.
            count: Number of answers; ``None`` for all.

        Raises:
            ValueError: If AWS has no such operation.
        """
        _check_operation(operation)
        with self._lock:
            self._slow.append([(operation, seconds), count])

    def deny(self, operation: str, count: int | None = None) -> None:
        """Refuse an operation for lack of permission.

        Args:
            operation: An operation, such as ``"SubmitJob"`` or ``"batch:SubmitJob"``.
            count: Number of calls; ``None`` for all.

        Raises:
            ValueError: If AWS has no such operation.
        """
        _check_operation(operation)
        with self._lock:
            self._denied.append([operation, count])

    def allow_only(
        self,
        policy: Mapping[str, Any],
        *,
        roles_are_passed_to: str = "ecs-tasks.amazonaws.com",
        submit_names_jobs: bool = True,
    ) -> None:
        """Refuse calls that a policy does not allow, as for a user who has no other policy.

        Args:
            policy: The policy, as `cloudexec policy` prints it.
            roles_are_passed_to: The service that AWS Batch passes roles to, which a condition of
                ``iam:PassRole`` may name. AWS documents this one and ``"batch.amazonaws.com"``.
            submit_names_jobs: Whether ``batch:SubmitJob`` must be allowed on the job, too. The
                Service Authorization Reference says so, but not all users observe it.
        """
        from cloudexec.testing._aws.permissions import Permissions

        with self._lock:
            self._permissions = Permissions(
                policy=policy, passed_to=roles_are_passed_to, submit_names_jobs=submit_names_jobs
            )

    def list_lag(self, seconds: float) -> None:
        """Let ListJobs omit jobs that were submitted in the last seconds. 0 undoes it.

        ListTasks and DescribeInstances omit what is new likewise, and DescribeTasks says that it is
        MISSING.

        AWS does not document how late lists can be.
        """
        with self._lock:
            self._list_lag = seconds

    def unreachable(self, seconds: float) -> None:
        """Close every connection at once for some seconds. 0 ends it."""
        with self._lock:
            self._unreachable_until = time.monotonic() + seconds

    def deleted_stay_listed(self) -> None:
        """Let the tagging service list deleted resources, as that of AWS does for hours."""
        with self._lock:
            self._ghosts = True

    def expire_credentials(self) -> None:
        """Let the present credentials be expired until :meth:`renew_credentials`."""
        with self._lock:
            self._expired.add(self.token)

    def renew_credentials(self, *, same: bool = False) -> None:
        """Put valid credentials into ``FakeAWS.environment`` and ``os.environ``.

        Args:
            same: Whether the expired credentials are valid again, too.
        """
        with self._lock:
            if same:
                self._expired.clear()
            else:
                self._token_number += 1
                self.token = f"fake-session-token-{self._token_number}"
            token = self.token
        self._renewed(token)

    def clear(self) -> None:
        """Undo every fault that lasts."""
        with self._lock:
            self._reset()
            self._expired.clear()
        self._poke()

    # Methods for the other modules.

    def attach(self, jobs: Jobs) -> None:
        """Set the jobs that the faults are about."""
        self._jobs = jobs

    def has_capacity(self, *names: str) -> bool:
        """Return whether a queue or environment with one of these names has capacity for jobs."""
        with self._lock:
            return self._no_capacity.keys().isdisjoint((*names, "*"))

    def says_no_capacity(self, *names: str) -> bool:
        """Return whether jobs in such a queue or environment say that it has no capacity."""
        with self._lock:
            found = [self._no_capacity[name] for name in (*names, "*") if name in self._no_capacity]
            return not all(found)

    def has_instances(self, *names: str) -> bool:
        """Return whether a queue or environment with one of these names has instances that fit."""
        with self._lock:
            return not self._no_instance.intersection((*names, "*"))

    def role_is_broken(self, *names: str) -> bool:
        """Return whether the environment with these names is INVALID."""
        with self._lock:
            return bool(self._broken_roles.intersection((*names, "*")))

    def quota(self, kind: str) -> float | None:
        """Return the quota of vCPUs; ``None`` for no limit.

        Args:
            kind: ``"fargate"``, ``"fargate_spot"``, ``"ec2"`` or ``"ec2_spot"``.
        """
        with self._lock:
            return self._quota.get(kind)

    def start_delay(self) -> float:
        """Return the additional seconds in STARTING."""
        with self._lock:
            return self._slow_start

    def pull_error(self, image: str) -> str | None:
        """Return why this pull fails, if it does, and count it."""
        with self._lock:
            found = take(self._pulls, lambda wanted: fnmatch.fnmatchcase(image, wanted[0]))
            return found and str(found[1])

    def start_error(self) -> str | None:
        """Return why this start fails, if it does, and count it."""
        with self._lock:
            return cast("str | None", take(self._start_errors, lambda _: True))

    def throttled(self, service: str, operation: str) -> bool:
        """Return whether this call is refused as one too many, and count it."""
        with self._lock:
            return bool(take(self._throttles, lambda wanted: wanted in (service, operation)))

    def spoils(self, operation: str, how: Literal["lost", "cut", "changed"]) -> bool:
        """Return whether this call's answer is spoilt in the given way, and count it."""
        with self._lock:
            return bool(take(self._spoilt, lambda wanted: wanted == (how, operation)))

    def wait_before(self, operation: str) -> None:
        """Wait before this call's answer if a fault says so, and count it."""
        with self._lock:
            found = take(self._slow, lambda wanted: wanted[0] == operation)
            ended = self._ended
        if found:
            ended.wait(float(found[1]))

    def denies(self, service: str, operation: str) -> bool:
        """Return whether this call is not permitted, and count it."""
        with self._lock:
            names = (operation, f"{service}:{operation}")
            return bool(take(self._denied, lambda wanted: wanted in names))

    def is_unreachable(self) -> bool:
        """Return whether connections are closed at once."""
        with self._lock:
            return time.monotonic() < self._unreachable_until

    def missing_permission(self, call: Call) -> str | None:
        """Return AWS's message if the policy does not allow a call; ``None`` if it does."""
        with self._lock:
            permissions = self._permissions
        return permissions.refusal(call) if permissions is not None else None

    def listed_since(self) -> float:
        """Return the time, since the epoch, after which submitted jobs are not listed yet."""
        with self._lock:
            return time.time() - self._list_lag if self._list_lag else math.inf

    def keeps_ghosts(self) -> bool:
        """Return whether the tagging service lists deleted resources."""
        with self._lock:
            return self._ghosts

    def has_expired(self, token: str) -> bool:
        """Return whether a session token has expired."""
        with self._lock:
            return token in self._expired

    def resource_failure(self, logical_id: str) -> str | None:
        """Return why CloudFormation fails to create a resource, if it does."""
        with self._lock:
            return self._failing_resources.get(logical_id)

    def _required_jobs(self) -> Jobs:
        if self._jobs is None:
            raise RuntimeError("the FakeAWS has not been entered")
        return self._jobs

    def _poke(self) -> None:
        if self._jobs is not None:
            self._jobs.poke()


def _check_operation(name: str) -> None:
    """Refuse names that no operation has, so that a typing error does not disable a fault."""
    from cloudexec.testing._aws.wire import service_model

    service, _, operation = name.rpartition(":")
    if service not in ("", *_SERVICES) or not any(
        operation in service_model(each).operation_names
        for each in ([service] if service else _SERVICES)
    ):
        raise ValueError(f"AWS has no operation {name!r} that FakeAWS knows")
