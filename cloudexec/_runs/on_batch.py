"""AWS Batch as the place of runs: a job for each, on Fargate or, if need be, on EC2."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

from cloudexec._aws.definitions import ensure_definition
from cloudexec._aws.diagnosis import cause_of_waiting
from cloudexec._aws.limits import (
    WorkerSize,
    default_memory,
    fargate_disk,
    fargate_size_for,
    instance_size_for,
)
from cloudexec._aws.requests import definition_request, submit_request
from cloudexec._errors import AwsError, ConfigError
from cloudexec._launchers.batch.inquiry import Inquiry
from cloudexec._launchers.batch.reading import PHASES, end_of
from cloudexec._launchers.platform import WaitingJob
from cloudexec._runs.job_place import JobPlace, run_job_name
from cloudexec._runs.places import Machine, MachineRequest, MachineState
from cloudexec._runs.plan import RunPlan

__all__ = ["OnBatch"]


class OnBatch(JobPlace):
    """Runs as jobs of AWS Batch; see ``JobPlace``."""

    title = "AWS Batch"
    tries_again = True
    remembers = 7 * 86400.0
    """AWS Batch User Guide, "Job states": jobs that have ended are kept for 7 days or more."""
    overhead = 86400.0
    """A job may wait in its queue; AWS Batch itself ends it when its program's time is over."""

    # The machine.

    def choose(self, request: MachineRequest) -> Machine:
        """Return the least size of Fargate that is enough, or one on EC2."""
        size, compute = _size(request)
        self._queue(compute, spot=request.spot)  # complains if there is none
        if compute == "ec2" and request.arch == "arm64" and self._profile.stack:
            # It would wait for ever: an environment has instances of one architecture.
            raise ConfigError(
                f"the queues of `cloudexec up --ec2` have x86_64 instances, and none with {size} "
                f"of arm64: leave out --arch, or ask for what Fargate has"
            )
        if compute == "ec2" and request.disk_gib is not None:
            raise ConfigError(
                f"a machine with {size} is on EC2, where the compute environment of AWS Batch says "
                f"how large disks are: leave out --disk, or give --on ec2"
            )
        disk = fargate_disk(request.disk_gib)
        price = self._prices.worker(
            vcpus=size.vcpus,
            memory_mib=size.memory_mib,
            gpus=size.gpus,
            arch=request.arch,
            compute=compute,
            spot=request.spot,
            ephemeral_gib=disk,
            public_ip=self._profile.assign_public_ip,
            region=self._clients.region,
        )
        return Machine(size=size, compute=compute, price=price, disk_gib=disk)

    def _queue(self, compute: str, *, spot: bool) -> str:
        kind = compute + ("_spot" if spot else "")
        queue = self._profile.queues.get(kind, "")
        if not queue:
            there = ", ".join(sorted(self._profile.queues)) or "none"
            adds = "; `cloudexec up --ec2` adds them, and --on ec2 needs no queue"
            hint = adds if compute == "ec2" else ""
            raise ConfigError(
                f"the profile {self._profile.name!r} has no queue for {kind} (it has: {there}), "
                f"on which this machine would be{hint}"
            )
        return queue

    async def start(self, plan: RunPlan, variables: Mapping[str, str], *, attempt: int = 1) -> str:
        """Submit the job; AWS Batch itself makes further attempts."""
        size = WorkerSize(vcpus=plan.vcpus, memory_mib=plan.memory_mib, gpus=plan.gpus)
        spec = self._definition(plan)
        definition = await ensure_definition(self._clients, definition_request(spec))
        request = submit_request(
            name=run_job_name(plan),
            queue=self._queue(plan.compute, spot=plan.spot),
            definition=definition,
            workers=1,
            size=size,
            environment=variables,
            tags=self._tags(plan),
            attempt_seconds=plan.max_seconds,
            compute=plan.compute,
            retry_reclaimed=True,
        )

        async def once() -> str:
            try:
                answer = await self._clients.call("batch", "submit_job", once=True, **request)
            except AwsError as exc:
                # It may have got there.
                found = await self._search.jobs(name=request["jobName"]) if exc.transient else []
                if not found:
                    raise
                return str(found[0]["jobId"])
            return str(answer["jobId"])

        return await self._surely(once)

    async def _why_it_waits(self, state: MachineState, details: Mapping[str, Any]) -> str:
        """Ask queue, environments and quotas why a job waits."""
        inquiry = Inquiry(self._clients.call, _compute(details))
        inquiry.log_group = state.log_group
        reason = str(details.get("statusReason", ""))
        waiting = WaitingJob(
            job_id=state.job_id, counts={PHASES[details["status"]]: 1}, reason=reason
        )
        with contextlib.suppress(AwsError):
            queue = str(details["jobQueue"])
            vcpus = end_of(details, ()).size
            situation = await inquiry.situation(
                [waiting],
                [],
                queue=queue,
                vcpus=vcpus.vcpus if vcpus is not None else 1.0,
                used_vcpus=0.0,
            )
            if (cause := cause_of_waiting(situation)) is not None:
                return str(cause)
        return reason


def _size(request: MachineRequest) -> tuple[WorkerSize, str]:
    """Return the least size that is enough, and where it is."""
    cpus, mib = request.cpus, request.memory_mib
    if request.gpus:
        mib = default_memory(cpus, "ec2") if mib is None else mib
        return instance_size_for(cpus, mib, request.gpus), "ec2"
    mib = math.ceil(2048 * cpus) if mib is None else mib
    try:
        return fargate_size_for(cpus, mib), "fargate"
    except ConfigError:
        return instance_size_for(cpus, mib, 0), "ec2"


def _compute(details: Mapping[str, Any]) -> str:
    return "ec2" if "EC2" in details.get("platformCapabilities", ()) else "fargate"
