"""A fleet: the jobs of one executor on any platform, from submission to the end of the last one.

All code runs on the executor's loop thread. ``launch`` starts an asyncio task for each job, which
submits it, and one more asyncio task watches all jobs. The fleet consists of ``submission`` and
``watching``, which use ``ending`` and ``spot``. All of them use the ``ledger``.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from cloudexec._config import WorkerCapacity
from cloudexec._launchers import ending
from cloudexec._launchers.base import Arrival, Contact, Cost, LaunchEnd, LaunchRequest, Survivor
from cloudexec._launchers.ending import Terminator, insist
from cloudexec._launchers.ledger import Job, Ledger, Member, dump, load
from cloudexec._launchers.platform import ExecutorInfo, JobRequest, Phase, Site
from cloudexec._launchers.spot import SpotPolicy
from cloudexec._launchers.submission import Submitter
from cloudexec._launchers.watching import Elsewhere, Watcher
from cloudexec._log import Log
from cloudexec._pricing import WorkerPrice

__all__ = ["Fleet", "Settings", "job_sizes"]

_logger = Log()

_TAKE_OVER_PATIENCE = 60.0
"""Seconds for which requests for the status of an earlier process's workers are repeated. These
workers wait for a client during that time."""


def job_sizes(workers: int, most: int | None) -> list[int]:
    """Split a launch into jobs.

    Args:
        workers: Workers to launch, zero or more.
        most: Largest number of workers in one job; ``None`` for no limit.

    Returns:
        The number of workers in each job, in order, summing to ``workers``.
    """
    full, rest = divmod(workers, most or max(workers, 1))
    return [most or workers] * full + ([rest] if rest else [])


class Settings(Protocol):
    """The settings of a launcher that a fleet uses."""

    @property
    def spot(self) -> bool | str:
        """Whether workers run on spare capacity: ``True``, ``False`` or ``"prefer"``."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Environment variables of every worker."""

    def capacity(self, size: int) -> WorkerCapacity | None:
        """Return the resources of a worker of a size; ``None`` if they are not known."""

    def size_for(self, cpus: float, memory: int, gpus: int) -> int:
        """Find the smallest size with these resources."""

    def size_name(self, size: int) -> str:
        """Describe the resources of a worker of a size in a few words."""


