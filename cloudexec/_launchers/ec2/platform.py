"""EC2 instances as a platform: each worker has one, and they are asked for without a queue.

One request starts up to a hundred instances, since AWS takes two of them a second. All of these run
the same script, so a worker introduces itself by the id of its instance. The answer to the request
says which ids there are, and so which number each worker has among them; until it has come, workers
that dial are sent away for a moment. A client token for each request makes sure that one which is
made again starts nothing twice.

There is no queue in AWS in which a worker could wait for capacity, so it waits here: see
``asking``.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from cloudexec._aws import names
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.diagnosis import JobEnd, is_over_quota
from cloudexec._aws.instance_diagnosis import (
    cause_of_waiting_instances,
    lacks_capacity,
)
from cloudexec._aws.instance_prices import InstancePrices, instance_price
from cloudexec._aws.instance_requests import (
    MOST_INSTANCES,
    Fleet,
    TemplateSpec,
    image_parameter,
    template_request,
)
from cloudexec._aws.instance_script import (
    LastWords,
    MachineScript,
    boot_stream,
    container_stream,
    last_words,
    machine_script,
)
from cloudexec._aws.machines import end_instances, ensure_template, find_instances, tags_of
from cloudexec._aws.prices import PriceTable
from cloudexec._aws.profile import Profile
from cloudexec._aws.requests import DefinitionSpec
from cloudexec._errors import ConfigError
from cloudexec._launchers.aws.asking import is_forgotten
from cloudexec._launchers.aws.platform import DefinedPlatform, connected
from cloudexec._launchers.aws.platform import Settings as AwsSettings
from cloudexec._launchers.batch.inquiry import reason_of
from cloudexec._launchers.batch.reading import worker_end
from cloudexec._launchers.ec2.asking import CALLS_PER_SECOND, Asker, Group, Worker
from cloudexec._launchers.ec2.reading import (
    end_of_instance,
    found_no_capacity,
    phase_of_instance,
    run_of_instance,
)
from cloudexec._launchers.platform import (
    ExecutorInfo,
    Inspection,
    JobRequest,
    JobStatus,
    Phase,
    Reason,
    Site,
    Submitted,
    Target,
    WaitingJob,
    WorkerEnd,
    WorkerStatus,
)
from cloudexec._pricing import WorkerPrice

__all__ = ["Ec2Platform", "Settings", "connect"]

_SPOT_PATIENCE = 60.0
_STOP_SECONDS = 60.0
"""Seconds that an instance takes to end at the most, without a shutdown of its system."""
_SPOT_DRAIN = 100
"""Seconds in which tasks on Spot may finish, of the 120 of the notice."""
_BOOT_SECONDS = 900.0
"""Seconds from the launch of an instance to the start of its worker, at the most: a large image."""
_LAST_SECONDS = 300.0
"""Seconds after a worker's time limit in which it hands back what it runs, and its log is sent."""


class Settings(AwsSettings, Protocol):
    """What the platform must know of the settings of ``EC2``, which describes them."""

    ami: str | None
    disk_gib: int
    gpus: int
    instance_types: tuple[str, ...]
    security_groups: tuple[str, ...] | None
    subnets: tuple[str, ...] | None


def connect(
    settings: Settings, executor: ExecutorInfo
) -> contextlib.AbstractAsyncContextManager[Site]:
    """Connect to Amazon EC2; see ``connected``."""
    return connected(settings, executor, Ec2Platform, of="")


