"""Amazon EC2 as the place of runs: an instance that is asked for without a queue.

The instance runs the image with the script that instances of workers have, and ends when the
program does. Like Amazon ECS, Amazon EC2 has neither a time limit nor another attempt, and forgets
an instance an hour after its end: see ``on_fargate``. What its script has said of its end is in the
log. The instance has the role of runs, so it has a profile of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cloudexec._aws import names
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.diagnosis import Situation
from cloudexec._aws.instance_diagnosis import (
    cause_of_refused_fleet,
    cause_of_waiting_instances,
    may_pass,
    worst_of,
)
from cloudexec._aws.instance_prices import InstancePrices, assumed_price
from cloudexec._aws.instance_requests import (
    Fleet,
    TemplateSpec,
    image_parameter,
    template_request,
)
from cloudexec._aws.instance_script import (
    LastWords,
    MachineScript,
    boot_stream,
    last_words,
    machine_script,
)
from cloudexec._aws.instance_search import BY_ITSELF, BY_USER, RECLAIMED
from cloudexec._aws.limits import (
    USUAL_DISK_GIB,
    WorkerSize,
    check_instance_disk,
    instance_size_for,
)
from cloudexec._aws.machines import ensure_template, find_instances, start_instances
from cloudexec._aws.profile import Profile
from cloudexec._aws.records import ACTIVE
from cloudexec._errors import AwsError, ConfigError
from cloudexec._runs.job_place import JobPlace, refused, run_job_name
from cloudexec._runs.places import Machine, MachineRequest, MachineState
from cloudexec._runs.plan import RunPlan
from cloudexec._runs.protocol import ATTEMPT_VARIABLE, MACHINE_VARIABLE

__all__ = ["OnEc2"]

_TOKENS = 1000
"""Client tokens that each attempt may use: one for each request that Amazon EC2 has answered with a
failure."""
_NO_INSTANCE = "CreateFleetError"
_BOOT_SECONDS = 900.0
"""Seconds from the launch of an instance to the start of its program, at the most."""
_LAST_SECONDS = 300.0
"""Seconds after the time limit of the program in which its log is sent."""
_STOP_SECONDS = 60
"""Seconds in which the program may end and its files are sent, if the instance is terminated. After
some minutes, EC2 turns it off. Amazon EC2 User Guide, "Terminate Amazon EC2 instances"."""
_WORDS = 10
"""Lines of the script's log that are read: it writes one."""
_NO_LOG = "ResourceNotFoundException"


