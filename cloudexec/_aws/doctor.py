"""Checks a set-up step by step, and reports what each check found and how to repair it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias
from urllib.parse import unquote

from cloudexec._aws.address import advertised_address
from cloudexec._aws.clients import AwsClients, is_region, known_regions
from cloudexec._aws.diagnosis import mend_invalid
from cloudexec._aws.doctor_ec2 import look_at_instances
from cloudexec._aws.doctor_lambda import look_at_lambda
from cloudexec._aws.doctor_relay import by_proxy, look_at_relay
from cloudexec._aws.ecr import EcrImage
from cloudexec._aws.job_details import time_of_text
from cloudexec._aws.names import TAG_EXPIRES, is_setup_name
from cloudexec._aws.network import look_at_subnets
from cloudexec._aws.paced_calls import PacedCalls
from cloudexec._aws.prices import PriceTable
from cloudexec._aws.profile import Profile
from cloudexec._aws.quotas import vcpu_quotas
from cloudexec._aws.records import ACTIVE
from cloudexec._aws.relays import AUTO, lacks_for_relay, relay_price
from cloudexec._aws.stack import STANDING, find_stack
from cloudexec._aws.steps import counted
from cloudexec._aws.task_search import TaskSearch
from cloudexec._aws.template import TEMPLATE_VERSION
from cloudexec._errors import AwsError, ConfigError

__all__ = ["Check", "Outcome", "Report", "examine", "prevents_probe"]

Outcome: TypeAlias = Literal["ok", "warning", "failed", "skipped"]

_USUAL_PLATFORM = "linux/amd64"
_FATAL = (
    "profile",
    "region",
    "credentials",
    "queues",
    "compute environments",
    "image",
    "key",
    "address",
)
"""Checks that the probe depends on. It is a job of AWS Batch, so it does not need the cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of one check."""

    name: str
    outcome: Outcome
    found: str
    """The facts that the check found."""
    remedy: str = ""
    """What the user should do; empty if nothing."""


Report: TypeAlias = Callable[[Check], None]
"""Called with each check as soon as it is done."""


@dataclass(slots=True)
class _Examination:
    """Facts that later checks need from earlier ones."""

    clients: AwsClients
    profile: Profile
    advertise: str = ""
    listen: str = ""
    environments: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Compute environments as AWS describes them, by kind of queue."""


async def examine(
    name: str, report: Report, *, advertise: str = "", listen: str = ""
) -> tuple[Check, ...]:
    """Make all checks that start no worker.

    Args:
        name: Name of the profile.
        report: Called with each check.
        advertise: Address that workers are to dial; empty: it is found.
        listen: Address to listen on; empty: it is found.

    Returns:
        All checks, in order. A check is skipped if it depends on one that has failed.
    """
    checks: list[Check] = []

    def add(check: Check) -> bool:
        checks.append(check)
        report(check)
        return check.outcome != "failed"

    try:
        profile = Profile.load(name)
    except ConfigError as exc:
        remedy = (
            f"`cloudexec up --name {name}`" if is_setup_name(name) else "choose another --profile"
        )
        add(Check(name="profile", outcome="failed", found=str(exc), remedy=remedy))
        return tuple(checks)
    add(_profile(profile))
    if not is_region(profile.region):
        found = f"there is no AWS region {profile.region!r}"
        remedy = f"correct it in {Profile.path(name)}"
        add(Check(name="region", outcome="failed", found=found, remedy=remedy))
        return tuple(checks)
    try:
        clients = AwsClients(profile.region)
    except ConfigError as exc:
        remedy = "set AWS_PROFILE to one that is there, or unset it"
        add(Check(name="credentials", outcome="failed", found=str(exc), remedy=remedy))
        return tuple(checks)
    later: dict[str, Callable[[_Examination], Awaitable[Check]]] = {
        "stack": _stack,
        "queues": _queues,
        "compute environments": _environments,
        **({"cluster": _cluster} if profile.cluster else {}),
        **({"AWS Lambda": _lambda} if profile.function_role else {}),
        **({"instances": _instances} if profile.instance_profile else {}),
        "network": _network,
        "vCPU quota": _quota,
        "image": _image,
        "roles": _roles,
        "key": _key,
        "log group": _log_group,
        "address": _address,
    }
    async with clients:
        examination = _Examination(
            clients=clients, profile=profile, advertise=advertise, listen=listen
        )
        is_let_in = add(await _carefully("credentials", _credentials, examination))
        add(_region(clients))
        for each, look in later.items():
            if is_let_in:
                add(await _carefully(each, look, examination))
            else:
                found = "not checked, as the credentials do not work"
                add(Check(name=each, outcome="skipped", found=found))
    return tuple(checks)


