"""AWS Fargate as the place of runs: a task that Amazon ECS is asked for, without a queue.

Amazon ECS has neither a time limit nor another attempt, and forgets a task an hour after its end.
So the machine keeps to its limits itself, starts the next attempt when its own machine is taken
back, and writes into the bucket which tasks there were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cloudexec._aws.diagnosis import Situation
from cloudexec._aws.limits import (
    ECS_MOST_VCPUS,
    WorkerSize,
    fargate_disk,
    fargate_size_for,
    format_memory,
)
from cloudexec._aws.task_definitions import ensure_task_definition
from cloudexec._aws.task_diagnosis import cause_of_refused_task, cause_of_waiting_tasks, may_pass
from cloudexec._aws.task_requests import Placement, run_task_request, task_definition_request
from cloudexec._errors import AwsError, ConfigError
from cloudexec._runs.job_place import JobPlace, refused, run_job_name
from cloudexec._runs.places import Machine, MachineRequest, MachineState
from cloudexec._runs.plan import RunPlan
from cloudexec._runs.protocol import ATTEMPT_VARIABLE

__all__ = ["OnFargate"]

_TOKENS = 1000
"""Client tokens that each attempt may use: one for each request that Amazon ECS has answered with a
failure."""
_NO_TASK = "RunTaskFailure"


class OnFargate(JobPlace):
    """Runs as tasks of Amazon ECS; see ``JobPlace``."""

    title = "Amazon ECS"
    launcher = "fargate"
    tries_again = False
    remembers = 3600.0
    """Amazon ECS API Reference, "DescribeTasks": tasks that have stopped are shown for an hour."""
    overhead = 3600.0
    """AWS does not say how long an image may load."""

    # The machine.

    def choose(self, request: MachineRequest) -> Machine:
        """Return the least size of Fargate that is enough."""
        self._placement()  # complains if there is no cluster
        if request.gpus:
            raise ConfigError(
                "Fargate has no GPUs: --on ec2 has them, and --on batch with the queues of "
                "`cloudexec up --ec2`"
            )
        cpus = request.cpus
        mib = math.ceil(2048 * cpus) if request.memory_mib is None else request.memory_mib
        try:
            size = fargate_size_for(cpus, mib, ECS_MOST_VCPUS)
        except ConfigError as exc:
            raise ConfigError(
                f"Amazon ECS has no machine on Fargate with {cpus:g} vCPU and {format_memory(mib)}:"
                f" the largest has 16 vCPU and 120GiB. --on batch has up to 32 vCPU on Fargate, "
                f"and more on EC2"
            ) from exc
        disk = fargate_disk(request.disk_gib)
        price = self._prices.worker(
            vcpus=size.vcpus,
            memory_mib=size.memory_mib,
            arch=request.arch,
            compute="fargate",
            spot=request.spot,
            ephemeral_gib=disk,
            public_ip=self._profile.assign_public_ip,
            region=self._clients.region,
        )
        return Machine(size=size, compute="fargate", price=price, disk_gib=disk)

    def _placement(self) -> Placement:
        profile = self._profile
        if not profile.cluster:
            up = "cloudexec up --with fargate"
            if profile.name != "default":
                up += f" --name {profile.name}"
            raise ConfigError(
                f"the profile {profile.name!r} has no cluster of Amazon ECS, in which --on fargate "
                f"would run: `{up}` adds one; --on batch needs none"
            )
        return Placement(
            cluster=profile.cluster,
            subnets=profile.subnets,
            security_groups=tuple(filter(None, [profile.security_group])),
            assign_public_ip=profile.assign_public_ip,
        )

    async def start(self, plan: RunPlan, variables: Mapping[str, str], *, attempt: int = 1) -> str:
        """Ask for a task. Amazon ECS starts none for a request whose client token it knows.

        Raises:
            AwsError: If there is no capacity or no quota for it, also after a minute (``code``
                ``"RunTaskFailure"``), or AWS refuses.
        """
        definition = await ensure_task_definition(
            self._clients, task_definition_request(self._definition(plan))
        )
        # The same for all tries: a request that is made again must not differ.
        tags = self._tags(plan)
        tries = 0

        async def ask() -> str:
            nonlocal tries
            request = run_task_request(
                name=run_job_name(plan),
                attempt=attempt * _TOKENS + tries,
                definition=definition,
                placement=self._placement(),
                size=WorkerSize(vcpus=plan.vcpus, memory_mib=plan.memory_mib),
                spot=plan.spot,
                environment={**variables, ATTEMPT_VARIABLE: str(attempt)},
                tags=tags,
            )
            failure = ""
            try:
                answer = await self._clients.call("ecs", "run_task", **request)
            except AwsError as exc:
                if exc.code == "ConflictException":
                    # An earlier request has come through, and its answer was lost.
                    return _id_of(_known_arns(exc) or await self._started(plan), exc)
                if exc.transient or not may_pass(exc.message):
                    raise
                failure = exc.message
            else:
                if answer["tasks"]:
                    return _id_of([each["taskArn"] for each in answer["tasks"]])
                failures = answer.get("failures", ())
                failure = next((str(each.get("reason", "")) for each in failures), "")
            tries += 1  # this token stands for a request that has failed
            cause = cause_of_refused_task(failure, spot=False)
            raise refused(cause, plan, code=_NO_TASK, operation="ecs:RunTask")

        return await self._surely(ask)

    async def _started(self, plan: RunPlan) -> list[str]:
        name = run_job_name(plan)
        answer = await self._clients.call(
            "ecs", "list_tasks", cluster=self._profile.cluster, startedBy=name
        )
        return [str(each) for each in answer["taskArns"]]

    async def _why_it_waits(self, state: MachineState, details: Mapping[str, Any]) -> str:
        """Say so by what Amazon ECS says of the task."""
        reason = str(details.get("statusReason", ""))
        situation = Situation(
            statuses={str(details["status"]): 1}, reasons=[reason] if reason else []
        )
        cause = cause_of_waiting_tasks(situation)
        return reason if cause is None else str(cause)


def _known_arns(exc: AwsError) -> list[str]:
    """Return the tasks that an earlier call with the same client token has started."""
    response: Mapping[str, Any] = getattr(exc.__cause__, "response", {})
    return [str(each) for each in response.get("resourceIds", ())]


def _id_of(arns: list[str], exc: AwsError | None = None) -> str:
    if not arns:
        assert exc is not None
        raise exc
    return arns[0].rpartition("/")[2]
