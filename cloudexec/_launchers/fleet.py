"""A fleet: the AWS Batch jobs of one executor, from submission to the last one's end.

Everything runs on the executor's loop thread. ``launch`` starts a task that submits; one more task
watches: it asks AWS for the states of jobs that matter now, reports ends, and finds out why workers
do not come. The connection of a worker is the sign that it lives; AWS is asked for the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import getpass
import hashlib
import hmac
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import tenacity

from cloudexec._aws import names
from cloudexec._aws.address import advertised_address
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.definitions import ensure_definition, pin_image
from cloudexec._aws.diagnosis import (
    JobEnd,
    cause_of_end,
    cause_of_refusal,
    cause_of_waiting,
    is_definition_gone,
)
from cloudexec._aws.limits import DESCRIBE_JOBS, WorkerSize, array_sizes
from cloudexec._aws.prices import LEAST_SECONDS, PriceTable, WorkerPrice, run_seconds
from cloudexec._aws.profile import Profile
from cloudexec._aws.requests import DefinitionSpec, definition_request, submit_request, tag_value
from cloudexec._enrolment import python_version
from cloudexec._errors import AwsError, CloudexecError, ConfigError, LaunchError
from cloudexec._launchers import ending
from cloudexec._launchers.base import (
    Arrival,
    Contact,
    Cost,
    LaunchEnd,
    LaunchRequest,
    LaunchTimes,
    Network,
    Survivor,
)
from cloudexec._launchers.ending import Terminator
from cloudexec._launchers.inquiry import DEFAULT_LOG_GROUP, Inquiry
from cloudexec._launchers.jobs import Job, Member, dump, end_of, ended_at, load, seconds_of
from cloudexec._log import Log

if TYPE_CHECKING:
    from cloudexec._launchers.batch import Batch

__all__ = ["Fleet"]

_logger = Log()

_POLL_EVIDENCE = 0.5
"""Seconds between looks at AWS while the end of a lost worker is to be explained."""
_POLL_WAITING = 1.0
_POLL_WAITING_LONG = 6.0
_POLL_SLOWEST = 15.0
_POLL_GROWTH = 1.25
_TAKE_OVER_PATIENCE = 60.0
"""Seconds for which AWS is asked for the workers of an earlier process, which wait meanwhile."""
_SUBMIT_PATIENCE = 300.0
"""Seconds for which a submission that AWS cannot take now is tried again."""
_LOOK_UP_PAUSE = 1.0
"""Seconds before a job whose submission went unanswered is looked up: lists lag a little."""
_RECLAIMS_BEFORE_ON_DEMAND = 3
_RECLAIMED_SHARE = 0.25
"""Of all Spot workers launched so far: one wave among many is no reason to leave."""
_SPOT_PATIENCE = 60.0
"""Seconds for which ``spot="prefer"`` waits for spare capacity, or a third of ``launch_timeout``"""
_SPOT_PAUSE = 600.0
"""Seconds in which it is not asked for again."""
_KEY_BYTES = 32
_STOP_SECONDS = 30.0
"""What it takes to stop a worker: the time between SIGTERM and SIGKILL."""
_DIAGNOSE_AFTER = 2.0
_DIAGNOSE_EVERY = 5.0
_CONCURRENT_CALLS = 8


class Fleet:
    """See the module. One serves one executor.

    Args:
        settings: What workers to run.
        executor_id: Whose.
    """

    def __init__(self, settings: Batch, executor_id: str) -> None:
        self.explanation = ""
        self.closed = False
        self._settings = settings
        self._executor_id = executor_id
        self._profile = Profile(name="", region=settings.region or "")
        self._clients: AwsClients | None = None
        self._secret = secrets.token_bytes(32)
        self._definition = ""
        self._keyed_by_stack = False
        self._inquiry = Inquiry(self._call, settings.compute)
        self._terminator = Terminator(self._call, self._batch_client, executor_id)
        self._defining = asyncio.Lock()
        self._jobs: list[Job] = []
        self._job_of: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._submitting: dict[asyncio.Task[Any], Job] = {}
        self._watcher: asyncio.Task[None] | None = None
        self._look = asyncio.Event()
        self._closing = asyncio.Event()
        self._launch_timeout = settings.launch_timeout
        self._reclaims = 0
        self._no_spot_until = float("-inf")
        self._ends: list[JobEnd] = []
        self._diagnosed_at = float("-inf")
        self._unreachable = False
        self._gate = asyncio.Semaphore(_CONCURRENT_CALLS)
        self._prices = PriceTable.built_in()
        self._inherited_usd = 0.0  # what jobs cost that were over before this process began

    # The start.

    async def start(self, listen: str, advertise: str, launch_timeout: float) -> Network:
        self._launch_timeout = launch_timeout
        settings = self._settings
        if settings.profile is not None:
            self._profile = await asyncio.to_thread(Profile.load, settings.profile)
        there = names.region_of(settings.queue or "")
        self._clients = AwsClients(settings.region or self._profile.region or there or None)
        if there not in ("", self._clients.region):
            raise ConfigError(
                f"the queue {settings.queue} is in {there}, and not in {self._clients.region}: "
                f"give region={there!r}, or another queue"
            )
        self._prices = await asyncio.to_thread(PriceTable.load, self._clients.region)
        for spot in {bool(settings.spot), bool(settings.spot) and settings.spot != "prefer"}:
            self._queue(spot=spot)  # complains if there is none
        if settings.compute == "ec2" and settings.arch == "arm64" and settings.queue is None:
            raise ConfigError(
                "the queues of `cloudexec up` start x86-64 instances on EC2: workers with "
                "arch='arm64' run on Fargate, or in a queue of your own (queue=)"
            )
        self._keyed_by_stack = bool(self._profile.key_secret)
        self._inquiry.log_group = self._profile.log_group or DEFAULT_LOG_GROUP
        if settings.definition is not None:
            await self._check_definition(settings.definition)
        key = b""
        if self._keyed_by_stack:
            secret = await self._call(
                "secretsmanager", "get_secret_value", SecretId=self._profile.key_secret
            )
            with contextlib.suppress(KeyError, ValueError):
                key = bytes.fromhex(secret["SecretString"])
            if len(key) != _KEY_BYTES:
                raise LaunchError(
                    f"the stack's key cannot be used: {self._profile.key_secret} does not hold "
                    f"{2 * _KEY_BYTES} hexadecimal digits; put such a value into it, or "
                    f"`cloudexec down` and `cloudexec up` make it anew"
                )
        found = await advertised_address(
            self._profile, advertise=advertise, endpoint=self._clients.endpoint
        )
        self._inquiry.advertised = f"{found.address} ({found.how})"
        return Network(listen or f"{found.listen}:{found.port}", found.address, key)

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
        self._definition = newest["jobDefinitionArn"]
        container = newest.get("containerProperties", {})
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
        assert self._clients is not None
        async with self._gate:
            return await self._clients.call(service, operation, **parameters)

    async def _batch_client(self) -> Any:
        assert self._clients is not None
        return await self._clients.client("batch")

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

    # Launching.

    def launch(
        self,
        contact: Contact,
        requests: Sequence[LaunchRequest],
        on_end: Callable[[str, LaunchEnd], None],
    ) -> None:
        settings = self._settings
        spot = self._on_spot
        size = settings.size_of(requests[0].rung)
        price = self._price(size, spot)
        at = 0
        for count in array_sizes(len(requests)):
            some = requests[at : at + count]
            at += count
            first = some[0].launch_id
            job = Job(
                first=int(first),
                name=names.job_name(self._executor_id, first),
                queue=self._queue(spot=spot),
                spot=spot,
                size=size,
                price=price,
                members={each.launch_id: Member(index, on_end) for index, each in enumerate(some)},
                asked_at=time.monotonic(),
            )
            self._jobs.append(job)
            for launch_id in job.members:
                self._job_of[launch_id] = job
            task = self._spawn(self._submit(job, contact, some[0].slots))
            self._submitting[task] = job
            task.add_done_callback(lambda done: self._submitting.pop(done, None))
        _logger.info(
            "launching %s (%s%s): about $%.2f an hour while they run (%s)",
            "1 worker" if len(requests) == 1 else f"{len(requests)} workers",
            size,
            ", Spot" if spot else "",
            len(requests) * price.per_hour,
            price.table,
        )

    @property
    def _on_spot(self) -> bool:
        """Whether workers that are launched now run on spare capacity."""
        wanted = self._settings.spot
        return bool(wanted) and not (wanted == "prefer" and self._spot_is_scarce)

    @property
    def _spot_is_scarce(self) -> bool:
        """Whether spare capacity did not come, or was taken back more often than it is worth."""
        if time.monotonic() < self._no_spot_until:
            return True
        workers = sum(len(job.members) for job in self._jobs if job.spot)
        return self._reclaims >= max(_RECLAIMS_BEFORE_ON_DEMAND, workers * _RECLAIMED_SHARE)

    def _price(self, size: WorkerSize, spot: bool) -> WorkerPrice:
        settings = self._settings
        return self._prices.worker(
            vcpus=size.vcpus,
            memory_mib=size.memory_mib,
            gpus=size.gpus,
            arch=settings.arch,
            compute=settings.compute,
            spot=spot,
            ephemeral_gib=settings.ephemeral_gib,
            public_ip=self._public_ip,
            region=self._clients.region if self._clients is not None else "",
        )

    @property
    def _public_ip(self) -> bool:
        given = self._settings.assign_public_ip
        return self._profile.assign_public_ip if given is None else given

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _submit(self, job: Job, contact: Contact, slots: int) -> None:
        try:
            definition = await self._persist(self._find_definition)
            request = self._request(job, contact, slots, definition)
            try:
                await self._persist(lambda: self._submit_once(job, request))
            except AwsError as exc:
                if self._settings.definition is not None or not is_definition_gone(exc.message):
                    raise
                # Somebody has removed it since: it is registered again.
                if self._definition == definition:
                    self._definition = ""
                request["jobDefinition"] = await self._persist(self._find_definition)
                await self._persist(lambda: self._submit_once(job, request))
        except Exception as exc:
            if not isinstance(exc, CloudexecError):
                _logger.exception("internal error while submitting jobs")
            if job.unanswered and not job.id:
                await self._terminate_unanswered(job)
            transient = isinstance(exc, AwsError) and (exc.transient or exc.expired)
            self.explanation = str(cause_of_refusal(str(exc)))
            for launch_id in list(job.members):
                self._end(job, launch_id, LaunchEnd(self.explanation, fatal=not transient))
            return
        job.api = time.monotonic() - job.asked_at
        if job.terminated or self.closed:
            await self._terminate_whole([job], "it is not needed any more")
        elif self._watcher is None:
            self._watcher = self._spawn(self._watch())
        self._look.set()

    async def _persist(self, attempt: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Try again what AWS cannot answer now: throttled, unreachable, credentials expired."""

        def worth_it(exc: BaseException) -> bool:
            if not isinstance(exc, AwsError) or not (exc.transient or exc.expired) or self.closed:
                return False
            if str(exc) != self.explanation:
                self.explanation = str(exc)
                _logger.warning("trying again: %s", exc)
            return True

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(worth_it),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=15.0),
            stop=tenacity.stop_after_delay(_SUBMIT_PATIENCE),
            sleep=self._nap,
            reraise=True,
        )
        async for one in retrying:
            with one:
                result = await attempt()
                if self.explanation and self._unreachable is False and not self._ends:
                    self.explanation = ""
                return result
        raise AssertionError("tenacity returned without a result")

    async def _nap(self, seconds: float) -> None:
        """Sleep, but not past the end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)

    async def _find_definition(self) -> str:
        async with self._defining:
            settings, profile = self._settings, self._profile
            assert self._clients is not None
            if not self._definition:
                spec = DefinitionSpec(
                    image=await pin_image(self._clients, self._image()),
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
                self._definition = await ensure_definition(self._clients, definition_request(spec))
            return self._definition

    def _image(self) -> str:
        platform = "linux/amd64" if self._settings.arch == "x86_64" else "linux/arm64"
        python = python_version()
        image = self._settings.image or self._profile.image(python, platform)
        if not image:
            named = f" --profile {self._profile.name}" if self._profile.name else ""
            if self._settings.arch != "x86_64":
                named += f" --platform {platform}"
            raise LaunchError(
                f"there is no worker image for Python {python} on {platform}: "
                f"`cloudexec image push{named}` builds one and puts it into the repository, or "
                f"give Batch(image=...)"
            )
        return image

    def _request(self, job: Job, contact: Contact, slots: int, definition: str) -> dict[str, Any]:
        settings = self._settings
        environment = {
            **settings.environment,
            "CLOUDEXEC_TARGET": contact.target,
            "CLOUDEXEC_EXECUTOR_ID": contact.executor_id,
            "CLOUDEXEC_LAUNCH": str(job.first),
            "CLOUDEXEC_SLOTS": str(slots),
            "CLOUDEXEC_CERTIFICATE_SHA256": contact.certificate_sha256,
            "CLOUDEXEC_MEMORY_MIB": str(job.size.memory_mib),
        }
        if "PYTHONHASHSEED" not in environment:
            environment["PYTHONHASHSEED"] = contact.hash_seed
            environment["CLOUDEXEC_UNSET"] = "PYTHONHASHSEED"
        if not self._keyed_by_stack:
            environment["CLOUDEXEC_KEY"] = self._token(job).hex()
        longest = self._launch_timeout + settings.max_runtime
        expires = datetime.now(UTC) + timedelta(seconds=longest)
        tags = {
            **settings.tags,
            names.TAG_EXECUTOR: self._executor_id,
            names.TAG_USER: tag_value(_user()),
            names.TAG_EXPIRES: expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        project = settings.project or self._profile.project
        if project:
            tags[names.TAG_PROJECT] = tag_value(project)
        if self._profile.stack:
            tags[names.TAG_STACK] = self._profile.stack
        return submit_request(
            name=job.name,
            queue=job.queue,
            definition=definition,
            workers=len(job.members),
            size=job.size,
            environment=environment,
            tags=tags,
            attempt_seconds=int(settings.max_runtime),
            retry_reclaimed=settings.spot != "prefer",
            share_identifier=settings.share_identifier,
            scheduling_priority=settings.scheduling_priority,
        )

    async def _submit_once(self, job: Job, request: Mapping[str, Any]) -> None:
        """Submit a job, or find out that it was, where an earlier answer got lost."""
        if self.closed or job.terminated:
            raise LaunchError("the executor has shut down")
        assert self._clients is not None
        if job.unanswered:
            await asyncio.sleep(_LOOK_UP_PAUSE)
            found = await self._find_job(job)
            if found:
                job.id = found
                return
        job.sent = True
        try:
            answer = await self._clients.call("batch", "submit_job", once=True, **request)
        except AwsError as exc:
            if exc.transient and not exc.code.startswith(("TooMany", "Throttl")):
                job.unanswered = True
            raise
        job.id = str(answer["jobId"])

    async def _find_job(self, job: Job) -> str:
        listed = await self._call(
            "batch",
            "list_jobs",
            jobQueue=job.queue,
            filters=[{"name": "JOB_NAME", "values": [job.name]}],
        )
        for summary in listed.get("jobSummaryList", ()):
            if summary["jobName"] == job.name:
                return str(summary["jobId"])
        return ""

    async def _terminate_unanswered(self, job: Job) -> None:
        """Find a job that nobody needs any more, if AWS has it, and end it."""
        try:
            await asyncio.sleep(_LOOK_UP_PAUSE)
            job.id = await self._terminator.insist(self._find_job, job)
        except AwsError as exc:
            _logger.error(
                "the job %s may have been submitted, and cannot be looked for: %s. `cloudexec stop "
                "--executor %s` ends it if it is there",
                job.name,
                exc,
                self._executor_id,
            )
        if job.id:
            await self._terminate_whole([job], "it is not needed any more")

    def _token(self, job: Job) -> bytes:
        """The key of one job's workers: whoever reads it can pose as one of them, no more."""
        return hmac.new(self._secret, f"launch {job.first}".encode(), hashlib.sha256).digest()

    def key_of(self, launch_id: str) -> bytes | None:
        if self._keyed_by_stack:
            return None
        job = self._job_of.get(launch_id)
        return self._secret if job is None else self._token(job)

    # Workers come and go.

    def connected(self, launch_id: str, arrival: Arrival) -> None:
        job = self._job_of[launch_id]
        member = job.members[launch_id]
        member.connected = True
        member.lost_at = None
        if arrival.attempt > member.attempts + 1:
            # AWS started it again before we had heard of the end.
            member.attempts = arrival.attempt - 1
            if member.began is not None:
                member.spent.append(run_seconds(member.began, time.monotonic()))
                member.began = None
        earlier = (arrival.boot or 0.0) + (arrival.pull or 0.0)
        began = max(time.monotonic() - earlier, job.asked_at)
        member.began = began if member.began is None else min(began, member.began)

    def disconnected(self, launch_id: str, *, orderly: bool, reclaimed: bool) -> None:
        job = self._job_of[launch_id]
        member = job.members[launch_id]
        member.connected = False
        if orderly and not reclaimed:
            member.gone = True
            self._end(job, launch_id, LaunchEnd("it ended as it was told to"))
        elif not member.ended:
            member.lost_at = time.monotonic()
            self._look.set()

    def bucket(self) -> tuple[str, str]:
        return self._profile.bucket, self._profile.region

    def times(self, launch_id: str) -> LaunchTimes | None:
        job = self._job_of.get(launch_id)
        if job is None:
            return None
        job_id = job.aws_id(job.members[launch_id]) if job.id else ""
        return LaunchTimes(launch=launch_id, job_id=job_id, api=job.api or None)

    def _end(self, job: Job, launch_id: str, end: LaunchEnd, ended_at: float | None = None) -> None:
        """Take in that an attempt of a worker ended, and tell.

        Args:
            job: Its job.
            launch_id: The worker.
            end: How.
            ended_at: When, on the monotonic clock; ``None``: now.
        """
        member = job.members[launch_id]
        if member.ended:
            return
        if member.began is not None:
            until = time.monotonic() if ended_at is None else ended_at
            member.spent.append(run_seconds(member.began, until))
            member.began = None
        member.lost_at = None
        member.connected = False
        member.ended = not end.relaunched
        member.on_end(launch_id, end)

    # Watching.

    async def _watch(self) -> None:
        pause = _POLL_WAITING
        while not self.closed:
            alive = [job for job in self._jobs if job.id and not job.over]
            wanted = [m for job in alive for m in job.members.values() if m.lost_at is not None]
            waiting = [
                m
                for job in alive
                for m in job.members.values()
                if not m.connected and not m.ended and m.lost_at is None
            ]
            if wanted:
                pause = _POLL_EVIDENCE
            elif not waiting:
                pause = _POLL_SLOWEST
            else:
                slowest = min(_POLL_WAITING_LONG, self._launch_timeout / 6)
                pause = min(max(pause, _POLL_WAITING), slowest)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), pause)
                pause = _POLL_WAITING
            self._look.clear()
            alive = [job for job in self._jobs if job.id and not job.over]
            try:
                if alive:
                    await self._inspect(alive)
                self._leave_spot(alive, time.monotonic())
                await self._diagnose(alive, time.monotonic())
                self._unreachable = False
            except AwsError as exc:
                if not self._unreachable:
                    self._unreachable = True
                    _logger.warning("AWS Batch cannot be asked for the state of jobs now: %s", exc)
            except Exception:
                # A bug of ours must not end the watch: nobody would learn why workers do not come.
                _logger.exception("internal error while watching jobs")
            pause = min(pause * _POLL_GROWTH, _POLL_SLOWEST)

    async def _inspect(self, jobs: list[Job], *, late: bool = False) -> list[Job]:
        """Ask for the states of jobs, and of those of their workers that matter.

        Args:
            jobs: Which.
            late: Whether they may have ended long ago, and nobody asks why.

        Returns:
            Those that AWS knows of: what has ended it forgets, after seven days or more.
        """
        described = await self._describe([job.id for job in jobs])
        for job in jobs:
            details = described.get(job.id)
            if details is None:
                continue
            if len(job.members) == 1:
                (launch_id,) = job.members
                job.statuses = Counter({details["status"]: 1})
                job.reason = details.get("statusReason", "")
                self._note_begun(job)
                await self._take(job, launch_id, details, late)
                continue
            summary = details.get("arrayProperties", {}).get("statusSummary", {})
            job.statuses = Counter({k: v for k, v in summary.items() if v})
            job.reason = details.get("statusReason", "")
            self._note_begun(job)
            await self._inspect_array(job, details["status"], late)
        return [job for job in jobs if job.id in described]

    async def _inspect_array(self, job: Job, status: str, late: bool) -> None:
        by_index = {member.index: launch_id for launch_id, member in job.members.items()}
        interesting = {
            job.aws_id(member)
            for member in job.members.values()
            if member.lost_at is not None and not member.ended
        }
        ended = job.statuses["FAILED"] + job.statuses["SUCCEEDED"]
        known = sum(member.ended for member in job.members.values())
        if ended > known or status in ("FAILED", "SUCCEEDED"):
            assert self._clients is not None
            for state in ("FAILED", "SUCCEEDED"):
                listed = self._clients.pages(
                    "batch", "list_jobs", "jobSummaryList", arrayJobId=job.id, jobStatus=state
                )
                async for summary in listed:
                    index = int(summary["jobId"].rpartition(":")[2])
                    if not job.members[by_index[index]].ended:
                        interesting.add(summary["jobId"])
        if not interesting and self._waits_unexplained(job):
            # Any one of those that wait says why they do.
            waiting = (m for m in job.members.values() if not m.connected and not m.ended)
            interesting = {job.aws_id(member) for member, _ in zip(waiting, range(3), strict=False)}
        for child_id, details in (await self._describe(sorted(interesting))).items():
            launch_id = by_index[int(child_id.rpartition(":")[2])]
            await self._take(job, launch_id, details, late)

    def _note_begun(self, job: Job) -> None:
        """Count as paid for what has a place, also before it dials back, or if it never does."""
        placed = job.statuses["STARTING"] + job.statuses["RUNNING"]
        members = [member for member in job.members.values() if not member.ended]
        missing = placed - sum(member.began is not None for member in members)
        for member in members:
            if missing <= 0:
                break
            if member.began is None:
                # Which of them it is, AWS does not say, and it does not matter.
                member.began = time.monotonic()
                missing -= 1

    def _waits_unexplained(self, job: Job) -> bool:
        return (
            any(not m.connected and not m.ended for m in job.members.values())
            and time.monotonic() - job.asked_at > _DIAGNOSE_AFTER
        )

    async def _describe(self, ids: Sequence[str]) -> dict[str, Any]:
        pages = [ids[at : at + DESCRIBE_JOBS] for at in range(0, len(ids), DESCRIBE_JOBS)]
        answers = await asyncio.gather(
            *(self._call("batch", "describe_jobs", jobs=page) for page in pages)
        )
        return {each["jobId"]: each for answer in answers for each in answer["jobs"]}

    async def _take(self, job: Job, launch_id: str, details: Mapping[str, Any], late: bool) -> None:
        """Take in what AWS says of one worker."""
        member = job.members[launch_id]
        if member.ended:
            return
        attempts = details.get("attempts", ())
        over = details["status"] in ("SUCCEEDED", "FAILED")
        again = len(attempts) > member.attempts and not over
        if not over and not again:
            if not job.reason and details["status"] == "RUNNABLE":
                job.reason = details.get("statusReason", "")
            return
        if member.connected:
            # Its session will end in a moment, and what it still says counts more.
            member.attempts = len(attempts) - 1 if again else member.attempts
            return
        if member.began is None:
            # It came and went between two looks.
            member.spent += [seconds_of(each) for each in attempts[member.attempts :]]
        member.attempts = len(attempts)
        end = end_of(details, attempts)
        if not end.reclaimed and not late:
            tail = await self._inquiry.log_tail(details)
            end = replace(end, log_tail=tail, retried=again)
        if not end.reclaimed and not late and member.lost_at is None:
            self._ends = [*self._ends[-4:], end]
            self._diagnosed_at = float("-inf")
        if end.reclaimed and job.spot:
            self._reclaims += 1
        cause = cause_of_end(end)
        if again and member.lost_at is None:
            return  # it never dialed back, and AWS tries it once more
        member.gone = over
        self._end(
            job,
            launch_id,
            LaunchEnd(
                str(cause),
                killed=end.exit_code in (137, 143) and not end.out_of_memory,
                fatal=cause.fatal and over,
                reclaimed=end.reclaimed,
                out_of_memory=end.out_of_memory,
                relaunched=again,
            ),
            ended_at=ended_at(details, attempts) if late else None,
        )

    async def _diagnose(self, jobs: list[Job], now: float) -> None:
        """While workers are waited for, find out why."""
        missing = [
            job
            for job in jobs
            if any(not m.connected and not m.ended for m in job.members.values())
        ]
        if not missing:
            if not any(member.connected for job in jobs for member in job.members.values()):
                return
            self.explanation = ""
            self._ends.clear()
            return
        oldest = min(job.asked_at for job in missing)
        news = bool(self._ends) and self._diagnosed_at == float("-inf")
        early = now - oldest < _DIAGNOSE_AFTER or now - self._diagnosed_at < _DIAGNOSE_EVERY
        if early and not news:
            return
        self._diagnosed_at = now
        job = min(missing, key=lambda each: each.asked_at)
        situation = await self._inquiry.situation(job, missing, self._ends)
        cause = cause_of_waiting(situation)
        before, self.explanation = self.explanation, str(cause) if cause is not None else ""
        if cause is None or not cause.fatal or situation.ends:
            return  # a worker that ended fails its own launch, and not those that may do better
        if before != self.explanation:
            self._diagnosed_at -= _DIAGNOSE_EVERY - 1.0  # look again soon
        else:
            # Seen twice, and waiting does not change it.
            waiting = [
                launch_id
                for each in missing
                for launch_id, member in each.members.items()
                if not member.connected and not member.ended
            ]
            self.terminate(waiting, LaunchEnd(self.explanation, fatal=True))

    def _leave_spot(self, jobs: list[Job], now: float) -> None:
        """Where it is only preferred, have on demand what waits for spare capacity too long."""
        for job in jobs:
            if self._waits_for_spot_in_vain(job, now):
                _logger.info("no Spot capacity in %.0f s: going on demand", now - job.asked_at)
                self._no_spot_until = now + _SPOT_PAUSE
                waiting = [
                    launch_id
                    for launch_id, member in job.members.items()
                    if not member.connected and not member.ended
                ]
                self.terminate(waiting, LaunchEnd("there was no Spot capacity", reclaimed=True))

    def _waits_for_spot_in_vain(self, job: Job, now: float) -> bool:
        if not job.spot or job.over or self._settings.spot != "prefer":
            return False
        waiting = sum(job.statuses[state] for state in ("SUBMITTED", "PENDING", "RUNNABLE"))
        patience = min(_SPOT_PATIENCE, self._launch_timeout / 3)
        return waiting > 0 and now - job.asked_at > patience

    # Money.

    def cost(self) -> Cost:
        now = time.monotonic()
        accrued, committed, rate = self._inherited_usd, 0.0, 0.0
        for job in self._jobs:
            price = job.price
            for member in job.members.values():
                accrued += price.cost_of(member.spent)
                if member.began is not None:
                    seconds = run_seconds(member.began, now)
                    # The first minute is owed as soon as it begins.
                    accrued += price.cost(seconds)
                    rate += price.per_hour
                    beyond = seconds + _STOP_SECONDS - max(seconds, LEAST_SECONDS)
                    committed += max(0.0, beyond) * price.per_second
                elif not member.ended:
                    committed += price.cost(LEAST_SECONDS)
        note = f"estimated from the {self._prices}"
        if any(job.spot for job in self._jobs):
            note += f", Spot at {self._prices.spot_factor:.0%} of it"
        return Cost(accrued_usd=accrued, committed_usd=committed, per_hour_usd=rate, note=note)

    def affordable(self, requests: Sequence[LaunchRequest], max_cost_usd: float) -> int:
        cost = self.cost()
        left = max_cost_usd - cost.accrued_usd - cost.committed_usd
        count = 0
        for request in requests:
            size = self._settings.size_of(request.rung)
            left -= self._price(size, self._on_spot).cost(LEAST_SECONDS)
            if left < 0:
                break
            count += 1
        return count

    # From one process to the next.

    def hand_over(self) -> dict[str, Any]:
        """Return what a later process needs to know of the jobs."""
        over = [job for job in self._jobs if job.over]
        return {
            "secret": self._secret.hex(),
            "jobs": [dump(job) for job in self._jobs if not job.over],
            "cost_usd": self._inherited_usd
            + sum(
                job.price.cost_of(member.spent) for job in over for member in job.members.values()
            ),
        }

    async def take_over(
        self, left: Mapping[str, Any], on_end: Callable[[str, LaunchEnd], None]
    ) -> dict[str, Survivor]:
        """Take over the jobs of an earlier process of this executor.

        Raises:
            AwsError: If AWS cannot be asked about them.
        """
        if not left:
            return {}
        self._secret = bytes.fromhex(left["secret"])
        self._inherited_usd = float(left["cost_usd"])
        # Who ended while nobody was there to see it is no failure of this process's.
        jobs = [load(each, self._price, lambda *_: None) for each in left["jobs"]]
        insist = functools.partial(self._terminator.insist, patience=_TAKE_OVER_PATIENCE)
        for job in jobs:
            if not job.id:
                job.id = await insist(self._find_job, job)
        sent = [job for job in jobs if job.id]
        known = await insist(lambda: self._inspect(sent, late=True))
        running_of = {job.first: await insist(self._running_of, job) for job in known}
        # Not before AWS has told: close() ends what is in here, also when this start fails.
        self._jobs += jobs
        alive: dict[str, Survivor] = {}
        for job in jobs:
            self._job_of.update(dict.fromkeys(job.members, job))
            running = running_of.get(job.first)
            for launch_id, member in job.members.items():
                if running is None:
                    # It never got there, or is forgotten; and what it cost in the end, with it.
                    member.ended = member.gone = True
                    member.began = None
                elif not member.ended:
                    member.on_end = on_end
                    size = self._settings.number_of(job.size)
                    alive[launch_id] = Survivor(size, member.index in running)
        if alive:
            self._watcher = self._spawn(self._watch())
        return alive

    async def _running_of(self, job: Job) -> set[int]:
        """Return the places of those workers of a job that run."""
        if len(job.members) == 1 or not job.statuses["RUNNING"]:
            return {0} if job.statuses["RUNNING"] else set()
        assert self._clients is not None
        listed = self._clients.pages(
            "batch", "list_jobs", "jobSummaryList", arrayJobId=job.id, jobStatus="RUNNING"
        )
        return {int(each["jobId"].rpartition(":")[2]) async for each in listed}

    # The end.

    def terminate(self, launch_ids: Sequence[str], end: LaunchEnd | None = None) -> None:
        if end is None:
            end = LaunchEnd("it was terminated", killed=True)
        wanted: dict[int, list[str]] = {}
        for launch_id in launch_ids:
            job = self._job_of.get(launch_id)
            if job is not None and not job.members[launch_id].ended:
                wanted.setdefault(job.first, []).append(launch_id)
        why = "the executor does not need it any more"
        whole: list[Job] = []
        for launches in wanted.values():
            job = self._job_of[launches[0]]
            members = [job.members[launch_id] for launch_id in launches]
            left = sum(not member.ended for member in job.members.values())
            if len(members) >= left:
                job.terminated = True
                if job.id:
                    whole.append(job)
            elif job.id:
                self._spawn(self._terminate_members(job, members, why))
            for launch_id in launches:
                self._end(job, launch_id, end)
        if whole:
            self._spawn(self._terminate_whole(whole, why))

    async def _terminate_whole(self, jobs: Sequence[Job], why: str) -> None:
        """Terminate jobs with all their workers: one request for each, however large it is."""
        if await self._terminator.terminate([job.id for job in jobs], why):
            for job in jobs:
                for member in job.members.values():
                    member.gone = True

    async def _terminate_members(self, job: Job, members: Sequence[Member], why: str) -> None:
        """Terminate some workers of a job that goes on."""
        if await self._terminator.terminate([job.aws_id(member) for member in members], why):
            for member in members:
                member.gone = True

    async def close(self) -> None:
        """Terminate whatever has not ended by itself, and let go of everything."""
        self.closed = True
        self._closing.set()
        if self._watcher is not None:
            self._watcher.cancel()
        for task, job in list(self._submitting.items()):
            if not job.sent:
                task.cancel()
        if self._submitting:
            # What is on its way to AWS has to be known, to be ended.
            await asyncio.wait(list(self._submitting), timeout=ending.PATIENCE)
        for job in self._jobs:
            for launch_id in list(job.members):
                self._end(job, launch_id, LaunchEnd("the executor has shut down", killed=True))
        await asyncio.sleep(0)
        for task in list(self._tasks):
            task.cancel()  # what was being ended is ended below
        await asyncio.gather(*self._tasks, return_exceptions=True)
        left = [
            job
            for job in self._jobs
            if job.id and not all(member.gone for member in job.members.values())
        ]
        if left:
            await self._terminate_whole(left, "the executor has shut down")
        if self._clients is not None:
            await self._clients.close()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