def prevents_probe(checks: tuple[Check, ...]) -> list[str]:
    """Return the names of the failed checks without which a probe worker cannot succeed."""
    return [each.name for each in checks if each.outcome == "failed" and each.name in _FATAL]


async def _carefully(
    name: str, look: Callable[[_Examination], Awaitable[Check]], examination: _Examination
) -> Check:
    try:
        return await look(examination)
    except AwsError as exc:
        if exc.code == "NoCredentials" or exc.expired:
            remedy = (
                "log in, for example with `aws sso login` or `aws login`, unless the message names "
                "another cause"
            )
            return Check(name=name, outcome="failed", found=str(exc), remedy=remedy)
        if "Denied" in exc.code or "Unauthorized" in exc.code:
            # A user who runs executors need not have the permissions for all checks.
            return Check(name=name, outcome="skipped", found=str(exc))
        if exc.transient:
            remedy = "try again; if it fails again, check the network, proxies and the region"
        elif name == "credentials":
            remedy = "do what the message says: nothing else can be checked before"
        else:
            remedy = f"if a part of the set-up is broken: {_mend(examination.profile)}"
        return Check(name=name, outcome="failed", found=str(exc), remedy=remedy)


def _up(profile: Profile) -> str:
    """Return the command that repairs the profile's stack."""
    if profile.is_adopted:
        return f"`cloudexec up --adopt {profile.stack} --name {profile.name}`"
    return f"`cloudexec up --name {profile.name}`"


def _mend(profile: Profile) -> str:
    """Say how to repair a set-up."""
    return _up(profile) if profile.stack else f"correct {Profile.path(profile.name)}"


def _profile(profile: Profile) -> Check:
    stack = f"stack {profile.stack}" if profile.stack else "no stack"
    found = f"{Profile.path(profile.name)}: {stack}, {len(profile.queues)} queues"
    if not profile.queues:
        return Check(
            name="profile",
            outcome="failed",
            found=f"{found}; workers need at least one",
            remedy=_up(profile),
        )
    return Check(name="profile", outcome="ok", found=found)


async def _credentials(examination: _Examination) -> Check:
    identity = await examination.clients.call("sts", "get_caller_identity")
    accounts = {each.split(":")[4] for each in examination.profile.queues.values() if ":" in each}
    found = f"account {identity['Account']} as {identity['Arn']}"
    if accounts - {identity["Account"]}:
        return Check(
            name="credentials",
            outcome="failed",
            found=f"{found}, but the profile is of account {', '.join(sorted(accounts))}",
            remedy="log in to that account (AWS_PROFILE), or choose another --profile",
        )
    return Check(name="credentials", outcome="ok", found=found)


def _region(clients: AwsClients) -> Check:
    found = f"{clients.region}, as the profile says"
    if clients.endpoint:
        found += f"; calls go to {clients.endpoint}, not to AWS (AWS_ENDPOINT_URL)"
    if clients.region not in known_regions():
        found += "; the AWS SDK that is installed does not know it"
        remedy = "unless it is a new one, correct the profile; if it is, upgrade botocore"
        return Check(name="region", outcome="warning", found=found, remedy=remedy)
    return Check(name="region", outcome="ok", found=found)