class Fleet:
    """The jobs of one executor; see the module.

    Args:
        settings: The launcher's settings.
        site: The platform, and how workers reach the executor.
        executor: The executor.
        elsewhere: Other launchers for workers that find no place here; ``None`` if there are none.
    """

    def __init__(
        self,
        settings: Settings,
        site: Site,
        executor: ExecutorInfo,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self.ledger = Ledger(site.platform.stop_seconds)
        self.site = site
        self._settings = settings
        self._executor_id = executor.id
        self._launch_timeout = executor.launch_timeout
        self._platform = platform = site.platform
        self._secret = secrets.token_bytes(32)
        self._terminator = Terminator(platform)
        self._spot = SpotPolicy(self.ledger, platform, settings.spot, executor.launch_timeout)
        self._submitter = Submitter(platform, self.ledger, self._terminator)
        self._watcher = Watcher(
            platform, self.ledger, self._spot, self.terminate, executor.launch_timeout, elsewhere
        )
        self._elsewhere = elsewhere
        self._watching: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._submitting: dict[asyncio.Task[Any], Job] = {}

    @property
    def closed(self) -> bool:
        """Whether ``close`` has been called."""
        return self._submitter.closing.is_set()

    # Launching.

    def launch(
        self,
        contact: Contact,
        requests: Sequence[LaunchRequest],
        on_end: Callable[[str, LaunchEnd], None],
    ) -> None:
        """Submit jobs for all of these workers, which have the same size."""
        spot, size = self._spot.is_on, requests[0].size
        price = self._price(size, spot)
        at = 0
        for count in job_sizes(len(requests), self._platform.most_workers):
            some = requests[at : at + count]
            at += count
            first = some[0].launch_id
            job = Job(
                first=int(first),
                name=f"cloudexec-{self._executor_id}-{first}",
                spot=spot,
                size=size,
                price=price,
                members={each.launch_id: Member(index, on_end) for index, each in enumerate(some)},
                asked_at=time.monotonic(),
            )
            self.ledger.add(job)
            task = self._spawn(self._submit(job, self._request(job, contact, some[0].slots)))
            self._submitting[task] = job
            if self._elsewhere is not None:
                self._watch()  # another launcher starts the workers if this takes too long
                self._watcher.look_soon()
            task.add_done_callback(lambda done: self._submitting.pop(done, None))
        rate = len(requests) * price.per_hour
        _logger.info(
            "launching %s (%s%s)%s",
            "1 worker" if len(requests) == 1 else f"{len(requests)} workers",
            self._settings.size_name(size),
            ", Spot" if spot else "",
            f": about ${rate:.2f} an hour while they run ({price.table})" if rate else "",
        )

    def _request(self, job: Job, contact: Contact, slots: int) -> JobRequest:
        capacity = self._settings.capacity(job.size)
        environment = {
            **self._settings.environment,
            "CLOUDEXEC_TARGET": contact.target,
            "CLOUDEXEC_EXECUTOR_ID": contact.executor_id,
            "CLOUDEXEC_LAUNCH": str(job.first),
            "CLOUDEXEC_SLOTS": str(slots),
            "CLOUDEXEC_CERTIFICATE_SHA256": contact.certificate_sha256,
            # No client waits for a worker that starts later, unless a process has taken it over.
            "CLOUDEXEC_AWAITED_UNTIL": str(int(time.time() + self._launch_timeout)),
        }
        if (moving := self.site.moving) is not None:
            environment["CLOUDEXEC_RELAY"] = f"{moving.address} {moving.url}"
        elif contact.relay:
            environment["CLOUDEXEC_RELAY"] = contact.relay
        if capacity is not None and capacity.memory:
            environment["CLOUDEXEC_MEMORY_MIB"] = str(capacity.memory >> 20)
        if "PYTHONHASHSEED" not in environment:
            environment["PYTHONHASHSEED"] = contact.hash_seed
            environment["CLOUDEXEC_UNSET"] = "PYTHONHASHSEED"
        return JobRequest(
            name=job.name,
            workers=len(job.members),
            size=job.size,
            capacity=capacity,
            spot=job.spot,
            slots=slots,
            environment=environment,
            secrets={} if self.site.key else {"CLOUDEXEC_KEY": self._token(job).hex()},
        )

    async def _submit(self, job: Job, request: JobRequest) -> None:
        await self._submitter.submit(job, request)
        # These workers were given up before the platform had answered.
        doomed = [member for member in job.members.values() if member.ended and not member.gone]
        if job.id and doomed and not job.over:
            await self._terminator.end_members(job, doomed, "it is not needed any more")
        if job.id and not job.over:
            self._watch()
            self._watcher.look_soon()

    def _watch(self) -> None:
        if self._watching is None and not self.closed:
            self._watching = self._spawn(self._watcher.watch())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _token(self, job: Job) -> bytes:
        """Return the key of a job's workers, which does not authenticate workers of other jobs."""
        return hmac.new(self._secret, f"launch {job.first}".encode(), hashlib.sha256).digest()

    def key_of(self, launch_id: str) -> bytes | None:
        """Return the key of a worker; ``None`` if it has the key of the site."""
        if self.site.key:
            return None
        job = self.ledger.job_of(launch_id)
        return self._secret if job is None else self._token(job)

    # Workers come and go.

    def connected(self, launch_id: str, arrival: Arrival) -> None:
        """Record that a worker has connected."""
        self.ledger.connected(launch_id, arrival)

    def disconnected(self, launch_id: str, *, orderly: bool) -> None:
        """Record that a worker's session has ended, and look for the cause if it is not known."""
        if self.ledger.disconnected(launch_id, orderly=orderly):
            self._watcher.look_soon()

    # Money.

    def _price(self, size: int, spot: bool) -> WorkerPrice:
        return self._platform.price(size, spot) or WorkerPrice(per_second=0.0)

    def cost(self) -> Cost:
        """Return the cost of the workers and of the platform's other parts, such as a relay."""
        workers = self.ledger.cost(self._price(0, self._spot.is_on))
        besides = self._platform.overhead()
        return Cost(
            accrued_usd=workers.accrued_usd + besides.accrued_usd,
            committed_usd=workers.committed_usd + besides.committed_usd,
            per_hour_usd=workers.per_hour_usd + besides.per_hour_usd,
            note=", ".join(filter(None, (workers.note, besides.note))),
        )

    def least_usd(self, requests: Sequence[LaunchRequest]) -> list[float]:
        """Return the least that each of these workers would cost if it were launched now."""
        prices = [self._price(request.size, self._spot.is_on) for request in requests]
        return [self.ledger.least_of(price) for price in prices]

    # The take-over by a later process.

    def hand_over(self) -> dict[str, Any]:
        """Return, as JSON data, what a later process needs to take over the jobs."""
        jobs = []
        for job in self.ledger.jobs:
            if not job.over:
                found = self._settings.capacity(job.size)
                capacity = None if found is None else [found.cpus, found.memory, found.gpus]
                jobs.append(dump(job, capacity))
        return {"secret": self._secret.hex(), "jobs": jobs, "cost_usd": self.ledger.over_usd()}

    async def take_over(
        self, left: Mapping[str, Any], on_end: Callable[[str, LaunchEnd], None]
    ) -> dict[str, Survivor]:
        """Take over the jobs of an earlier process of this executor.

        Raises:
            PlatformError: If the platform cannot be asked about them.
        """
        if not left:
            return {}
        self._secret = bytes.fromhex(left["secret"])
        self.ledger.inherited_usd = float(left["cost_usd"])
        # Ends of workers that are learnt from the survey are not reported to the executor: they
        # happened before this process began, and would count as its failures.
        jobs = [load(each, self._size_of, self._price, lambda *_: None) for each in left["jobs"]]
        for job in jobs:
            if not job.id:
                look_up = functools.partial(self._platform.find, job.name, spot=job.spot)
                if (found := await insist(look_up, _TAKE_OVER_PATIENCE)) is not None:
                    job.taken(found)
        sent = [job for job in jobs if job.id]
        known = {}
        if sent:
            look = functools.partial(self._watcher.inspect, sent, survey=True)
            known = await insist(look, _TAKE_OVER_PATIENCE)
        alive: dict[str, Survivor] = {}
        for job in jobs:
            # Jobs are added only after the platform has answered. If this start fails before that,
            # close() must not end them, as the next process may take them over.
            self.ledger.add(job)
            status = known.get(job.first)
            for launch_id, member in job.members.items():
                if status is None:
                    # The platform never had the job or has forgotten it, so its cost is unknown.
                    member.ended = member.gone = True
                    member.began = None
                elif not member.ended:
                    member.on_end = on_end
                    worker = status.workers.get(member.index)
                    # The platform's status may be older than the connection of the worker.
                    running = member.began is not None or (
                        worker is not None and worker.phase is Phase.RUNNING
                    )
                    alive[launch_id] = Survivor(job.size, running)
        if alive:
            self._watch()
        return alive

    def _size_of(self, size: int, capacity: Sequence[float] | None) -> int:
        if capacity is None:
            return size
        cpus, memory, gpus = capacity
        return self._settings.size_for(cpus, int(memory), int(gpus))

    # The end.

    def terminate(self, launch_ids: Sequence[str], end: LaunchEnd | None = None) -> None:
        """Terminate workers, and report their ends.

        Args:
            launch_ids: The workers' launches; workers that have ended are ignored.
            end: The end to report; ``None`` for one which says that they were terminated.
        """
        if end is None:
            end = LaunchEnd("it was terminated", killed=True)
        wanted: dict[int, list[str]] = {}
        for launch_id in launch_ids:
            job = self.ledger.job_of(launch_id)
            if job is not None and not job.members[launch_id].ended:
                wanted.setdefault(job.first, []).append(launch_id)
        why = "the executor does not need it any more"
        whole: list[Job] = []
        for launches in wanted.values():
            job = self.ledger.job_of(launches[0])
            assert job is not None
            members = [job.members[launch_id] for launch_id in launches]
            left = sum(not member.ended for member in job.members.values())
            if len(members) >= left:
                job.terminated = True
                if job.id:
                    whole.append(job)
            elif job.id:
                self._spawn(self._terminator.end_members(job, members, why))
            for launch_id in launches:
                self.ledger.end(job, launch_id, end)
        if whole:
            self._spawn(self._terminator.end_jobs(whole, why))

    async def close(self) -> None:
        """Terminate the workers that have not ended by themselves."""
        self._submitter.closing.set()
        if self._watching is not None:
            self._watching.cancel()
        for task, job in list(self._submitting.items()):
            if not job.sent:
                task.cancel()
        if self._submitting:
            # A submitted job can be ended only after the platform has answered with its id.
            await asyncio.wait(list(self._submitting), timeout=ending.PATIENCE)
        for job in self.ledger.jobs:
            for launch_id in list(job.members):
                self.ledger.end(
                    job, launch_id, LaunchEnd("the executor has shut down", killed=True)
                )
        await asyncio.sleep(0)
        for task in list(self._tasks):
            task.cancel()  # workers that these tasks were about to terminate are terminated below
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # For some jobs, the platform has not answered whether it has accepted them.
        await asyncio.gather(*map(self._submitter.end_unanswered, self.ledger.jobs))
        left = [
            job
            for job in self.ledger.jobs
            if job.id and not all(member.gone for member in job.members.values())
        ]
        if left:
            await self._terminator.end_jobs(left, "the executor has shut down")
