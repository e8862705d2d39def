"""AWS Batch as a platform: workers are jobs and array jobs, whose definitions are found by name."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from cloudexec._aws import names
from cloudexec._aws.address import advertised_address
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.definitions import ensure_definition, pin_image
from cloudexec._aws.diagnosis import (
    JobEnd,
    allowed_vcpus,
    cause_of_refusal,
    cause_of_waiting,
    is_definition_gone,
    is_out_of_capacity,
)
from cloudexec._aws.key import stack_key
from cloudexec._aws.limits import ARRAY_LARGEST, DESCRIBE_JOBS, WorkerSize
from cloudexec._aws.prices import PriceTable
from cloudexec._aws.profile import Profile
from cloudexec._aws.relays import AUTO, lacks_for_relay, relay_price
from cloudexec._aws.requests import DefinitionSpec, definition_request, submit_request, tag_value
from cloudexec._enrolment import python_version
from cloudexec._environment.packages import Packages
from cloudexec._errors import AwsError, ConfigError
from cloudexec._launchers.base import Cost
from cloudexec._launchers.batch.inquiry import DEFAULT_LOG_GROUP, Inquiry
from cloudexec._launchers.batch.reading import PHASES, end_of, run_of, worker_end
from cloudexec._launchers.batch.relay import RelayJob, RelayOrder
from cloudexec._launchers.platform import (
    ExecutorInfo,
    Inspection,
    JobRequest,
    JobStatus,
    Phase,
    Platform,
    Reason,
    Site,
    Submitted,
    Target,
    WaitingJob,
    WorkerEnd,
    WorkerStatus,
)
from cloudexec._log import tell
from cloudexec._pricing import WorkerPrice

__all__ = ["BatchPlatform", "Settings", "connect"]


_CONCURRENT_CALLS = 8
_FARGATE_SPOT_PATIENCE = 60.0
_EC2_SPOT_PATIENCE = 300.0
"""An instance takes minutes until it runs a job: until then, a job that waits tells nothing."""
_FARGATE_BURST = 100
_FARGATE_PER_SECOND = 20
"""Tasks that Fargate starts at once, and per second after that, on Spot as on demand. Amazon ECS
Developer Guide, "AWS Fargate throttling quotas"."""
_RELAY_LIFETIME = 24 * 3600.0
"""Seconds after which AWS ends a relay, unless workers may run for longer."""
_TERMINATED_AT_ONCE = 50
"""Jobs in one TerminateJobs call. AWS Batch API Reference."""


class Settings(Protocol):
    """What the platform must know of the settings of ``Batch``, which describes them."""

    arch: str
    assign_public_ip: bool | None
    compute: str
    definition: str | None
    ephemeral_gib: int | None
    execution_role: str | None
    image: str | None
    job_role: str | None
    max_runtime: float
    packages: Packages | None
    profile: str | None
    project: str
    queue: str | None
    region: str | None
    relay: str | bool | None
    scheduling_priority: int
    share_identifier: str
    sizes: tuple[WorkerSize, ...]
    spot: bool | str
    tags: dict[str, str]

    def size_of(self, size: int) -> WorkerSize:
        """Return a size as AWS has it."""


@contextlib.asynccontextmanager
async def connect(settings: Settings, executor: ExecutorInfo) -> AsyncIterator[Site]:
    """Connect to AWS, check what can be checked, and find the address that workers dial.

    Raises:
        ConfigError: If there is no such profile, queue or definition, or no address to dial.
        AwsError: If AWS refuses.
        LaunchError: If the stack's key cannot be used.
    """
    profile = Profile(name="", region=settings.region or "")
    if settings.profile is not None:
        profile = await asyncio.to_thread(Profile.load, settings.profile)
    there = names.region_of(settings.queue or "")
    async with AwsClients(settings.region or profile.region or there or None) as clients:
        if there not in ("", clients.region):
            raise ConfigError(
                f"the queue {settings.queue} is in {there}, and not in {clients.region}: "
                f"give region={there!r}, or another queue"
            )
        prices = await asyncio.to_thread(PriceTable.load, clients.region)
        platform = BatchPlatform(settings, executor, clients, profile, prices)
        try:
            yield await platform.start()
        finally:
            await platform.close()


class BatchPlatform(Platform):
    """AWS Batch, for one executor.

    Args:
        settings: What workers to run.
        executor: Whose.
        clients: For calls to AWS.
        profile: Names what the account has for workers.
        prices: Of the clients' region.
    """

    name = "AWS Batch"
    most_workers = ARRAY_LARGEST

    def __init__(
        self,
        settings: Settings,
        executor: ExecutorInfo,
        clients: AwsClients,
        profile: Profile,
        prices: PriceTable,
    ) -> None:
        self.stop_hint = f"`cloudexec stop --executor {executor.id}` tries again"
        self._settings = settings
        self._executor = executor
        self._clients = clients
        self._profile = profile
        self._prices = prices
        self._image = ""
        self._definition = ""
        self._defining = asyncio.Lock()
        self._keyed_by_stack = bool(profile.key_secret)
        self._inquiry = Inquiry(self._call, settings.compute)
        self._inquiry.log_group = profile.log_group or DEFAULT_LOG_GROUP
        self._gate = asyncio.Semaphore(_CONCURRENT_CALLS)
        self._relay: RelayJob | None = None

    # The start.

    async def start(self) -> Site:
        """Check queues and definition, read the key, and find the address that workers dial."""
        settings, executor = self._settings, self._executor
        for spot in {bool(settings.spot), bool(settings.spot) and settings.spot != "prefer"}:
            self._queue(spot=spot)  # complains if there is none
        if settings.compute == "ec2" and settings.arch == "arm64" and settings.queue is None:
            raise ConfigError(
                "the queues of `cloudexec up` start x86-64 instances on EC2: workers with "
                "arch='arm64' run on Fargate, or in a queue of your own (queue=)"
            )
        if settings.definition is not None:
            await self._check_definition(settings.definition)
        else:
            self._image = await self._find_image()
        key = await stack_key(self._call, self._profile) if self._keyed_by_stack else b""
        relay = self._profile.relay if settings.relay is None else settings.relay
        if isinstance(relay, str) and relay not in ("", AUTO):
            return self._behind_relay(relay, key)
        if relay is True:
            return await self._with_relay(key, "as relay=True says")
        try:
            found = await advertised_address(
                self._profile, advertise=executor.advertise, endpoint=self._clients.endpoint
            )
        except ConfigError as exc:
            if relay != AUTO:
                raise
            return await self._with_relay(key, str(exc).partition(". ")[0])
        self._inquiry.advertised = f"{found.address} ({found.how})"
        return Site(
            platform=self,
            listen=f"{found.listen}:{found.port}",
            advertise=found.address,
            key=key,
            bucket=self._profile.bucket,
            region=self._profile.region,
        )

    async def close(self) -> None:
        """End what was started for the executor as a whole."""
        if self._relay is not None:
            await self._relay.close()

    def overhead(self) -> Cost:
        """Say what the relay costs, if there is one."""
        return Cost() if self._relay is None else self._relay.cost()

    async def _with_relay(self, key: bytes, why: str) -> Site:
        """Start a relay, and wait for its address.

        Args:
            key: The stack's.
            why: Why there is to be one.
        """
        settings, profile = self._settings, self._profile
        self._check_key(key, "True")
        if lacking := lacks_for_relay(profile):
            raise ConfigError(f"{why}; and no relay can be started: {lacking}")
        # All workers of the executor come through it, one after the other.
        lifetime = max(settings.max_runtime, _RELAY_LIFETIME)
        order = RelayOrder(
            executor_id=self._executor.id,
            queue=profile.queues[names.RELAY_QUEUE],
            definition=replace(await self._definition_spec(), key_secret=profile.key_secret),
            tags=self._tags(lifetime),
            bucket=profile.bucket,
            patience=self._executor.launch_timeout,
            lifetime=lifetime,
            price=relay_price(self._prices, settings.arch, self._clients.region),
            why=why,
        )
        self._relay = relay = RelayJob(self._clients, order, self._inquiry)
        await relay.start()
        return replace(self._behind_relay(relay.address, key), moving=relay)

    def _behind_relay(self, relay: str, key: bytes) -> Site:
        if not relay.startswith("ssh://"):
            self._check_key(key, repr(relay))
        self._inquiry.relay = relay
        return Site(
            platform=self,
            listen="127.0.0.1:0",
            advertise=self._executor.advertise,
            key=key,
            bucket=self._profile.bucket,
            region=self._profile.region,
            relay=relay,
        )

    @staticmethod
    def _check_key(key: bytes, relay: str) -> None:
        if not key:
            raise ConfigError(
                f"relay={relay} checks who belongs to the executor by the key of a stack: give "
                f"profile=, and no definition= without that key; or use relay='ssh://user@host'"
            )

    async def _check_definition(self, name: str) -> None:
        """Look at a definition that the user wants: whether it is there, and whose key it has."""
        parameters: dict[str, Any] = {"jobDefinitions": [name]}
        if ":" not in name:
            parameters = {"jobDefinitionName": name, "status": "ACTIVE"}
        found = await self._call("batch", "describe_job_definitions", **parameters)
        if not found["jobDefinitions"]:
            raise ConfigError(
                f"there is no job definition {name!r}; `cloudexec definitions list` shows ours"
            )
        newest = max(found["jobDefinitions"], key=lambda each: int(each["revision"]))
        if newest.get("status", "ACTIVE") != "ACTIVE":
            raise ConfigError(f"the job definition {name!r} has been deregistered")
        container = newest.get("containerProperties")
        if not container:
            kinds = ("ecsProperties", "eksProperties", "nodeProperties")
            kind = next((each for each in kinds if newest.get(each)), "no containerProperties")
            raise ConfigError(
                f"the job definition {name!r} has {kind}, and workers run only in definitions with "
                f"containerProperties: register such a one, or leave definition= out and let the "
                f"executor register its own"
            )
        self._definition = newest["jobDefinitionArn"]
        options = container.get("logConfiguration", {}).get("options", {})
        self._inquiry.log_group = options.get("awslogs-group", DEFAULT_LOG_GROUP)
        secrets_ = container.get("secrets", ())
        keys = [each["valueFrom"] for each in secrets_ if each["name"] == "CLOUDEXEC_KEY"]
        if keys and keys[0] != self._profile.key_secret:
            known = f"the one of the profile {self._profile.name!r}"
            raise ConfigError(
                f"the job definition {name!r} gives workers another key ({keys[0]}) than "
                f"{known if self._profile.name else 'a launch without a profile has'}: give "
                f"profile=, the one of its stack"
            )
        self._keyed_by_stack = bool(keys)

    async def _call(self, service: str, operation: str, **parameters: Any) -> Any:
        async with self._gate:
            return await self._clients.call(service, operation, **parameters)

    def _queue(self, *, spot: bool) -> str:
        settings = self._settings
        if settings.queue is not None:
            return settings.queue
        kind = settings.compute + ("_spot" if spot else "")
        queue = self._profile.queues.get(kind, "")
        if not queue:
            there = ", ".join(sorted(self._profile.queues)) or "none"
            hint = "; `cloudexec up --ec2` adds them" if settings.compute == "ec2" else ""
            raise ConfigError(
                f"the profile {self._profile.name!r} has no queue for {kind} (it has: {there})"
                f"{hint}"
            )
        return queue

    @property
    def _public_ip(self) -> bool:
        given = self._settings.assign_public_ip
        return self._profile.assign_public_ip if given is None else given

    def price(self, size: int, spot: bool) -> WorkerPrice:
        """Say what a worker of a size costs, by the list price."""
        settings = self._settings
        worker = settings.size_of(size)
        return self._prices.worker(
            vcpus=worker.vcpus,
            memory_mib=worker.memory_mib,
            gpus=worker.gpus,
            arch=settings.arch,
            compute=settings.compute,
            spot=spot,
            ephemeral_gib=settings.ephemeral_gib,
            public_ip=self._public_ip,
            region=self._clients.region,
        )

    def spot_patience(self, workers: int) -> float:
        """Say in how many seconds so many workers find a place on Spot, if there is any."""
        if self._settings.compute == "ec2":
            return _EC2_SPOT_PATIENCE
        return _FARGATE_SPOT_PATIENCE + max(0, workers - _FARGATE_BURST) / _FARGATE_PER_SECOND

    def lacks_capacity(self, reason: str) -> bool:
        """Say whether AWS Batch has said that there is no capacity."""
        return is_out_of_capacity(reason)

    async def is_full(self, jobs: Sequence[WaitingJob]) -> bool:
        """Say whether workers of ours use all that the compute environments allow."""
        _, environments = await self._inquiry.queue(self._queue(spot=True))
        least = min(self._settings.size_of(each.size).vcpus for each in jobs)
        return 0 < allowed_vcpus(environments) < self._used_vcpus(jobs) + least

    def _used_vcpus(self, jobs: Iterable[WaitingJob]) -> float:
        return sum(
            self._settings.size_of(each.size).vcpus * each.counts.get(phase, 0)
            for each in jobs
            for phase in (Phase.STARTING, Phase.RUNNING)
        )

    # Submission.

    async def prepare(self) -> None:
        """Find the job definition, or register it."""
        async with self._defining:
            if self._definition:
                return
            spec = await self._definition_spec()
            self._definition = await ensure_definition(self._clients, definition_request(spec))

    async def _definition_spec(self) -> DefinitionSpec:
        settings, profile = self._settings, self._profile
        return DefinitionSpec(
            image=self._image or await self._find_image(),
            compute=settings.compute,
            arch=settings.arch,
            execution_role=settings.execution_role or profile.execution_role,
            job_role=settings.job_role or profile.job_role,
            key_secret=profile.key_secret,
            log_group=profile.log_group,
            region=self._clients.region,
            assign_public_ip=self._public_ip,
            ephemeral_gib=settings.ephemeral_gib,
            stack=profile.stack,
            size=settings.sizes[0],
        )

    async def _find_image(self) -> str:
        """Return the image of the workers, pinned; push one with the packages that are wanted.

        That is done before anything is launched: a first time may take minutes, and what cannot be
        had for the workers' platform is known before they cost anything.
        """
        settings, profile = self._settings, self._profile
        platform = "linux/amd64" if settings.arch == "x86_64" else "linux/arm64"
        python = python_version()
        image = settings.image
        if image is None and settings.packages is None:
            image = profile.image(python, platform)
        if image:
            return await pin_image(self._clients, image)
        if not profile.repository:
            named = (
                f"the profile {profile.name!r}" if profile.name else "a launch without a profile"
            )
            raise ConfigError(
                f"there is no worker image for Python {python} on {platform}, and {named} has no "
                f"repository to put one into: give Batch(image=...), or a profile of `cloudexec up`"
            )
        from cloudexec._environment.account import push_to_account

        pushed = await push_to_account(
            settings.packages or Packages(),
            profile,
            self._clients,
            python=python,
            platform=platform,
            report=tell,
        )
        return pushed.uri

    async def submit(self, request: JobRequest) -> Submitted:
        """Submit a job, or an array job for several workers."""
        definition = self._definition
        try:
            try:
                return await self._submit(request, definition)
            except AwsError as exc:
                if self._settings.definition is not None or not is_definition_gone(exc.message):
                    raise
                # Somebody has removed it since: it is registered again.
                if self._definition == definition:
                    self._definition = ""
                await self.prepare()
                return await self._submit(request, self._definition)
        except AwsError as exc:
            exc.message = str(cause_of_refusal(exc.message))
            raise

    async def _submit(self, request: JobRequest, definition: str) -> Submitted:
        settings = self._settings
        parameters = submit_request(
            name=request.name,
            queue=self._queue(spot=request.spot),
            definition=definition,
            workers=request.workers,
            size=settings.size_of(request.size),
            environment={**request.environment, **request.secrets},
            tags=self._tags(settings.max_runtime),
            attempt_seconds=int(settings.max_runtime),
            compute=settings.compute,
            retry_reclaimed=settings.spot != "prefer",
            share_identifier=settings.share_identifier,
            scheduling_priority=settings.scheduling_priority,
        )
        try:
            answer = await self._clients.call("batch", "submit_job", once=True, **parameters)
        except AwsError as exc:
            exc.uncertain = exc.transient and not exc.code.startswith(("TooMany", "Throttl"))
            raise
        return Submitted(job_id=str(answer["jobId"]))

    def _tags(self, lifetime: float) -> dict[str, str]:
        settings = self._settings
        longest = self._executor.launch_timeout + lifetime
        expires = datetime.now(UTC) + timedelta(seconds=longest)
        tags = {
            **settings.tags,
            names.TAG_EXECUTOR: self._executor.id,
            names.TAG_USER: tag_value(_user()),
            names.TAG_EXPIRES: expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        project = settings.project or self._profile.project
        if project:
            tags[names.TAG_PROJECT] = tag_value(project)
        if self._profile.stack:
            tags[names.TAG_STACK] = self._profile.stack
        return tags

    async def find(self, name: str, *, spot: bool) -> Submitted | None:
        """Find a job by its name."""
        listed = await self._call(
            "batch",
            "list_jobs",
            jobQueue=self._queue(spot=spot),
            filters=[{"name": "JOB_NAME", "values": [name]}],
        )
        for summary in listed.get("jobSummaryList", ()):
            if summary["jobName"] == name:
                return Submitted(job_id=str(summary["jobId"]))
        return None

    # Looking.

    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        """Ask for the states of jobs, and of those of their workers that matter."""
        described = await self._describe([each.job_id for each in inspections])
        return {
            each.job_id: await self._status(each, described[each.job_id])
            for each in inspections
            if each.job_id in described
        }

    async def _describe(self, ids: Sequence[str]) -> dict[str, Any]:
        pages = [ids[at : at + DESCRIBE_JOBS] for at in range(0, len(ids), DESCRIBE_JOBS)]
        answers = await asyncio.gather(
            *(self._call("batch", "describe_jobs", jobs=page) for page in pages)
        )
        return {each["jobId"]: each for answer in answers for each in answer["jobs"]}

    async def _status(self, inspection: Inspection, details: Mapping[str, Any]) -> JobStatus:
        reason = details.get("statusReason", "")
        if inspection.workers == 1:
            return JobStatus(workers={0: await self._worker(inspection, 0, details)}, reason=reason)
        counts: Counter[Phase] = Counter()
        summary = details.get("arrayProperties", {}).get("statusSummary", {})
        for state, count in summary.items():
            counts[PHASES[state]] += count
        interesting = set(inspection.wanted)
        over = PHASES[details["status"]] is Phase.ENDED
        if over or counts[Phase.ENDED] > len(inspection.settled):
            for state in ("FAILED", "SUCCEEDED"):
                interesting |= await self._indexes(inspection, state)
            interesting -= set(inspection.settled)
        workers: dict[int, WorkerStatus] = {}
        if inspection.survey and counts[Phase.RUNNING]:
            running = await self._indexes(inspection, "RUNNING")
            workers = dict.fromkeys(running, WorkerStatus(phase=Phase.RUNNING))
        children = [f"{inspection.job_id}:{index}" for index in sorted(interesting)]
        for child_id, child in (await self._describe(children)).items():
            index = _index_of(child_id)
            workers[index] = await self._worker(inspection, index, child)
        return JobStatus(workers=workers, counts=counts, reason=reason)

    async def _indexes(self, inspection: Inspection, state: str) -> set[int]:
        """Return which workers of an array job are in a state of AWS Batch."""
        listed = self._clients.pages(
            "batch", "list_jobs", "jobSummaryList", arrayJobId=inspection.job_id, jobStatus=state
        )
        return {_index_of(summary["jobId"]) async for summary in listed}

    async def _worker(
        self, inspection: Inspection, index: int, details: Mapping[str, Any]
    ) -> WorkerStatus:
        phase = PHASES[details["status"]]
        attempts = details.get("attempts", ())
        over = phase is Phase.ENDED
        ends = [run_of(each) for each in attempts]
        if attempts or over:
            end = end_of(details, attempts)
            if not end.reclaimed and inspection.asks_why(index, len(attempts), over=over):
                tail = await self._inquiry.log_tail(details)
                end = replace(end, log_tail=tail, retried=not over, relay=self._inquiry.relay)
            # A job that failed before its first attempt began has an end, and no run.
            run = ends.pop() if ends else run_of({"stoppedAt": details.get("stoppedAt")})
            ends.append(worker_end(end, run))
        return WorkerStatus(phase=phase, reason=details.get("statusReason", ""), ends=ends)

    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        """Ask AWS why workers do not come: queue, environments, quotas."""
        oldest = waiting[0]
        situation = await self._inquiry.situation(
            waiting,
            [end.details for end in ends if isinstance(end.details, JobEnd)],
            queue=self._queue(spot=oldest.spot),
            vcpus=self._settings.size_of(oldest.size).vcpus,
            used_vcpus=self._used_vcpus(each for each in waiting if each.spot == oldest.spot),
        )
        cause = cause_of_waiting(situation)
        if cause is None:
            return None
        return Reason(cause.text, cause.remedy, cause.fatal, no_room=cause.no_room)

    # The end.

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        """Terminate jobs, or some workers of array jobs: many with one request where AWS can."""
        ids = [
            job_id
            for each in targets
            for job_id in (
                [each.job_id]
                if each.workers is None
                else [f"{each.job_id}:{index}" for index in each.workers]
            )
        ]
        # Older SDKs do not know of it.
        if len(ids) > 1 and hasattr(await self._clients.client("batch"), "terminate_jobs"):
            size = _TERMINATED_AT_ONCE
            pages = [ids[at : at + size] for at in range(0, len(ids), size)]
            await _all(self._terminate_many(page, reason) for page in pages)
        else:
            await _all(self._terminate_one(job_id, reason) for job_id in ids)

    async def _terminate_one(self, job_id: str, reason: str) -> None:
        await self._call("batch", "terminate_job", jobId=job_id, reason=reason)

    async def _terminate_many(self, ids: Sequence[str], reason: str) -> None:
        try:
            answer = await self._call("batch", "terminate_jobs", jobs=list(ids), reason=reason)
        except AwsError as exc:
            if exc.may_pass:
                raise
            # An endpoint that does not know the newer call.
            left = list(ids)
        else:
            left = [str(each.get("jobId") or each.get("job")) for each in answer.get("errors", ())]
        await _all(self._terminate_one(job_id, reason) for job_id in left)


async def _all(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Make calls at once, all of them to their end, and then raise what the first one raised."""
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def _index_of(child_id: str) -> int:
    return int(child_id.rpartition(":")[2])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