async def _stack(examination: _Examination) -> Check:
    profile = examination.profile
    if not profile.stack:
        return Check(name="stack", outcome="skipped", found="the profile has none")
    stack = await find_stack(examination.clients, profile.stack)
    if stack is None or stack.status not in STANDING:
        state = (
            "does not exist" if stack is None else f"is in {stack.status} {stack.reason}".strip()
        )
        return Check(
            name="stack",
            outcome="failed",
            found=f"{profile.stack} {state}",
            remedy=_up(profile),
        )
    version = stack.outputs.get("Version", "?")
    found = f"{stack.name}: {stack.status}, template version {version}"
    if version != TEMPLATE_VERSION:
        newer = version.isdecimal() and int(version) > int(TEMPLATE_VERSION)
        return Check(
            name="stack",
            outcome="warning",
            found=f"{found}, while this cloudexec has {TEMPLATE_VERSION}",
            remedy="upgrade cloudexec" if newer else _up(profile),
        )
    said = {profile.queues.get("fargate"), profile.key_secret, profile.repository}
    if not said <= set(stack.outputs.values()):
        return Check(
            name="stack",
            outcome="warning",
            found=f"{found}; the profile differs from the stack's outputs",
            remedy=f"{_up(profile)} writes the profile again",
        )
    return Check(name="stack", outcome="ok", found=found)


async def _queues(examination: _Examination) -> Check:
    profile, clients = examination.profile, examination.clients
    answer = await clients.call(
        "batch", "describe_job_queues", jobQueues=list(profile.queues.values())
    )
    found = {each["jobQueueArn"]: each for each in answer["jobQueues"]}
    found |= {each["jobQueueName"]: each for each in answer["jobQueues"]}
    wrong: list[str] = []
    for kind, queue in profile.queues.items():
        if queue not in found:
            wrong.append(f"{kind}: {queue} does not exist")
            continue
        wrong += _wrong(kind, found[queue])
        order = sorted(found[queue]["computeEnvironmentOrder"], key=lambda each: each["order"])
        names = [each["computeEnvironment"] for each in order]
        answer = await clients.call(
            "batch", "describe_compute_environments", computeEnvironments=names
        )
        for environment in answer["computeEnvironments"][:1]:
            examination.environments[kind] = environment
    return _verdict("queues", wrong, ", ".join(profile.queues), profile)


async def _environments(examination: _Examination) -> Check:
    wrong: list[str] = []
    sizes: list[str] = []
    for kind in examination.profile.queues:
        environment = examination.environments.get(kind)
        if environment is None:
            wrong.append(f"{kind}: its queue has none")
            continue
        wrong += _wrong(kind, environment)
        sizes.append(f"{kind} up to {_max_vcpus(environment)} vCPUs")
    return _verdict("compute environments", wrong, ", ".join(sizes), examination.profile)


def _wrong(kind: str, each: Mapping[str, Any]) -> list[str]:
    status, state = each.get("status", "VALID"), each.get("state", "ENABLED")
    if status == "VALID" and state == "ENABLED":
        return []
    reason = each.get("statusReason", "") if status != "VALID" else ""
    return [f"{kind}: {status} and {state}" + (f" ({reason})" if reason else "")]


def _verdict(name: str, wrong: list[str], right: str, profile: Profile) -> Check:
    if not wrong:
        return Check(name=name, outcome="ok", found=f"VALID and ENABLED: {right}")
    remedy = f"{_up(profile)} enables what is disabled and creates what is missing"
    if any("INVALID" in each for each in wrong):
        remedy = mend_invalid(_up(profile), "; ".join(wrong))
    if not profile.stack:
        remedy = "repair or enable it in the AWS Batch console"
    return Check(name=name, outcome="failed", found="; ".join(wrong), remedy=remedy)


def _max_vcpus(environment: Mapping[str, Any]) -> int:
    return int(environment.get("computeResources", {}).get("maxvCpus", 0))