class Ec2Platform(DefinedPlatform):
    """EC2 instances, for one executor; see ``DefinedPlatform``."""

    name = "Amazon EC2"
    most_workers = MOST_INSTANCES
    stop_seconds = _STOP_SECONDS
    _settings: Settings

    def __init__(
        self,
        settings: Settings,
        executor: ExecutorInfo,
        clients: AwsClients,
        profile: Profile,
        prices: PriceTable,
    ) -> None:
        super().__init__(settings, executor, clients, profile, prices)
        self._groups: dict[str, Group] = {}
        self._real_prices = InstancePrices(clients, prices)
        self._suffix = "amazonaws.com"
        self._asker = Asker(
            clients,
            self._groups,
            fleet=self._fleet,
            template=self._define,
            started_by=self._started_by,
            end=self._end,
            stop_hint=self.stop_hint,
        )
        if not profile.instance_profile or not profile.key_secret:
            name = profile.name
            up = f"cloudexec up --name {name}" if name not in ("", "default") else "cloudexec up"
            raise ConfigError(
                f"the profile {name!r} has nothing for EC2 instances of their own, which EC2(...) "
                f"would start: `{up} --with ec2` adds it; Batch(compute='ec2') needs `{up} --ec2`"
            )

    # The start.

    async def _check(self) -> None:
        if self._settings.instance_types:
            await self._check_types(self._settings.instance_types)
        client = await self._clients.client("ec2")
        # Names of hosts end otherwise in China.
        host = str(client.meta.endpoint_url)
        self._suffix = "amazonaws.com.cn" if host.endswith(".cn") else "amazonaws.com"
        self._image = await self._find_image()

    async def _check_types(self, types: Sequence[str]) -> None:
        """Refuse types that there are none of here, or that are too small."""
        # By a filter: one name that there is not would be an error for all of them.
        wanted = [{"Name": "instance-type", "Values": list(types)}]
        answer = await self._call("ec2", "describe_instance_types", Filters=wanted)
        found = {each["InstanceType"] for each in answer["InstanceTypes"]}
        if unknown := sorted(set(types) - found):
            raise ConfigError(
                f"there are no instances of type {', '.join(unknown)} in {self._clients.region}: "
                f"`aws ec2 describe-instance-types` lists those that there are"
            )
        for size in self._settings.sizes:
            fitting = [
                each["InstanceType"]
                for each in answer["InstanceTypes"]
                if each["VCpuInfo"]["DefaultVCpus"] >= size.vcpus
                and each["MemoryInfo"]["SizeInMiB"] >= size.memory_mib
                and _gpus(each) >= size.gpus
            ]
            if missing := sorted(set(types) - set(fitting)):
                raise ConfigError(
                    f"instances of type {', '.join(missing)} have less than {size}: name larger "
                    f"types, or ask for less (vcpus=, memory=, gpus=)"
                )

    async def close(self) -> None:
        """End what was started for the executor as a whole."""
        await self._asker.close()
        await self._real_prices.close()
        await super().close()

    def spot_patience(self, workers: int) -> float:
        """Say in how many seconds so many workers find a place on Spot, if there is any."""
        return _SPOT_PATIENCE + workers / MOST_INSTANCES / CALLS_PER_SECOND

    def lacks_capacity(self, reason: str) -> bool:
        """Say whether Amazon EC2 has said that there is no capacity."""
        return lacks_capacity(reason)

    async def is_full(self, jobs: Sequence[WaitingJob]) -> bool:
        """Say whether workers wait since others of this executor use up the account's quota."""
        reasons = [each.reason for each in jobs if each.reason and each.counts.get(Phase.WAITING)]
        placed = any(
            each.counts.get(Phase.STARTING) or each.counts.get(Phase.RUNNING) for each in jobs
        )
        return placed and bool(reasons) and all(map(is_over_quota, reasons))

    # Prices.

    async def _price_of(self, group: Group) -> WorkerPrice | None:
        """Say what the workers of a group cost on average, by the instances that they have."""
        found: list[float] = []
        for instance_type, zone in group.machines.values():
            per_hour = await self._real_prices.per_hour(instance_type, zone, spot=group.spot)
            if per_hour is None:
                return None
            found.append(per_hour)
        if not found:
            return None
        kinds = ", ".join(sorted({kind for kind, _ in group.machines.values()}))
        return instance_price(
            self._prices,
            sum(found) / len(found),
            spot=group.spot,
            disk_gib=self._settings.disk_gib,
            public_ip=self._public_ip,
            estimated=group.spot,
            region=self._clients.region,
            note=f"{kinds} at the Spot price when it started" if group.spot else kinds,
        )

    # Submission.

    async def prepare(self) -> None:
        """Find the launch template, or make it; and wait for the turn of this job.

        That is done here since the wait may be long, and ends when the executor shuts down.
        """
        await self._define()
        await self._asker.turn()

    async def _ensure(self, spec: DefinitionSpec) -> str:
        settings, profile = self._settings, self._profile
        parameter = image_parameter(settings.arch, gpus=bool(settings.gpus))
        groups = settings.security_groups or tuple(filter(None, [profile.security_group]))
        wanted = TemplateSpec(
            instance_profile=profile.instance_profile,
            ami=settings.ami or f"resolve:ssm:{parameter}",
            security_groups=groups,
            assign_public_ip=self._public_ip,
            disk_gib=settings.disk_gib,
            stack=profile.stack,
        )
        return await ensure_template(self._clients, template_request(wanted))

    async def submit(self, request: JobRequest) -> Submitted:
        """Ask for instances; where there is no capacity for some, these workers wait."""
        group = self._groups.get(request.name)
        if group is None:
            group = self._groups[request.name] = Group(request.name)
        if not group.workers:
            group.workers = [Worker() for _ in range(request.workers)]
        group.request, group.spot = request, request.spot
        await self._asker.ask(group)
        return self._taken(group)

    def _taken(self, group: Group) -> Submitted:
        """Answer for a group from now on."""
        group.is_taken = True
        if group.waits:
            self._asker.ask_again()
        return Submitted(job_id=group.name, worker_ids=group.ids)

    def _fleet(self, group: Group, count: int) -> Fleet:
        request, settings = group.request, self._settings
        assert request is not None
        environment = {
            "CLOUDEXEC_LIFETIME": str(math.ceil(settings.max_runtime)),
            **({"CLOUDEXEC_DRAIN_GRACE": str(_SPOT_DRAIN)} if group.spot else {}),
            **request.environment,
        }
        first = environment.pop("CLOUDEXEC_LAUNCH")
        script = machine_script(
            MachineScript(
                image=self._image,
                region=self._clients.region,
                dns_suffix=self._suffix,
                log_group=self._profile.log_group,
                key_secret=self._profile.key_secret,
                environment=environment,
                own_variables={
                    "CLOUDEXEC_IDENTITY": f"{first}@{{instance}}",
                    "CLOUDEXEC_JOB_ID": "{instance}",
                },
                lifetime=self._lifetime,
                spot=group.spot,
                gpus=bool(settings.gpus),
            )
        )
        return Fleet(
            name=group.name,
            attempt=group.attempt,
            template=self._definition,
            count=count,
            size=settings.size_of(request.size),
            instance_types=settings.instance_types,
            subnets=settings.subnets or self._profile.subnets,
            spot=group.spot,
            script=script,
            tags={
                **self._tags(self._lifetime),
                names.TAG_JOB: group.name,
                names.TAG_DISK: str(settings.disk_gib),
                "Name": group.name,
            },
        )

    @property
    def _lifetime(self) -> float:
        """Seconds after which an instance turns itself off."""
        return _BOOT_SECONDS + self._settings.max_runtime + _LAST_SECONDS

    async def find(self, name: str, *, spot: bool) -> Submitted | None:
        """Find the instances of a job by their tag."""
        instances = await self._started_by(name)
        if not instances:
            return None
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = Group(name, spot)
        if not group.workers:
            group.workers = [Worker() for _ in instances]
        self._asker.end_soon(group.take(instances))
        group.is_unsure = group.request is not None and bool(group.lacking)
        return self._taken(group)

    async def _started_by(self, name: str) -> list[str]:
        """Return the ids of the instances of a job that there are, also of those that ended."""
        tags = {names.TAG_JOB: [name]}
        return [str(each["InstanceId"]) async for each in find_instances(self._clients, tags)]

    # Looking.

    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        """Ask for the states of instances: all of the executor's at once."""
        tags = {names.TAG_EXECUTOR: [self._executor.id]}
        instances: dict[str, Mapping[str, Any]] = {}
        of_jobs: dict[str, list[str]] = {}
        async for each in find_instances(self._clients, tags):
            instances[each["InstanceId"]] = each
            of_jobs.setdefault(tags_of(each).get(names.TAG_JOB, ""), []).append(each["InstanceId"])
        found: dict[str, JobStatus] = {}
        for inspection in inspections:
            name = inspection.job_id
            group = self._groups.get(name) or self._learn(inspection, of_jobs.get(name, []))
            if group is None:
                continue
            if group.asking is None:
                # One that is listed, and was in no answer.
                self._asker.end_soon(group.take(of_jobs.get(name, ())))
            workers = {
                index: await self._status(inspection, index, group, instances)
                for index in range(len(group.workers))
                if index not in inspection.settled
            }
            ended = len(group.workers) - len(workers)
            counts = {Phase.ENDED: ended} if ended else {}
            for status in workers.values():
                counts[status.phase] = counts.get(status.phase, 0) + 1
            waits = any(status.phase is Phase.WAITING for status in workers.values())
            found[name] = JobStatus(
                workers=workers,
                counts=counts or {Phase.ENDED: 0},
                reason=group.reason if waits else "",
                worker_ids=group.ids,
                price=await self._price_of(group),
            )
        return found

    def _learn(self, inspection: Inspection, listed: Sequence[str]) -> Group | None:
        """Take over the instances of a job that an earlier process has asked for."""
        if not listed:
            return None
        group = Group(inspection.job_id)
        ids = list(inspection.worker_ids) or sorted(listed)
        ids += [""] * (inspection.workers - len(ids))
        group.workers = [Worker(each, asked_at=time.monotonic()) for each in ids]
        self._groups[inspection.job_id] = group
        return group

    async def _status(
        self,
        inspection: Inspection,
        index: int,
        group: Group,
        instances: Mapping[str, Mapping[str, Any]],
    ) -> WorkerStatus:
        worker = group.workers[index]
        if worker.end is not None:
            return WorkerStatus(phase=Phase.ENDED, ends=[worker.end])
        if not worker.instance:
            gone = group.request is None or worker.is_doomed
            return WorkerStatus(phase=Phase.ENDED if gone else Phase.WAITING, reason=group.reason)
        instance = instances.get(worker.instance)
        if instance is None:
            return self._missing(worker)
        worker.is_known, worker.missing_since = True, None
        group.spot = group.spot or instance.get("InstanceLifecycle") == "spot"
        zone = str(instance.get("Placement", {}).get("AvailabilityZone", ""))
        group.machines[worker.instance] = (str(instance["InstanceType"]), zone)
        phase = phase_of_instance(instance)
        if phase is not Phase.ENDED:
            worker.seen = WorkerStatus(phase=phase)
            return worker.seen
        if found_no_capacity(instance) and group.request is not None and not worker.is_doomed:
            reason = instance["StateReason"]
            self._asker.go_without(group, worker, f"{reason['Code']}: {reason.get('Message', '')}")
            self._asker.ask_again()
            return WorkerStatus(phase=Phase.WAITING, reason=group.reason)
        if worker.seen.phase is Phase.ENDED and not inspection.asks_why(index, 1, over=True):
            return worker.seen
        end = await self._how_it_ended(inspection, index, worker, instance)
        worker.seen = WorkerStatus(phase=phase, ends=[worker_end(end, run_of_instance(instance))])
        return worker.seen

    async def _how_it_ended(
        self, inspection: Inspection, index: int, worker: Worker, instance: Mapping[str, Any]
    ) -> JobEnd:
        words: LastWords | None = None
        asks = inspection.asks_why(index, 1, over=True)
        if asks:
            words = last_words(await self._inquiry.tail(boot_stream(worker.instance)))
        end = end_of_instance(
            instance,
            words,
            size=self._settings.size_of(self._size_of(worker)),
            image=self._image,
            lifetime=self._settings.max_runtime,
        )
        if asks and not end.reclaimed:
            tail = await self._inquiry.tail(container_stream(worker.instance))
            end = replace(end, log_tail=tail, relay=self._inquiry.relay)
        return end

    def _size_of(self, worker: Worker) -> int:
        groups = (each for each in self._groups.values() if worker in each.workers)
        request = next((each.request for each in groups), None)
        return 0 if request is None else request.size

    def _missing(self, worker: Worker) -> WorkerStatus:
        """Say how a worker is whose instance Amazon EC2 does not know."""
        if worker.seen.phase is Phase.ENDED:
            return worker.seen
        if not is_forgotten(worker):
            return worker.seen
        forgotten = (
            "Amazon EC2 does not know its instance any more: it has ended some time ago, or is "
            "ended now"
        )
        worker.end = WorkerEnd(reason=Reason(forgotten))
        # Should it run after all, nothing else would end it.
        self._asker.end_soon([worker.instance])
        return WorkerStatus(phase=Phase.ENDED, ends=[worker.end])

    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        """Say why workers do not come, by what Amazon EC2 has said of them."""
        for each in waiting:
            group = self._groups.get(each.job_id)
            if group is not None and (trouble := self._asker.trouble(group)):
                # This says nothing of the workers themselves, and may pass.
                text = f"Amazon EC2 cannot be asked for instances now: {trouble}"
                return Reason(text, "it is tried again")
        return reason_of(cause_of_waiting_instances(self._inquiry.known(waiting, ends)))

    # The end.

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        """Terminate instances, without a shutdown of their systems, and ask for no more of them."""
        instances: set[str] = set()
        groups: list[tuple[Group, Target]] = []
        for target in targets:
            group = self._groups.get(target.job_id)
            if group is None:
                ids = target.worker_ids
                group = Group(target.job_id, is_unsure=not ids)
                group.workers = [Worker(each) for each in ids]
                self._groups[target.job_id] = group
            indexes = range(len(group.workers)) if target.workers is None else target.workers
            for index in indexes:
                if index < len(group.workers):
                    group.workers[index].is_doomed = True
            groups.append((group, target))
        for group, target in groups:
            if group.asking is not None and any(
                each.is_doomed and not each.instance for each in group.workers
            ):
                # If this lasts longer than it is waited for, what was started is ended when the
                # answer comes.
                await asyncio.wait([group.asking])
            instances |= {each.instance for each in group.workers if each.is_doomed} - {""}
            if group.is_unsure and target.workers is None:
                instances |= set(await self._started_by(group.name))
        if instances:
            await self._end(instances)

    async def _end(self, instances: Iterable[str]) -> None:
        async with self._gate:
            await end_instances(self._clients, instances)


def _gpus(kind: Mapping[str, Any]) -> int:
    """Return how many GPUs a type has that the system with drivers can use.

    References:
        Amazon EC2 API Reference, "GpuDeviceInfo": a type with parts of a GPU has a logical count.
    """
    return sum(
        max(each.get("Count", 0), each.get("LogicalGpuCount", 0))
        for each in kind.get("GpuInfo", {}).get("Gpus", ())
        if each.get("Manufacturer", "").upper() == "NVIDIA"
    )
