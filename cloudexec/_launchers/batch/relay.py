"""Runs a relay for one executor as a job of AWS Batch, and starts another one if it ends."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cloudexec._aws.clients import AwsClients, translated
from cloudexec._aws.definitions import ensure_definition
from cloudexec._aws.diagnosis import Cause, cause_of_end, cause_of_waiting
from cloudexec._aws.names import JOB_PREFIX, RELAY_NAME, RELAY_PORT, object_prefix
from cloudexec._aws.relays import RELAY_SIZE
from cloudexec._aws.requests import DefinitionSpec, definition_request, submit_request
from cloudexec._errors import AwsError, LaunchError
from cloudexec._launchers.base import Cost
from cloudexec._launchers.batch.inquiry import Inquiry
from cloudexec._launchers.batch.reading import PHASES, end_of
from cloudexec._launchers.ending import insist
from cloudexec._launchers.platform import Phase, WaitingJob
from cloudexec._log import Log, tell
from cloudexec._pricing import WorkerPrice, run_seconds

__all__ = ["RelayJob", "RelayOrder"]

_logger = Log()

_IDLE = 300
"""Seconds without a client or worker after which a relay ends by itself."""
_POLL = 5.0
_POLL_STARTING = 1.0
_STOP_SECONDS = 30.0
_LONGEST_PAUSE = 60.0
_TRIES = 3
"""Relays that are started before the executor fails: as many as launches of workers."""
_URL_SECONDS = 7 * 24 * 3600
"""The longest validity of a presigned URL. Amazon S3 User Guide, "Download and upload objects with
presigned URLs". If the credentials expire earlier, the URL does, too."""
_SIGN_EVERY = 600.0
_OLD_IMAGE = "not set: CLOUDEXEC_TARGET"
"""Part of the error that images log which are older than relays: they start a worker instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayOrder:
    """The settings with which a relay is started.

    Attributes:
        executor_id: The executor's id.
        queue: ARN of the queue for relays.
        definition: The workers' job definition, in which the relay replaces some settings.
        tags: Tags of the job.
        bucket: S3 bucket in which workers read the relay's address.
        patience: Seconds within which the relay must run.
        lifetime: Seconds after which AWS ends it, even if this process was killed.
        price: Price of a relay.
        why: The reason why a relay is needed, for people.
    """

    executor_id: str
    queue: str
    definition: DefinitionSpec
    tags: Mapping[str, str]
    bucket: str
    patience: float
    lifetime: float
    price: WorkerPrice
    why: str


@dataclass(frozen=True, slots=True)
class _End:
    """The end of a relay's job.

    Attributes:
        text: The job and the cause of its end, for people.
        is_fatal: Whether another relay would end in the same way.
    """

    text: str
    is_fatal: bool = False


class RelayJob:
    """The relay of one executor.

    Args:
        clients: Makes calls to AWS.
        order: The settings of the relay.
        inquiry: Reads the log of the job, and gets the relay's address for diagnoses.
    """

    def __init__(self, clients: AwsClients, order: RelayOrder, inquiry: Inquiry) -> None:
        self.address = ""
        """``host:port`` of the relay."""
        self.url = ""
        """URL from which workers read the address."""
        self.on_move: Callable[[str], None] = _nobody
        self.is_used = False
        """Whether the executor has started, and has taken over the workers that connect through the
        relay."""
        self._clients = clients
        self._order = order
        self._inquiry = inquiry
        self._prefix = f"{JOB_PREFIX}{order.executor_id}{RELAY_NAME}"
        self._key = f"{object_prefix(order.executor_id)}relay"
        self._job_id = ""
        self._is_inherited = False
        self._given_up: list[str] = []  # jobs, until AWS has confirmed that they are terminated
        self._has_arrived = False
        self._signed_at = float("-inf")
        self._began: float | None = None
        self._spent: list[float] = []
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start a relay, or find the one of an earlier process of the executor.

        Raises:
            LaunchError: If several relays have ended, if every relay would end, or if none has an
                address in time.
            AwsError: If AWS refuses.
        """
        order = self._order
        self._job_id = await insist(lambda: self._find(f"{self._prefix}*"))
        self._is_inherited = bool(self._job_id)
        if not self._job_id:
            tell(
                f"starting a relay, which takes about a minute: about "
                f"${order.price.per_hour:.2f} an hour while it runs ({order.why})"
            )
        tries = 0
        deadline = time.monotonic() + order.patience
        while not self._has_arrived:
            if not self._job_id:
                tries += 1
                await self._submit()
            if (end := await self._arrive(deadline)) is not None:
                if end.is_fatal or tries >= _TRIES or time.monotonic() > deadline:
                    raise LaunchError(end.text)
                self._replace(end)
        await self._sign()
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """Terminate the relay, and the relays that were given up."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._is_inherited and not self.is_used:
            # The start has failed. The workers of the process before still connect through this
            # relay, and the next process may take them over.
            return
        if self._job_id:
            self._given_up.append(self._job_id)
            self._job_id = ""
        self._ended()
        # The relay is terminated first, as a forgotten object costs next to nothing.
        await asyncio.gather(*map(self._end, tuple(self._given_up)))
        with contextlib.suppress(AwsError):
            await self._clients.call(
                "s3",
                "delete_objects",
                Bucket=self._order.bucket,
                Delete={"Objects": [{"Key": self._key}], "Quiet": True},
            )

    async def _end(self, job_id: str) -> None:
        try:
            await insist(lambda: self._terminate(job_id, "the executor has shut down"))
        except AwsError as exc:
            _logger.error(
                "the relay, job %s, could not be terminated: %s. `cloudexec stop --executor %s` "
                "tries again; otherwise the relay ends by itself %d s after its last connection",
                job_id,
                exc,
                self._order.executor_id,
                _IDLE,
            )

    async def _terminate(self, job_id: str, why: str) -> None:
        await self._clients.call("batch", "terminate_job", jobId=job_id, reason=f"cloudexec: {why}")
        self._given_up.remove(job_id)

    def cost(self) -> Cost:
        """Return the cost of the relay so far, and the further cost that is unavoidable."""
        price = self._order.price
        accrued, committed = price.cost_of(self._spent), 0.0
        if self._began is not None:
            seconds = run_seconds(self._began, time.monotonic())
            accrued += price.cost(seconds)
            committed = price.cost(seconds + _STOP_SECONDS) - price.cost(seconds)
        elif self._job_id:
            committed = price.least
        rate = 0.0 if self._began is None else price.per_hour
        return Cost(
            accrued_usd=accrued,
            committed_usd=committed,
            per_hour_usd=rate,
            note=f"a relay at ${price.per_hour:.3f} an hour included",
        )

    # One relay.

    async def _find(self, name: str) -> str:
        """Return the id of a job that has not ended, by its name; empty if there is none.

        Args:
            name: The name; with ``*`` at the end, the beginning of the name.
        """
        listed = await self._clients.call(
            "batch",
            "list_jobs",
            jobQueue=self._order.queue,
            filters=[{"name": "JOB_NAME", "values": [name]}],
        )
        for summary in listed.get("jobSummaryList", ()):
            if PHASES[summary["status"]] is not Phase.ENDED:
                return str(summary["jobId"])
        return ""

    async def _submit(self) -> None:
        order = self._order
        spec = replace(
            order.definition,
            compute="fargate",
            user="0",  # only root may listen on the relay's port
            job_role="",
            assign_public_ip=True,
            ephemeral_gib=None,
            size=RELAY_SIZE,
        )
        definition = await ensure_definition(self._clients, definition_request(spec))
        request = submit_request(
            # A letter precedes the digits, as the names of workers' jobs end in a number.
            name=f"{self._prefix}r{secrets.token_hex(4)}",
            queue=order.queue,
            definition=definition,
            workers=1,
            size=RELAY_SIZE,
            environment={
                "CLOUDEXEC_RELAY_PORT": str(RELAY_PORT),
                "CLOUDEXEC_RELAY_IDLE": str(_IDLE),
            },
            tags=order.tags,
            attempt_seconds=int(order.lifetime),
            compute="fargate",
            retry_reclaimed=False,  # a retry has another address, but the same job id
        )

        async def once() -> str:
            try:
                answer = await self._clients.call("batch", "submit_job", once=True, **request)
            except AwsError as exc:
                # AWS may have accepted the job. If it is not listed yet, it ends by itself, unused.
                if exc.transient and (found := await self._find(request["jobName"])):
                    return found
                raise
            return str(answer["jobId"])

        self._has_arrived = self._is_inherited = False
        # If this is cancelled, the answer is still needed: without its id, the job cannot be ended.
        submitting = asyncio.ensure_future(insist(once, order.patience))
        try:
            self._job_id = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            with contextlib.suppress(AwsError, TimeoutError):
                self._job_id = await asyncio.wait_for(submitting, _STOP_SECONDS)
            raise

    async def _arrive(self, deadline: float) -> _End | None:
        """Wait until the relay runs, and write its address to the bucket, where workers read it.

        Args:
            deadline: Time on the monotonic clock by which the relay must run.

        Returns:
            The end of the relay; ``None`` if it runs.

        Raises:
            LaunchError: If it does not run in time.
            AwsError: If AWS refuses.
        """
        while True:
            details = await insist(self._look)
            if details is None or PHASES[details["status"]] is Phase.ENDED:
                return await self._why(details)
            if PHASES[details["status"]] is Phase.RUNNING:
                task = str(details.get("container", {}).get("taskArn", ""))
                host = await insist(functools.partial(self._public_address, task))
                if host:
                    break
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"the relay, job {self._job_id}, is {details['status']} after "
                    f"{self._order.patience:g} s: {await self._why_it_waits(details)}"
                )
            await asyncio.sleep(_POLL_STARTING)
        self.address = f"{host}:{RELAY_PORT}"
        self._inquiry.relay = self.address
        await insist(
            lambda: self._clients.call(
                "s3",
                "put_object",
                Bucket=self._order.bucket,
                Key=self._key,
                Body=self.address.encode(),
            )
        )
        self._has_arrived = True
        return None

    async def _sign(self) -> None:
        """Make a new URL for workers that are launched from now on."""
        client = await self._clients.client("s3", once=True)
        with translated("s3", "GetObject"):
            self.url = await client.generate_presigned_url(
                "get_object",
                Params={"Bucket": self._order.bucket, "Key": self._key},
                ExpiresIn=_URL_SECONDS,
            )
        self._signed_at = time.monotonic()

    async def _look(self) -> Any:
        """Return AWS Batch's description of the job; ``None`` if it does not know the job."""
        answer = await self._clients.call("batch", "describe_jobs", jobs=[self._job_id])
        details = next(iter(answer["jobs"]), None)
        if details is not None and self._began is None:
            phase, now = PHASES[details["status"]], time.monotonic()
            if phase is Phase.RUNNING and details.get("startedAt"):
                self._began = now - max(0.0, time.time() - details["startedAt"] / 1000)
            elif phase in (Phase.STARTING, Phase.RUNNING):
                self._began = now
        return details

    async def _public_address(self, task: str) -> str:
        """Return the public address of a relay that runs; empty if it is not known yet.

        References:
            Amazon ECS API Reference, "DescribeTasks" and "Attachment"; Amazon EC2 API Reference,
            "DescribeNetworkInterfaces".
        """
        parts = task.rpartition(":task/")[2].split("/")
        if len(parts) != 2:
            return ""
        answer = await self._clients.call("ecs", "describe_tasks", cluster=parts[0], tasks=[task])
        interfaces = [
            str(detail["value"])
            for each in answer["tasks"]
            for attachment in each.get("attachments", ())
            for detail in attachment.get("details", ())
            if detail.get("name") == "networkInterfaceId"
        ]
        if not interfaces:
            return ""
        try:
            answer = await self._clients.call(
                "ec2", "describe_network_interfaces", NetworkInterfaceIds=interfaces
            )
        except AwsError as exc:
            if exc.code != "InvalidNetworkInterfaceID.NotFound":
                raise
            return ""  # the task has ended meanwhile, and its interface was removed
        found = answer["NetworkInterfaces"]
        return next(
            (each["Association"]["PublicIp"] for each in found if "Association" in each), ""
        )

    async def _why(self, details: Mapping[str, Any] | None) -> _End:
        """Return the end of the relay, with its cause."""
        if details is None:
            return _End(f"the relay, job {self._job_id}, is not known to AWS Batch any more")
        tail = await self._inquiry.log_tail(details)
        end = end_of(details, details.get("attempts", ()))
        if _OLD_IMAGE in tail:
            cause = Cause(
                text="the worker image is older than relays",
                remedy="`cloudexec image push` makes a new one",
                fatal=True,
            )
        elif end.exit_code is not None:
            why = f"exit code {end.exit_code}, {end.status_reason}"
            if tail:
                why += f"; its last line: {tail.splitlines()[-1]}"
            cause = Cause(text=why)
        else:
            cause = cause_of_end(end)
        return _End(f"the relay, job {self._job_id}, has ended: {cause}", cause.fatal)

    async def _why_it_waits(self, details: Mapping[str, Any]) -> str:
        reason = details.get("statusReason", "")
        waiting = WaitingJob(
            job_id=self._job_id, counts={PHASES[details["status"]]: 1}, reason=reason
        )
        with contextlib.suppress(AwsError):
            situation = await self._inquiry.situation(
                [waiting], [], queue=self._order.queue, vcpus=RELAY_SIZE.vcpus, used_vcpus=0.0
            )
            if (cause := cause_of_waiting(situation)) is not None:
                return str(cause)
        return reason or "AWS gives no reason"

    # Later relays.

    async def _watch(self) -> None:
        """Check the relay periodically, and start another one if it has ended, until cancelled."""
        pause, said = _POLL, ""
        while True:
            await asyncio.sleep(pause)
            try:
                for job_id in tuple(self._given_up):
                    with contextlib.suppress(AwsError):  # the next round or ``close`` tries again
                        await self._terminate(job_id, "it cannot be reached")
                details = await self._look() if self._job_id else None
                is_over = details is None or PHASES[details["status"]] is Phase.ENDED
                if time.monotonic() - self._signed_at > _SIGN_EVERY:
                    await self._sign()
                if self._has_arrived and not is_over:
                    pause, said = _POLL, ""
                    continue
                if self._job_id and is_over:
                    self._replace(await self._why(details))
                if not self._job_id:
                    await self._submit()
                deadline = time.monotonic() + self._order.patience
                if (end := await self._arrive(deadline)) is not None:
                    raise LaunchError(end.text)
            except (AwsError, LaunchError) as exc:
                if self._job_id and isinstance(exc, LaunchError):
                    # This relay did not start, but the next one may.
                    self._given_up.append(self._job_id)
                    self._job_id = ""
                    self._ended()
                if str(exc) != said:
                    said = str(exc)
                    _logger.warning("the relay cannot be checked or replaced now: %s", exc)
                pause = min(2 * pause, _LONGEST_PAUSE)
            except Exception:
                # A bug must not end the watch, as then no other relay would be started.
                _logger.exception("internal error while watching the relay")
                pause = _LONGEST_PAUSE
            else:
                pause = _POLL
                _logger.info("the relay is now at %s", self.address)
                self.on_move(self.address)

    def _replace(self, end: _End) -> None:
        """Forget a relay that has ended, so that the caller starts another one."""
        _logger.warning("another relay is started: %s", end.text)
        self._job_id = ""
        self._ended()

    def _ended(self) -> None:
        if self._began is not None:
            self._spent.append(run_seconds(self._began, time.monotonic()))
            self._began = None


def _nobody(_: str) -> None:
    """Ignore a new address, before the executor sets ``on_move``."""