async def _cluster(examination: _Examination) -> Check:
    """Check that tasks can run on Fargate and Fargate Spot without AWS Batch."""
    profile, name = examination.profile, "cluster"
    answer = await examination.clients.call("ecs", "describe_clusters", clusters=[profile.cluster])
    shown = profile.cluster.rpartition("/")[2]
    found = next((each for each in answer["clusters"] if each.get("status") == "ACTIVE"), None)
    if found is None:
        text = f"the cluster {shown} does not exist"
        return Check(name=name, outcome="failed", found=text, remedy=_mend(profile))
    providers = found.get("capacityProviders") or ()
    if overdue := await _overdue(examination):
        number = counted(len(overdue), "worker")
        text = f"{shown} has {number} past the time limit: {', '.join(sorted(overdue)[:3])}"
        remedy = (
            f"`cloudexec stop --expired` ends them. Amazon ECS has no time limit: a worker ends "
            f"itself, if it started and its image has cloudexec "
            f"{importlib.metadata.version('cloudexec')}"
        )
        return Check(name=name, outcome="warning", found=text, remedy=remedy)
    if "FARGATE_SPOT" not in providers:
        # The call replaces the cluster's providers, so it must name the present ones, too.
        all_of_them = " ".join(sorted({*providers, "FARGATE", "FARGATE_SPOT"}))
        strategy = json.dumps(found.get("defaultCapacityProviderStrategy") or [])
        remedy = (
            f"`aws ecs put-cluster-capacity-providers --cluster {shown} --capacity-providers "
            f"{all_of_them} --default-capacity-provider-strategy '{strategy}'`"
        )
        text = f"{shown} is not associated with FARGATE_SPOT, so Fargate(spot=True) cannot run"
        return Check(name=name, outcome="warning", found=text, remedy=remedy)
    return Check(name=name, outcome="ok", found=f"{shown}: ACTIVE, {', '.join(providers)}")


async def _lambda(examination: _Examination) -> Check:
    found, remedy = await look_at_lambda(examination.clients, examination.profile)
    outcome: Outcome = "warning" if remedy else "ok"
    return Check(name="AWS Lambda", outcome=outcome, found=found, remedy=remedy)


async def _instances(examination: _Examination) -> Check:
    found, remedy = await look_at_instances(examination.clients, examination.profile)
    outcome: Outcome = "warning" if remedy else "ok"
    return Check(name="instances", outcome=outcome, found=found, remedy=remedy)


async def _overdue(examination: _Examination) -> list[str]:
    """Return the ids of the cluster's tasks that run although their time limit has passed."""
    profile = examination.profile
    search = TaskSearch(
        PacedCalls(examination.clients), [profile.cluster], public_ip=profile.assign_public_ip
    )
    now = datetime.now(UTC)
    found: list[str] = []
    for each in await search.jobs():
        expires = time_of_text(each["tags"].get(TAG_EXPIRES))
        if each["status"] in ACTIVE and expires is not None and expires < now:
            found.append(str(each["jobId"]))
    return found


async def _network(examination: _Examination) -> Check:
    """Check that workers can start in the profile's subnets."""
    profile, name = examination.profile, "network"
    if not profile.subnets:
        return Check(name=name, outcome="skipped", found="the profile names no subnets")
    change = f"{_up(profile)} with --vpc, --subnet or --public-ip chooses others"
    try:
        subnets = await look_at_subnets(examination.clients, ids=profile.subnets)
    except AwsError as exc:
        if not exc.code.startswith("InvalidSubnet"):
            raise
        return Check(name=name, outcome="failed", found=str(exc), remedy=change)
    public_ip = profile.assign_public_ip
    wrong = [
        f"{each}: {problem}" for each in subnets if (problem := each.problem(public_ip=public_ip))
    ]
    if wrong:
        found = f"workers cannot start in {'; '.join(wrong)}"
        remedy = f"repair the routes or endpoints of the VPC; or {change}"
        return Check(name=name, outcome="failed", found=found, remedy=remedy)
    hidden = [str(each) for each in subnets if each.reach == "public" and not each.maps_public]
    if hidden and any(kind.startswith("ec2") for kind in profile.queues):
        return Check(
            name=name,
            outcome="warning",
            found=f"instances get no public address, and so no way out, in {', '.join(hidden)}",
            remedy="`aws ec2 modify-subnet-attribute --map-public-ip-on-launch --subnet-id ID`",
        )
    reaches = sorted({each.reach for each in subnets})
    return Check(
        name=name,
        outcome="ok",
        found=f"{counted(len(subnets), 'subnet')} of {profile.vpc}: {', '.join(reaches)}",
    )