class OnEc2(JobPlace):
    """Runs on EC2 instances of their own; see ``JobPlace``."""

    title = "Amazon EC2"
    launcher = "ec2"
    tries_again = False
    remembers = 3600.0
    """Amazon EC2 User Guide, "Terminate Amazon EC2 instances": they stay visible for a while, which
    is about an hour."""
    overhead = _BOOT_SECONDS + _LAST_SECONDS

    def __init__(self, clients: AwsClients, profile: Profile) -> None:
        super().__init__(clients, profile)
        self._real_prices = InstancePrices(clients, self._prices)

    # The machine.

    def choose(self, request: MachineRequest) -> Machine:
        """Return the size that an instance has at least, and the price of the cheapest one."""
        self._check()
        if request.gpus and request.arch == "arm64":
            raise ConfigError(
                "instances with GPUs are of x86_64, as is the system with drivers for them: leave "
                "out --arch"
            )
        cpus = request.cpus
        mib = math.ceil(2048 * cpus) if request.memory_mib is None else request.memory_mib
        size = instance_size_for(cpus, mib, request.gpus)
        disk = USUAL_DISK_GIB if request.disk_gib is None else request.disk_gib
        check_instance_disk(disk)
        price = assumed_price(
            self._prices,
            size,
            arch=request.arch,
            spot=request.spot,
            disk_gib=disk,
            public_ip=self._profile.assign_public_ip,
            region=self._clients.region,
        )
        return Machine(size=size, compute="instance", price=price, disk_gib=request.disk_gib)

    def _check(self) -> None:
        """Complain if the stack has nothing for such instances."""
        profile = self._profile
        if profile.run_profile:
            return
        # The list removes what it does not name.
        there = {"fargate": profile.cluster, "lambda": profile.function_role}
        launchers = ",".join([*(name for name, is_there in there.items() if is_there), "ec2"])
        up = f"cloudexec up --with {launchers}"
        if profile.name != "default":
            up += f" --name {profile.name}"
        if profile.instance_profile:
            raise ConfigError(
                f"the stack of the profile {profile.name!r} is older than runs on EC2: `{up}` "
                f"brings it up to date; --on batch needs nothing of it"
            )
        raise ConfigError(
            f"the profile {profile.name!r} has no role for EC2 instances, on which --on ec2 would "
            f"run: `{up}` adds it; --on batch needs none"
        )

    async def start(self, plan: RunPlan, variables: Mapping[str, str], *, attempt: int = 1) -> str:
        """Ask for an instance. Amazon EC2 starts none for a request whose client token it knows.

        Raises:
            AwsError: If there is no capacity or no quota for it, also after a minute (``code``
                ``"CreateFleetError"``), or AWS refuses.
        """
        self._check()
        name = run_job_name(plan)
        script = await self._script(plan, {**variables, ATTEMPT_VARIABLE: str(attempt)})
        # The same for all tries: a request that is made again must not differ.
        tags = {
            **self._tags(plan),
            names.TAG_JOB: name,
            names.TAG_ATTEMPT: str(attempt),
            names.TAG_DISK: str(self._disk(plan)),
            "Name": name,
        }
        tries = 0

        async def ask() -> str:
            nonlocal tries
            fleet = Fleet(
                name=name,
                attempt=attempt * _TOKENS + tries,
                template=await self._template(plan),
                count=1,
                size=WorkerSize(vcpus=plan.vcpus, memory_mib=plan.memory_mib, gpus=plan.gpus),
                subnets=self._profile.subnets,
                spot=plan.spot,
                script=script,
                tags=tags,
            )
            try:
                answer = await start_instances(self._clients, fleet)
            except AwsError as exc:
                if exc.transient or not may_pass(f"{exc.code}: {exc.message}"):
                    raise
                reason = exc.message
            else:
                if answer.instances:
                    return answer.instances[0]
                if not answer.errors:
                    return await self._started(plan, attempt)
                reason = worst_of(answer.errors)
            tries += 1  # this token stands for a request that has failed
            cause = cause_of_refused_fleet(reason, spot=False)
            raise refused(cause, plan, code=_NO_INSTANCE, operation="ec2:CreateFleet")

        return await self._surely(ask)

    async def _started(self, plan: RunPlan, attempt: int) -> str:
        """Return the instance that an earlier request has started, whose answer was lost.

        Raises:
            AwsError: If it is not listed yet; it may be asked again.
        """
        tags = {names.TAG_JOB: [run_job_name(plan)], names.TAG_ATTEMPT: [str(attempt)]}
        async for each in find_instances(self._clients, tags):
            return str(each["InstanceId"])
        text = "Amazon EC2 has started an instance, and does not list it yet"
        raise AwsError(text, code=_NO_INSTANCE, operation="ec2:CreateFleet", transient=True)

    async def _template(self, plan: RunPlan) -> str:
        profile = self._profile
        parameter = image_parameter(plan.arch, gpus=bool(plan.gpus))
        wanted = TemplateSpec(
            instance_profile=profile.run_profile,
            ami=f"resolve:ssm:{parameter}",
            security_groups=tuple(filter(None, [profile.security_group])),
            assign_public_ip=profile.assign_public_ip,
            disk_gib=self._disk(plan),
            stack=profile.stack,
        )
        return await ensure_template(self._clients, template_request(wanted))

    @staticmethod
    def _disk(plan: RunPlan) -> int:
        return USUAL_DISK_GIB if plan.disk_gib is None else plan.disk_gib

    async def _script(self, plan: RunPlan, variables: Mapping[str, str]) -> str:
        client = await self._clients.client("ec2")
        # Names of hosts end otherwise in China.
        is_china = str(client.meta.endpoint_url).endswith(".cn")
        return machine_script(
            MachineScript(
                image=plan.image,
                region=self._clients.region,
                dns_suffix="amazonaws.com.cn" if is_china else "amazonaws.com",
                log_group=self._profile.log_group,
                environment=variables,
                own_variables={MACHINE_VARIABLE: "{instance}"},
                lifetime=self.overhead + plan.max_seconds,
                spot=plan.spot,
                gpus=bool(plan.gpus),
                # Workers of executors in it dial the instance's address.
                is_reachable=True,
                stop_seconds=_STOP_SECONDS,
            )
        )

    # Looking.

    async def _learned(self, plan: RunPlan, details: Mapping[str, Any]) -> Mapping[str, Any]:
        """Add what an instance costs, and what its script has said of its end."""
        instance, found = str(details["jobId"]), dict(details)
        found["perHour"] = await self._real_prices.per_hour(
            str(details["instanceType"]), str(details["zone"]), spot=bool(details["spot"])
        )
        found["container"] = {
            **details["container"],
            "image": plan.image,
            "resourceRequirements": [
                {"type": "VCPU", "value": f"{plan.vcpus:g}"},
                {"type": "MEMORY", "value": str(plan.memory_mib)},
                {"type": "GPU", "value": str(plan.gpus)},
            ],
        }
        if details["status"] in ACTIVE:
            return found
        how = str(details.get("stopCode", ""))
        if how == BY_USER:
            # Amazon EC2 takes no reasons.
            found["statusReason"] = f"stopped by a request to Amazon EC2 ({found['statusReason']})"
        if details["instanceState"] == "shutting-down" and how != BY_ITSELF:
            # Its program is told to stop, and sends its files.
            return {**found, "status": "RUNNING"}
        words = await self._last_words(instance)
        if words is None:
            return {**found, "status": "FAILED"}
        if how == BY_ITSELF:
            found["statusReason"] = words.said or "its container ended"
        if words.reclaimed:
            found["stopCode"] = RECLAIMED
        if words.exit_code is not None:
            found["container"]["exitCode"] = words.exit_code
        if words.out_of_memory:
            found["container"]["reason"] = "OutOfMemoryError: container killed due to memory usage"
        found["status"] = "SUCCEEDED" if words.exit_code == 0 else "FAILED"
        return found

    async def _last_words(self, instance: str) -> LastWords | None:
        try:
            page = await self._clients.call(
                "logs",
                "get_log_events",
                logGroupName=self._profile.log_group,
                logStreamName=boot_stream(instance),
                limit=_WORDS,
            )
        except AwsError as exc:
            if exc.code != _NO_LOG:
                raise
            return None
        return last_words("\n".join(each["message"] for each in page["events"]))

    async def _why_it_waits(self, state: MachineState, details: Mapping[str, Any]) -> str:
        """Say so by what Amazon EC2 says of the instance."""
        cause = cause_of_waiting_instances(Situation(statuses={str(details["status"]): 1}))
        return "" if cause is None else str(cause)
