"""AWS Lambda as a platform: each worker is an invocation of a function.

A function is made once for each combination of packages and settings, and named by that content. It
is made of a .zip archive where the packages fit into one, and otherwise of an image.

The event of an invocation says which worker it is, and has what a worker elsewhere finds in its
environment. AWS shows an event to nobody, so the key by which a worker is let in is in there, too:
neither does the function's environment have it, which anybody may read who may describe functions,
nor has its role a right to read it, which would be a right of all tasks.

Lambda may deliver an event twice, or late. Each worker has a number of its own, and the executor
lets each number in once: the second one returns at once, after some tenths of a second.

No request ends an invocation that runs. A worker ends when it is told so over its connection, when
it has lost it for some time, and at the end of its session.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from cloudexec._aws import names
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.diagnosis import JobEnd, cause_of_waiting
from cloudexec._aws.function_code import archive_code, is_refused
from cloudexec._aws.function_log import Invocation, default_log_group, read_invocations
from cloudexec._aws.function_requests import EVENT_AGE, FunctionSpec, event_of
from cloudexec._aws.functions import ensure_function
from cloudexec._aws.images import in_thread
from cloudexec._aws.prices import PriceTable
from cloudexec._aws.profile import Profile
from cloudexec._aws.requests import DefinitionSpec, tag_value
from cloudexec._environment.archive import WRAPPER, Archive
from cloudexec._errors import AwsError, ConfigError
from cloudexec._launchers.aws.platform import AwsPlatform, connected
from cloudexec._launchers.aws.platform import Settings as AwsSettings
from cloudexec._launchers.batch.inquiry import reason_of
from cloudexec._launchers.lambda_.asking import BURST, STARTS_PER_SECOND, UNSEEN, Asker, Worker
from cloudexec._launchers.lambda_.code import bucket_for, choose_archive
from cloudexec._launchers.lambda_.reading import end_of_invocation, end_of_session
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
from cloudexec._log import tell

__all__ = ["LambdaPlatform", "Settings", "connect"]

_STOP_SECONDS = 10.0
_SPOT_PATIENCE = 30.0
_LOG_EVERY = 2.0
"""Seconds between two looks at the log: CloudWatch Logs takes few such calls a second."""
_MARGIN = 10.0
_PRIVATE = tuple(
    map(
        ipaddress.ip_network,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"),
    )
)
"""Of which the addresses of a VPC usually are. RFC 1918, RFC 6598, RFC 4193."""
_STOPPED = Reason(
    "the function was stopped (its reserved concurrency is 0), by `cloudexec stop` or in AWS",
    "the next executor that is started lets it run again",
    fatal=True,
)


class Settings(AwsSettings, Protocol):
    """What the platform must know of the settings of ``Lambda``, which describes them."""

    disk_mib: int
    package: str
    reserved_concurrency: int | None
    role: str | None
    security_groups: tuple[str, ...] | None
    subnets: tuple[str, ...] | None
    vpc: bool | None


def connect(
    settings: Settings, executor: ExecutorInfo
) -> contextlib.AbstractAsyncContextManager[Site]:
    """Connect to AWS Lambda; see ``connected``."""
    return connected(settings, executor, LambdaPlatform, of=settings.role or "")


class LambdaPlatform(AwsPlatform):
    """AWS Lambda, for one executor; see ``AwsPlatform``."""

    name = "AWS Lambda"
    most_workers = 1
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
        self.stop_hint = (
            f"workers that find no client end by themselves; `cloudexec stop --executor "
            f"{executor.id}` keeps further ones from starting"
        )
        self._workers: dict[str, Worker] = {}
        self._functions: dict[int, str] = {}
        self._making = asyncio.Lock()
        self._role = settings.role or profile.function_role
        self._key = b""
        self._archive: Archive | None = None
        self._is_in_vpc = False
        self._log: list[Invocation] = []
        self._log_read_at = float("-inf")
        self._began = time.time()
        self._asker = Asker(
            clients,
            self._workers,
            function=self._function,
            event=self._event,
            reserved=settings.reserved_concurrency,
        )
        if not self._role:
            up = "cloudexec up"
            if profile.name not in ("", "default"):
                up += f" --name {profile.name}"
            raise ConfigError(
                f"the profile {profile.name!r} has no role for functions of AWS Lambda, in which "
                f"Lambda(...) could run workers: `{up} --with lambda` adds one"
            )

    # The start.

    async def _check(self) -> None:
        settings = self._settings
        self._archive = await choose_archive(
            self._profile,
            package=settings.package,
            image=settings.image,
            packages=settings.packages,
            arch=settings.arch,
            region=self._clients.region,
        )
        if self._archive is None:
            self._image = await self._find_image()

    async def start(self) -> Site:
        """Check the settings, and find the address that workers dial."""
        site = await super().start()
        is_own = bool(site.relay) and not site.relay.startswith("ssh://")
        # A relay knows the stack's key only. Otherwise each worker is given one of its own.
        self._key = site.key if is_own else b""
        self._is_in_vpc = self._find_vpc(site)
        return replace(site, key=self._key)

    def _find_vpc(self, site: Site) -> bool:
        """Say whether functions are to be in the VPC."""
        settings, profile = self._settings, self._profile
        if settings.vpc is None:
            address = self._executor.advertise or site.advertise
            return not site.relay and bool(self._subnets) and _is_private(address)
        if settings.vpc and not self._subnets:
            raise ConfigError(
                "vpc=True needs subnets: give subnets=, or a profile of `cloudexec up --with "
                "lambda`"
            )
        if settings.vpc and site.relay and settings.subnets is None and profile.assign_public_ip:
            raise ConfigError(
                "with vpc=True, workers cannot reach the relay: in the public subnets of this "
                "profile, a function reaches the VPC only. Leave vpc= out, or give relay=False to "
                "a program that runs in this VPC"
            )
        return settings.vpc

    @property
    def _subnets(self) -> tuple[str, ...]:
        given = self._settings.subnets
        return self._profile.subnets if given is None else given

    async def close(self) -> None:
        """End what was started for the executor as a whole."""
        await self._asker.close()
        await super().close()

    async def _definition_spec(self) -> DefinitionSpec:
        """Return what a relay is started from, which is a job on Fargate here, too."""
        spec = await super()._definition_spec()
        return replace(spec, compute="fargate", ephemeral_gib=None, job_role=self._profile.job_role)

    def spot_patience(self, workers: int) -> float:
        """Say in how many seconds so many workers find a place, if there is any for them."""
        return _SPOT_PATIENCE + max(0, workers - BURST) / STARTS_PER_SECOND

    def lacks_capacity(self, reason: str) -> bool:
        """Say whether all concurrency is used."""
        return "invocations that" in reason

    # Functions.

    async def _function(self, size: int, gone: str) -> str:
        """Return the name of the function for workers of a size; make it if there is none.

        Args:
            size: Which of the launcher's sizes.
            gone: One that somebody has removed.
        """
        async with self._making:
            if self._functions.get(size, gone) == gone:
                self._functions[size] = await self._ensure(size)
            name = self._functions[size]
            self._inquiry.log_group = self._profile.log_group or default_log_group(name)
            return name

    async def _ensure(self, size: int) -> str:
        """Return the name of the function; an image takes the place of a refused archive."""
        try:
            return await ensure_function(self._clients, self._spec(size), self._code)
        except AwsError as exc:
            if self._archive is None or self._settings.package == "zip" or not is_refused(exc):
                raise
            tell(f"workers on AWS Lambda need an image: {exc.message}")
        finally:
            if self._archive is not None:
                self._archive.forget()
        self._image = await self._find_image()
        self._archive = None
        return await ensure_function(self._clients, self._spec(size), self._code)

    async def _code(self) -> Mapping[str, Any]:
        """Return the archive for a function that is made, as the request names it."""
        archive = self._archive
        if archive is None:
            return {}
        data = await in_thread(archive.data)
        tell(f"making a function of AWS Lambda from {archive}")
        bucket = bucket_for(self._profile, self._clients.region)
        return await archive_code(self._clients, data, bucket)

    def _spec(self, size: int) -> FunctionSpec:
        settings, profile = self._settings, self._profile
        groups = settings.security_groups
        if groups is None:
            groups = tuple(filter(None, [profile.security_group]))
        tags = {**settings.tags, names.TAG_USER: tag_value(names.user_name())}
        if project := settings.project or profile.project:
            tags[names.TAG_PROJECT] = tag_value(project)
        archive = self._archive
        return FunctionSpec(
            image="" if archive is not None else self._image,
            archive=archive.content if archive is not None else "",
            runtime=archive.runtime if archive is not None else "",
            wrapper=WRAPPER if archive is not None else "",
            role=self._role,
            memory_mib=settings.size_of(size).memory_mib,
            arch=settings.arch,
            disk_mib=settings.disk_mib,
            session=math.ceil(settings.max_runtime),
            subnets=self._subnets if self._is_in_vpc else (),
            security_groups=groups if self._is_in_vpc else (),
            log_group=profile.log_group,
            reserved=settings.reserved_concurrency,
            stack=profile.stack,
            # By user, so that nobody stops the workers of others: see ``cloudexec stop``.
            tags=tags,
        )

    def _event(self, worker: Worker) -> bytes:
        request = worker.request
        assert request is not None
        environment = {**request.environment, **request.secrets}
        if self._key:
            environment["CLOUDEXEC_KEY"] = self._key.hex()
        tags = self._tags(self._settings.max_runtime)
        size = self._settings.size_of(request.size)
        session = {
            "name": request.name,
            "memory_mib": str(size.memory_mib),
            "disk_mib": str(self._settings.disk_mib),
            "arch": self._settings.arch,
            "image": self._image if self._archive is None else str(self._archive),
            "function": self._functions.get(request.size, ""),
            **{key: value for key, value in tags.items() if key.startswith("cloudexec:")},
        }
        return event_of(environment, session, time.time() + UNSEEN)

    # Submission.

    async def prepare(self) -> None:
        """Wait for the turn of this worker."""
        await self._asker.pacer.wait()

    async def submit(self, request: JobRequest) -> Submitted:
        """Ask for a worker; where there is no concurrency for it, it waits."""
        worker = self._workers.setdefault(request.name, Worker(request.name))
        worker.request = request
        await self._function(request.size, "")
        await self._asker.ask(worker)
        return self._taken(worker)

    def _taken(self, worker: Worker) -> Submitted:
        """Answer for a worker from now on."""
        worker.is_taken = True
        if worker.waits:
            self._asker.ask_again()
        ids = [f"lambda-{worker.invocations[-1]}" if worker.invocations else worker.name]
        return Submitted(job_id=worker.name, worker_ids=ids)

    async def find(self, name: str, *, spot: bool) -> Submitted | None:
        """Find a worker that was asked for. If none is found, the same event may be sent twice."""
        worker = self._workers.get(name)
        if worker is not None and worker.invocations:
            return self._taken(worker)
        await self._learn({name})
        found = self._workers.get(name)
        return None if found is None or not found.invocations else self._taken(found)

    # Looking.

    def came(self, name: str) -> None:
        """Note that a worker has connected."""
        if (worker := self._workers.get(name)) is not None:
            worker.has_arrived = worker.is_here = True

    def went(self, name: str) -> None:
        """Note that a worker's connection has ended: it makes room for another one."""
        if (worker := self._workers.get(name)) is not None:
            worker.is_here = False

    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        """Say how workers are, by their connections, the clock, and the log."""
        unknown = {each.job_id for each in inspections} - self._workers.keys()
        if unknown:
            await self._learn(unknown)
        found: dict[str, JobStatus] = {}
        for each in inspections:
            worker = self._workers.get(each.job_id)
            if worker is not None:
                status = await self._status(each, worker)
                found[each.job_id] = JobStatus(workers={0: status}, reason=status.reason)
        return found

    async def _status(self, inspection: Inspection, worker: Worker) -> WorkerStatus:
        if worker.end is not None:
            return WorkerStatus(phase=Phase.ENDED, ends=[worker.end])
        if 0 in inspection.connected:
            worker.has_arrived = True
            return WorkerStatus(phase=Phase.RUNNING)
        if worker.invoked_at is None:
            return WorkerStatus(phase=Phase.WAITING, reason=worker.reason)
        if not (0 in inspection.wanted or inspection.survey or worker.request is None):
            return WorkerStatus(phase=Phase.RUNNING if worker.has_arrived else Phase.WAITING)
        await self._read_log()
        known = [each for each in self._log if each.request in worker.invocations]
        # An event may come twice. The second worker ends at once, and the first one runs on.
        if known and all(each.report is not None for each in known):
            worker.end = await self._end(max(known, key=lambda each: each.billed_ms))
            return WorkerStatus(phase=Phase.ENDED, ends=[worker.end])
        lasted = time.monotonic() - worker.invoked_at
        if lasted > UNSEEN + self._settings.max_runtime + _MARGIN:
            worker.end = end_of_session()
            return WorkerStatus(phase=Phase.ENDED, ends=[worker.end])
        if worker.has_arrived or any(each.began_ms for each in known):
            return WorkerStatus(phase=Phase.RUNNING)
        if lasted > UNSEEN:
            await self._go_without(worker)
            if worker.end is not None:
                return WorkerStatus(phase=Phase.ENDED, ends=[worker.end])
        return WorkerStatus(phase=Phase.WAITING, reason=worker.reason)

    async def _go_without(self, worker: Worker) -> None:
        """Let a worker wait whose event was dropped, or end it if its function was stopped."""
        with contextlib.suppress(AwsError):  # an aid, not a need
            if await self._asker.was_stopped(worker):
                worker.end = WorkerEnd(reason=_STOPPED)
                return
        worker.reason = (
            f"AWS Lambda has not started it within {EVENT_AGE} s: other functions may use up the "
            f"invocations that the account may have at once"
        )
        worker.invoked_at = None
        self._asker.ask_again()

    async def _end(self, invocation: Invocation) -> WorkerEnd:
        tail = await self._inquiry.tail(invocation.stream) if invocation.stream else ""
        return end_of_invocation(
            invocation,
            session=self._settings.max_runtime,
            tail=tail,
            image=self._image if self._archive is None else "",
            archive=str(self._archive),
            relay=self._inquiry.relay,
        )

    async def _read_log(self) -> None:
        """Read what the log has of the invocations of this executor."""
        now = time.monotonic()
        if now - self._log_read_at < _LOG_EVERY:
            return
        self._log_read_at = now
        oldest = min(self._began, time.time() - 2 * self._settings.max_runtime)
        with contextlib.suppress(AwsError):  # an aid, not a need
            group = self._inquiry.log_group
            self._log = await read_invocations(self._call, group, int(1000 * oldest))

    async def _learn(self, wanted: set[str]) -> None:
        """Find the workers that an earlier process has started, by what they wrote to the log."""
        await self._function(0, "")  # which tells where the log is
        self._log_read_at = float("-inf")
        await self._read_log()
        for each in self._log:
            name = each.line.get("name", "")
            if name in wanted:
                worker = self._workers.setdefault(name, Worker(name))
                worker.invocations.append(each.request)
                worker.invoked_at = time.monotonic()

    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        """Say why workers do not come."""
        if trouble := self._asker.trouble:
            return Reason(
                f"AWS Lambda cannot be asked for workers now: {trouble}", "it is tried again"
            )
        reasons = [each.reason for each in waiting if each.reason]
        if reasons and not any(isinstance(end.details, JobEnd) for end in ends):
            return Reason(
                reasons[0],
                "it is tried again; AWS raises the limit on request, and Fargate(...) has another",
                no_room=True,
            )
        known = self._inquiry.known(waiting, ends)
        # What waits here waits for nothing in AWS.
        situation = replace(known, statuses={**known.statuses, "RUNNABLE": 0}, reasons=())
        if (reason := reason_of(cause_of_waiting(situation))) is not None:
            return reason
        return ends[-1].reason if ends else None

    # The end.

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        """Ask for no more of these workers. Those that run end when they are told, or alone."""
        for each in targets:
            worker = self._workers.setdefault(each.job_id, Worker(each.job_id))
            worker.is_doomed = True


def _is_private(address: str) -> bool:
    """Whether an address, with or without a port, is one that only a VPC leads to."""
    host = address.rpartition(":")[0].strip("[]") if ":" in address else address
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    return any(found in each for each in _PRIVATE if each.version == found.version)