async def _quota(examination: _Examination) -> Check:
    """Compare the account's quotas with the vCPUs that the environments may start."""
    name = "vCPU quota"
    kinds = {kind: each for kind, each in examination.environments.items() if _max_vcpus(each) > 0}
    services = sorted({"fargate" if kind.startswith("fargate") else "ec2" for kind in kinds})
    try:
        quotas = await vcpu_quotas(examination.clients.call, services)
    except AwsError as exc:
        if exc.expired:
            raise
        return Check(name=name, outcome="skipped", found=f"the quotas cannot be read: {exc}")
    if not quotas:
        return Check(name=name, outcome="skipped", found="AWS lists no such quota")
    found = ", ".join(f"{kind} {value:g}" for kind, value in sorted(quotas.items()))
    short = [
        f"{kind} {quotas[kind]:g} of {_max_vcpus(each)}"
        for kind, each in kinds.items()
        if kind in quotas and quotas[kind] < _max_vcpus(each)
    ]
    if short:
        return Check(
            name=name,
            outcome="warning",
            found=f"the account may run fewer vCPUs at once than the stack: {', '.join(short)}",
            remedy="workers beyond that wait; ask for more in the console, under Service Quotas",
        )
    return Check(name=name, outcome="ok", found=f"{found} vCPUs at once")


async def _image(examination: _Examination) -> Check:
    profile = examination.profile
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    ours = {key: uri for key, uri in profile.images.items() if key.startswith(f"{python}-")}
    push = f"`cloudexec image push --profile {profile.name}`"
    if not ours:
        found = f"the profile has no image for Python {python}"
        if profile.images:
            found += f", only for {', '.join(sorted(profile.images))}"
        if profile.repository:
            found += "; executors build one with the packages that are installed here"
            return Check(name="image", outcome="ok", found=found)
        return Check(name="image", outcome="failed", found=found, remedy=push)
    notes: list[str] = []
    doubts: list[str] = []
    if f"{python}-{_USUAL_PLATFORM}" not in ours:
        had = ", ".join(sorted(ours))
        doubts.append(f"{had} only: workers without arch='arm64' need {_USUAL_PLATFORM}")
    for key, uri in sorted(ours.items()):
        parts = EcrImage.parse(uri)
        if "@sha256:" not in uri:
            doubts.append(f"{key}: {uri} is not pinned by digest, so what it names may change")
        if parts is None or not parts.digest:
            notes.append(f"{key}: {uri}")
            continue
        try:
            answer = await examination.clients.call(
                "ecr",
                "describe_images",
                region=parts.region,
                registryId=parts.account,
                repositoryName=parts.repository,
                imageIds=[{"imageDigest": parts.digest}],
            )
        except AwsError as exc:
            if exc.code not in ("ImageNotFoundException", "RepositoryNotFoundException"):
                raise
            found = f"{key}: {uri} is not in the repository any more"
            return Check(name="image", outcome="failed", found=found, remedy=push)
        tags = answer["imageDetails"][0].get("imageTags", [])
        if tags and not any(f"-py{python}-" in tag for tag in tags):
            found = f"{key}: {uri} is tagged {', '.join(tags)}, which is for another Python"
            return Check(name="image", outcome="failed", found=found, remedy=push)
        version = _own_version()
        if version and not any(tag.startswith(f"{version}-py") for tag in tags):
            had = ", ".join(tags) or "without a tag"
            doubts.append(f"{key}: {had}, while this is cloudexec {version}")
        notes.append(f"{key}: {parts.repository}, {', '.join(tags) or parts.digest[:19]}")
    if doubts:
        return Check(name="image", outcome="warning", found="; ".join(doubts), remedy=push)
    return Check(name="image", outcome="ok", found="; ".join(notes))


def _own_version() -> str:
    """Return cloudexec's version as it stands in image tags; empty if it is not installed."""
    try:
        version = importlib.metadata.version("cloudexec")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", version)


async def _roles(examination: _Examination) -> Check:
    profile = examination.profile
    roles = {
        "execution role": profile.execution_role,
        "job role": profile.job_role,
        "role of runs": profile.run_role,
    }
    if not profile.execution_role:
        return Check(
            name="roles",
            outcome="failed",
            found="the profile has no execution role, which Fargate needs to pull the image",
            remedy=_mend(profile),
        )
    wrong = []
    for kind, arn in roles.items():
        if not arn:
            continue
        name = arn.rpartition("/")[2]
        try:
            answer = await examination.clients.call("iam", "get_role", RoleName=name)
        except AwsError as exc:
            if exc.code != "NoSuchEntity":
                raise
            wrong.append(f"the {kind} {name} does not exist")
            continue
        document = answer["Role"].get("AssumeRolePolicyDocument", {})
        if isinstance(document, str):
            document = json.loads(unquote(document))
        if "ecs-tasks.amazonaws.com" not in json.dumps(document):
            wrong.append(f"the {kind} {name} does not trust ecs-tasks.amazonaws.com")
    if wrong:
        found = "; ".join(wrong)
        return Check(name="roles", outcome="failed", found=found, remedy=_mend(profile))
    found = ", ".join(arn.rpartition("/")[2] for arn in roles.values() if arn)
    return Check(name="roles", outcome="ok", found=found)


