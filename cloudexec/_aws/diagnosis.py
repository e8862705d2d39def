"""Explains why workers do not start or have ended: the cause in AWS's words, and a remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cloudexec._aws.job_details import NO_CLIENT
from cloudexec._aws.limits import FARGATE_MOST_VCPUS, WorkerSize, more_memory
from cloudexec._aws.refusals import make_service_role
from cloudexec._aws.requests import RECLAIM_REASONS

__all__ = [
    "LOG_LINES",
    "Cause",
    "JobEnd",
    "Situation",
    "allowed_vcpus",
    "cause_of_end",
    "cause_of_quota",
    "cause_of_refusal",
    "cause_of_waiting",
    "count_of_workers",
    "is_definition_gone",
    "is_out_of_capacity",
    "is_over_quota",
    "mend_invalid",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """A cause and its remedy.

    Attributes:
        text: What happened, with AWS's own words.
        remedy: What the user can do about it.
        fatal: Whether another try would fail, too.
        no_room: Whether AWS has no capacity, or a quota is used up.
    """

    text: str
    remedy: str = ""
    fatal: bool = False
    no_room: bool = False

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


_RECLAIM_CODES = ("SpotInterruption", "TerminationNotice")
"""Users report the first code. The sample event of the Amazon ECS Developer Guide ("Amazon ECS
clusters for Fargate") has the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnd:
    """The end of an attempt of a job or task, as AWS reports it.

    Attributes:
        status_reason: The job's reason.
        container_reason: The container's reason.
        exit_code: The container's exit code, or ``None``.
        log_tail: The last lines of the worker's log.
        retried: Whether AWS starts the worker again by itself.
        stop_code: The code of Amazon ECS for the reason, for a worker without AWS Batch.
        timed_out: Whether the worker ended because it had reached its time limit.
        size: Size of the worker; ``None``: unknown.
        compute: ``"fargate"`` or ``"ec2"``.
        most_vcpus: Most vCPUs that the service which runs the worker allows on Fargate.
        image: Image of the worker.
        relay: The relay through which the worker was to reach the client; empty: none.
    """

    status_reason: str = ""
    container_reason: str = ""
    exit_code: int | None = None
    log_tail: str = ""
    retried: bool = False
    stop_code: str = ""
    timed_out: bool = False
    size: WorkerSize | None = None
    compute: str = "fargate"
    most_vcpus: float = FARGATE_MOST_VCPUS
    image: str = ""
    relay: str = ""

    @property
    def reclaimed(self) -> bool:
        """Whether AWS took the machine back."""
        return self.status_reason.startswith(RECLAIM_REASONS) or self.stop_code in _RECLAIM_CODES

    @property
    def out_of_memory(self) -> bool:
        """Whether the container as a whole was killed because it had used up its memory."""
        return self.container_reason.lower().startswith(("outofmemory", "container killed due"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """The facts that are known while workers are expected."""

    statuses: Mapping[str, int] = field(default_factory=dict)
    """Number of workers in each of AWS Batch's states."""
    reasons: Sequence[str] = ()
    """Reasons that AWS Batch gives for jobs that wait (``statusReason``)."""
    ends: Sequence[JobEnd] = ()
    """Attempts that ended before their worker dialed back, the newest last."""
    queue: str = ""
    queue_state: str = ""
    queue_status: str = ""
    queue_reason: str = ""
    environments: Sequence[Mapping[str, object]] = ()
    """The queue's environments as DescribeComputeEnvironments returns them, in their order."""
    ahead: int = 0
    """Number of other users' jobs that wait before ours."""
    vcpus: float = 0.0
    """vCPUs of one worker."""
    used_vcpus: float = 0.0
    """vCPUs of our workers that AWS has placed, on the same kind of capacity."""
    spot: bool = False
    """Whether the waiting workers are to run on Spot."""
    quota_vcpus: float | None = None
    """The account's quota of vCPUs for such workers, if it could be read."""
    advertised: str = ""
    """The address that workers were told to dial, and why."""
    relay: str = ""
    """The relay through which workers reach this process; empty: they dial it directly."""


_QUOTA = re.compile(
    r"limit on the number of (?:vCPUs|tasks)|vCPU limit|MaxSpotInstanceCountExceeded", re.I
)
_ACCESS = re.compile(r"not authorized to perform|AccessDenied|is not authorized", re.I)
_NO_ADDRESS = re.compile(
    r"FreeAddressesInSubnet|free (IP )?addresses|network interface provisioning", re.I
)
_LOG = re.compile(r"log ?(stream|group)|logger args", re.I)
_REGISTRY = re.compile(r"\becr\b", re.I)
_TIMED_OUT = re.compile(
    r"i/o timeout|dial tcp|context deadline exceeded|context canceled|connection issue"
    r"|request ?canceled|Client\.Timeout|handshake timeout",
    re.I,
)
_BUSY = re.compile(
    r"toomanyrequests|too many requests|throttl|rate exceeded|status(?: code)?:? (?:429|5\d\d)\b"
    r"|\b5\d\d (?:Internal Server Error|Bad Gateway|Service Unavailable|Gateway Time-?out)"
    r"|service ?unavailable|InternalFailure|InternalServer|connection re(?:set|fused)|\bEOF\b",
    re.I,
)
"""Answers of registries, Secrets Manager and CloudWatch Logs that are busy for the moment."""
_CLOSED = re.compile(r"connection re(?:set|fused)", re.I)
_NO_HOST = re.compile(r"dial tcp: lookup \S+.*no such host", re.I)
_FULL = re.compile(r"no space left on device|disk quota exceeded", re.I)
_EXEC_FORMAT = re.compile(r"exec format error", re.I)
_WRONG_PLATFORM = re.compile(
    r"exec format error|does not contain descriptor matching platform|no matching manifest for",
    re.I,
)
"""Amazon ECS Developer Guide, "CannotPullContainer task errors"."""
LOG_LINES = 20
"""Number of lines that are read from the end of a log."""


def is_definition_gone(said: str) -> bool:
    """Return whether AWS refused a submission because its job definition was deregistered."""
    return "ClientException" in said and re.search(r"job ?definition", said, re.I) is not None


def is_out_of_capacity(said: str) -> bool:
    """Return whether AWS says that it has no capacity for a waiting worker.

    References:
        AWS Batch User Guide, "Jobs stuck in RUNNABLE status"; AWS re:Post, "How do I troubleshoot
        an Amazon ECS RunTask API for a Fargate task that fails with a "Capacity is unavailable"
        error?".
    """
    return "CAPACITY:INSUFFICIENT_INSTANCE_CAPACITY" in said or "Capacity is unavailable" in said


def is_over_quota(said: str) -> bool:
    """Return whether AWS says that the account's quota of vCPUs, or of tasks, is used up."""
    return _QUOTA.search(said) is not None


def cause_of_refusal(said: str) -> Cause:
    """Return the words with which AWS refused a job, and a remedy if one is known."""
    if "ClientException" in said and re.search(r"job ?queue", said, re.I):
        if re.search(r"disabled|not enabled", said, re.I):
            return Cause(text=said, remedy="enable it (`cloudexec up` does), or use another queue")
        if re.search(r"does not exist|not found", said, re.I):
            return Cause(
                text=said, remedy="`cloudexec doctor` checks it, `cloudexec up` creates it again"
            )
    return Cause(text=said)


def mend_invalid(up: str, said: str = "") -> str:
    """Say what may make an INVALID compute environment VALID again.

    Args:
        up: The command that repairs the set-up.
        said: AWS's reason for the state.

    References:
        AWS Batch User Guide, "Troubleshooting", "INVALID compute environment".
    """
    role = make_service_role(said, otherwise="batch")
    return f"{up} makes AWS Batch check it again; if its service-linked role is gone, first {role}"


def cause_of_end(end: JobEnd) -> Cause:
    """Say why a worker ended before it had dialed back, or while it ran tasks.

    References:
        AWS Batch User Guide, "Troubleshooting"; Amazon ECS Developer Guide, "Stopped tasks error
        messages".
    """
    cause = _cause_of_end(end)
    if end.retried:
        return replace(cause, text=f"{cause.text} (AWS tries it again)", fatal=False)
    return cause


def _cause_of_end(end: JobEnd) -> Cause:
    said = end.status_reason
    if end.container_reason not in said:
        said = " | ".join(filter(None, (said, end.container_reason)))
    if _WRONG_PLATFORM.search(said) or _EXEC_FORMAT.search(end.log_tail):
        return Cause(
            text=f"the worker's image is for another kind of processor: {said}",
            remedy=(
                "`cloudexec image push` makes one for x86-64, and `cloudexec image push --platform "
                "linux/arm64` makes one for arch='arm64'"
            ),
            fatal=True,
        )
    if _FULL.search(said) or _FULL.search(end.log_tail):
        return _disk_is_full(end, said)
    if make := make_service_role(said):
        return Cause(
            text=f"the account lacks a service-linked role: {said}",
            remedy=f"a user who may call iam:CreateServiceLinkedRole must create it once: {make}",
            fatal=True,
        )
    if "Container Overrides length" in said:
        return Cause(
            text=f"AWS refused the worker's settings: {said}",
            remedy="environment= of the launcher is too long: send data as arguments instead",
            fatal=True,
        )
    if "CannotPullContainer" in said or "ResourceInitializationError" in said:
        if _NO_HOST.search(said) and not _REGISTRY.search(said):
            return Cause(
                text=f"the worker's image cannot be pulled, as its registry is not known: {said}",
                remedy="give the name of an existing image with image=...",
                fatal=True,
            )
        if _TIMED_OUT.search(said) and not _CLOSED.search(said):
            return _no_route(said)
        if _BUSY.search(said):
            return _busy(said)
    if "CannotPullContainer" in said:
        return Cause(
            text=f"the worker's image cannot be pulled: {said}",
            remedy=(
                "`cloudexec image push` builds and pushes one, `cloudexec doctor` checks that it "
                "exists"
            ),
            fatal=True,
        )
    if "ResourceInitializationError" in said:
        if _LOG.search(said):
            return Cause(
                text=f"the worker's log cannot be written: {said}",
                remedy=(
                    "the log group must exist, and the execution role needs "
                    "logs:CreateLogStream and logs:PutLogEvents on it: `cloudexec up` creates both"
                ),
                fatal=True,
            )
        # AWS's reason begins with "unable to pull secrets or registry auth" for both.
        which = said.replace("secrets or registry auth", "")
        if _ACCESS.search(which) and _REGISTRY.search(which):
            return Cause(
                text=f"the execution role may not pull the worker's image: {said}",
                remedy=(
                    "it needs ecr:GetAuthorizationToken, and on the repository ecr:BatchGetImage "
                    "and ecr:GetDownloadUrlForLayer: `cloudexec up` repairs it"
                ),
                fatal=True,
            )
        if _ACCESS.search(which) or "secret" in which.lower():
            return Cause(
                text=f"the worker's key could not be read: {said}",
                remedy=(
                    "the execution role needs secretsmanager:GetSecretValue on the stack's secret: "
                    "`cloudexec up` repairs it, `cloudexec doctor` checks it"
                ),
                fatal=True,
            )
        return Cause(text=f"AWS could not set the worker up: {said}", remedy="it is tried again")
    if re.search(r"role", said, re.I) and (_ACCESS.search(said) or "assume" in said.lower()):
        return Cause(
            text=f"a role is missing or cannot be used: {said}",
            remedy="`cloudexec up` creates the roles again, `cloudexec doctor` checks them",
            fatal=True,
        )
    if end.reclaimed:
        return Cause(
            text=f"AWS took the machine back: {said}",
            remedy="it is replaced; spot=False or spot='prefer' avoids it",
        )
    if is_over_quota(said):
        return cause_of_quota(said)
    if _NO_ADDRESS.search(said):
        return Cause(
            text=f"the worker got no network interface: {said}",
            remedy=(
                "every worker takes an address of its subnet: `cloudexec up --subnet` names more "
                "or larger ones, or use fewer workers"
            ),
        )
    if end.out_of_memory:
        return Cause(
            text=f"the worker ran out of memory: {said}",
            remedy=(
                "give memory= a larger size"
                if end.size is None
                else more_memory(end.size, end.compute, end.most_vcpus)
            ),
        )
    if "exceeded timeout" in said or end.timed_out:
        return Cause(text=f"the worker reached its time limit: {said}", remedy="raise max_runtime=")
    words = f"\n{end.log_tail.strip()}" if end.log_tail.strip() else ""
    how = f" with exit code {end.exit_code}" if end.exit_code is not None else ""
    if end.exit_code == 3:
        return Cause(
            text=f"worker and client refused each other (exit code 3){words}",
            remedy="if their versions differ, `cloudexec image push` makes an image that fits",
            fatal=True,
        )
    if end.exit_code == NO_CLIENT:
        through = f" through the relay {end.relay}" if end.relay else ""
        return Cause(
            text=f"the worker started, but could not reach this process{through}{words}",
            remedy=_way_through(end.relay)
            or (
                "advertise= must name an address that workers can reach, and listen= a port that "
                "security groups and firewalls let through; `cloudexec doctor` tries it"
            ),
        )
    if end.exit_code not in (None, 137, 143) and _is_strange(end.log_tail):
        named = f" {end.image}" if end.image else ""
        return Cause(
            text=(
                f"the image{named} does not start a worker: it ended{how}: "
                f"{said or 'AWS gives no reason'}{words}"
            ),
            remedy=(
                "`cloudexec image push` makes one that does; an image of your own needs the entry "
                "point `python -m cloudexec.worker`"
            ),
        )
    return Cause(text=f"the worker ended{how}: {said or 'AWS gives no reason'}{words}")


def _is_strange(log_tail: str) -> bool:
    """Return whether a container's log is not that of a worker, as far as that can be told.

    A worker's log begins with a line of its own. Lines may arrive late, and only the last ones are
    read.
    """
    lines = log_tail.strip().splitlines()
    if "No module named cloudexec" in log_tail.replace("'", ""):
        return True
    return 0 < len(lines) < LOG_LINES and not any("cloudexec worker" in each for each in lines)


def _disk_is_full(end: JobEnd, said: str) -> Cause:
    if end.compute == "fargate":
        remedy = "ephemeral_gib=... gives a worker more, up to 200 GiB"
    else:
        remedy = "the instances need larger volumes: set them in the launch template of the queue"
    words = f"\n{end.log_tail.strip()}" if end.log_tail.strip() else ""
    return Cause(
        text=f"the worker's disk is full: {said}{words}",
        remedy=f"{remedy}; or use a smaller image, or write less",
        fatal="CannotPull" in said,
    )


def cause_of_waiting(situation: Situation) -> Cause | None:
    """Say why requested workers have not dialed back; ``None``: nothing is known to be wrong.

    References:
        AWS Batch User Guide, "Jobs stuck in RUNNABLE status".
    """
    if situation.queue_state == "DISABLED":
        return Cause(
            text=f"the job queue {situation.queue} is disabled",
            remedy="enable it (`cloudexec up` does), or use another",
            fatal=True,
        )
    if situation.queue_status == "INVALID":
        return Cause(
            text=f"the job queue {situation.queue} is invalid: {situation.queue_reason}",
            remedy="`cloudexec up` repairs it",
            fatal=True,
        )
    for end in reversed(situation.ends):
        if not end.reclaimed:
            return cause_of_end(end)
    broken = [e for e in situation.environments if e.get("status") == "INVALID"]
    if broken and len(broken) == len(situation.environments):
        why = broken[0].get("statusReason", "")
        return Cause(
            text=f"no compute environment of {situation.queue} is valid: {why}",
            remedy=(
                f"usually a role is missing or changed: {mend_invalid('`cloudexec up`', str(why))}"
            ),
            fatal=True,
        )
    off = [e for e in situation.environments if e.get("state") == "DISABLED"]
    if off and len(off) == len(situation.environments):
        return Cause(
            text=f"every compute environment of {situation.queue} is disabled",
            remedy="enable one (`cloudexec up` does)",
            fatal=True,
        )
    for reason in situation.reasons:
        found = _cause_of_reason(reason, situation)
        if found is not None:
            return found
    statuses = situation.statuses
    if statuses.get("RUNNABLE"):
        most = allowed_vcpus(situation.environments)
        ours = situation.used_vcpus
        with_one_more = ours + situation.vcpus
        if situation.quota_vcpus is not None and situation.quota_vcpus < with_one_more:
            kind = "Spot vCPUs" if situation.spot else "vCPUs"
            used = f", and {ours:g} are in use by this executor" if ours else ""
            return cause_of_quota(
                f"the account may run {situation.quota_vcpus:g} {kind} at once{used}"
            )
        if 0 < most < situation.vcpus:
            return Cause(
                text=(
                    f"a worker asks for {situation.vcpus:g} vCPUs, and the queue's compute "
                    f"environments have {most:g} in all"
                ),
                remedy="ask for less (vcpus=), or `cloudexec up --max-vcpus`",
                fatal=True,
            )
        if 0 < most < with_one_more:
            return Cause(
                text=(
                    f"{count_of_workers(statuses['RUNNABLE'], 'waits', 'wait')} for a place "
                    f"(RUNNABLE): the compute environments allow {most:g} vCPUs in all, and "
                    f"{ours:g} are in use by this executor"
                ),
                remedy="`cloudexec up --max-vcpus` allows more, or wait until others have ended",
                no_room=True,
            )
        ahead = f", {situation.ahead} jobs before them" if situation.ahead else ""
        limit = ""
        if situation.quota_vcpus is not None:
            limit = f"; the account may run {situation.quota_vcpus:g} vCPUs of this kind at once"
        return Cause(
            text=(
                f"{count_of_workers(statuses['RUNNABLE'], 'waits', 'wait')} for capacity (RUNNABLE)"
                f"{ahead}: the compute environments allow {most:g} vCPUs in all{limit}"
            ),
            remedy=(
                "other jobs may use them (`cloudexec ps`), or AWS has none of this kind left: try "
                f"{_spot_remedy(situation)}another size, or wait"
            ),
        )
    if statuses.get("STARTING"):
        return Cause(
            text=count_of_workers(statuses["STARTING"], "starts", "start")
            + " (the image is pulled)"
        )
    if statuses.get("RUNNING", 0) > 0:
        relay = situation.relay
        dialed = f"the relay {relay}" if relay else situation.advertised
        look = "check advertise= and listen=; `cloudexec logs` shows what the workers report"
        if relay:
            look = f"`cloudexec logs` shows what they report; {_way_through(relay)}"
        return Cause(
            text=(
                f"{count_of_workers(statuses['RUNNING'], 'runs', 'run')}, but did not dial back yet"
                f"{f'; they were told to dial {dialed}' * bool(dialed)}"
            ),
            remedy=f"if that lasts, they cannot reach this process: {look}",
        )
    return None


def _way_through(relay: str) -> str:
    """Say what a relay needs so that workers reach this process; empty without a relay."""
    if relay.startswith("ssh://"):
        return (
            "that host must let workers connect to the port that it forwards: it needs "
            "`GatewayPorts clientspecified` in its sshd_config, and a firewall that lets the port "
            "through; `cloudexec doctor` tries it"
        )
    if relay:
        return (
            f"workers must be able to connect to {relay}, and this process must be connected to it "
            f"(a warning says if it is not); `cloudexec doctor` tries it"
        )
    return ""


def _cause_of_reason(reason: str, situation: Situation) -> Cause | None:
    if not reason:
        return None
    if "MAX_RESOURCE" in reason or "JOB_RESOURCE_REQUIREMENT" in reason:
        return Cause(
            text=f"no compute environment can hold such a worker: {reason}",
            remedy="ask for a smaller size, or `cloudexec up --max-vcpus`",
            fatal=True,
        )
    if is_out_of_capacity(reason):
        return Cause(
            text=f"AWS has no capacity of this kind: {reason}",
            remedy=f"try {_spot_remedy(situation)}another size or more subnets, or wait",
            no_room=True,
        )
    if "SERVICE_ROLE_PERMISSIONS" in reason or _ACCESS.search(reason):
        return Cause(
            text=f"AWS Batch lacks a permission: {reason}",
            remedy="`cloudexec up` creates the roles again",
            fatal=True,
        )
    if is_over_quota(reason):
        return cause_of_quota(reason)
    if reason.startswith(RECLAIM_REASONS):
        return None  # AWS Batch is placing the worker again
    return Cause(text=f"AWS Batch says: {reason}")


def _spot_remedy(situation: Situation) -> str:
    return "spot=False or spot='prefer', " if situation.spot else ""


def count_of_workers(count: int, one: str, several: str) -> str:
    """Return text with the number of workers and what they do."""
    return f"1 worker {one}" if count == 1 else f"{count} workers {several}"


def _no_route(said: str) -> Cause:
    """Explain a time-out. It is not fatal, as a slow network causes one, too."""
    return Cause(
        text=f"workers cannot reach AWS's own services from their subnet: {said}",
        remedy=(
            "if it lasts: public subnets need assign_public_ip (`cloudexec up` "
            "without --no-public-ip); private ones a NAT gateway, or endpoints for ECR, S3, "
            "CloudWatch Logs and Secrets Manager"
        ),
    )


def _busy(said: str) -> Cause:
    return Cause(
        text=f"a service that workers need to start is busy: {said}",
        remedy=(
            "this usually passes. If it is a registry that allows too few pulls, use an image in "
            "Amazon ECR (`cloudexec image push`)"
        ),
    )


def cause_of_quota(said: str) -> Cause:
    """Say what to do if the account's quota of vCPUs is used up."""
    return Cause(
        text=f"the account's vCPU quota is used up: {said}",
        remedy="ask for more in the Service Quotas console, or use fewer or smaller workers",
        no_room=True,
    )


def allowed_vcpus(environments: Iterable[Mapping[str, object]]) -> float:
    """Return the sum of vCPUs that compute environments, as AWS describes them, allow."""
    return sum(map(_max_vcpus, environments))


def _max_vcpus(environment: Mapping[str, object]) -> float:
    resources = environment.get("computeResources")
    value = resources.get("maxvCpus", 0) if isinstance(resources, dict) else 0
    return float(value)