async def _key(examination: _Examination) -> Check:
    profile = examination.profile
    if not profile.key_secret:
        found = "the profile has no secret: each launch gets a key of its own"
        return Check(name="key", outcome="skipped", found=found)
    try:
        answer = await examination.clients.call(
            "secretsmanager", "get_secret_value", SecretId=profile.key_secret
        )
    except AwsError as exc:
        if exc.code not in ("ResourceNotFoundException", "InvalidRequestException"):
            raise
        found = f"{profile.key_secret} does not exist"
        return Check(name="key", outcome="failed", found=found, remedy=_mend(profile))
    if not re.fullmatch(r"[0-9a-f]{64}", answer.get("SecretString", "")):
        return Check(
            name="key",
            outcome="failed",
            found=f"{profile.key_secret} is not 64 hexadecimal digits",
            remedy="store such a value in it, or run `cloudexec down` and `cloudexec up`",
        )
    return Check(name="key", outcome="ok", found="can be read")


async def _log_group(examination: _Examination) -> Check:
    name = examination.profile.log_group
    if not name:
        found = "the profile has none: AWS Batch uses /aws/batch/job"
        return Check(name="log group", outcome="ok", found=found)
    async for each in examination.clients.pages(
        "logs", "describe_log_groups", "logGroups", logGroupNamePrefix=name
    ):
        if each["logGroupName"] == name:
            days = each.get("retentionInDays")
            kept = f"kept for {days} days" if days else "kept for ever"
            return Check(name="log group", outcome="ok", found=f"{name}, {kept}")
    remedy = _mend(examination.profile)
    return Check(name="log group", outcome="failed", found=f"{name} does not exist", remedy=remedy)


def _judged(name: str, found: str, remedy: str) -> Check:
    return Check(name=name, outcome="failed" if remedy else "ok", found=found, remedy=remedy)


async def _address(examination: _Examination) -> Check:
    profile, name = examination.profile, "address"
    named = os.environ.get("CLOUDEXEC_RELAY", "")
    relay = named or profile.relay
    source = "CLOUDEXEC_RELAY" if named else f"the profile {profile.name!r}"
    if relay.lower() not in ("", AUTO, "true", "false"):
        return _judged(name, *look_at_relay(relay, source))
    price = relay_price(PriceTable.load(profile.region), "x86_64", profile.region)
    started = f"a relay that each executor starts, for about ${price.per_hour:.2f} an hour"
    lacking = lacks_for_relay(profile)
    if relay.lower() == "true":
        found = f"workers connect through {started}: from {source}"
        if lacking:
            found = f"{source} asks for a relay, but none can be started: {lacking}"
            return Check(name=name, outcome="failed", found=found)
        return _judged(name, *by_proxy(found))
    try:
        address = await advertised_address(
            profile, advertise=examination.advertise, endpoint=examination.clients.endpoint
        )
    except ConfigError as exc:
        if relay == AUTO and not lacking:
            why = str(exc).partition(". ")[0]
            found = f"workers connect through {started} (auto, from {source}), as {why}"
            return _judged(name, *by_proxy(found))
        remedy = (
            "set CLOUDEXEC_ADVERTISE to the address at which workers reach this machine, and "
            "CLOUDEXEC_LISTEN if it is forwarded to another port here; or "
        )
        remedy += f"for a relay: {lacking}" if lacking else f"CLOUDEXEC_RELAY=auto for {started}"
        return Check(name=name, outcome="failed", found=str(exc), remedy=remedy)
    listen = examination.listen or f"{address.listen}:{address.port or 'any free port'}"
    found = (
        f"workers are told to dial {address.address}: {address.how}; this side listens on {listen}"
    )
    return Check(name=name, outcome="ok", found=found)
